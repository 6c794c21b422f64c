"""Weights stored as their difference from a bundled model, in about a third of the bytes.

A weight is `base + step * difference` in float32, rounded to float16.  The difference is an integer
of 8 bits, or of 16 in a tensor that does not fit 8; the step is a power of two, one for each
tensor.  IEEE arithmetic rounds all operations correctly, so the weights are the same on every
machine.  Tensors of integers, the entropy tables, are stored whole.  All of it is one `safetensors`
file, compressed with gzip: the differences, the step of `NAME` as `NAME/step`, and as `/base` and
`/model` the ids of both models.  Our choice.

This module does not import torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from cmamba_ref.errors import WeightsError
from cmamba_ref.model_id import ID_BYTES, WEIGHTS_FILE, id_of_arrays

DIFFERENCE_FILE = "difference.safetensors.gz"
MAX_BYTES = 100_000_000  # uncompressed
GZIP = 16 + zlib.MAX_WBITS
# The root mean square of a tensor's differences in steps, to within a factor of sqrt(2).  Errors in
# the transforms are seen in images, those elsewhere only cost bytes.
TRANSFORMS = ("g_a.", "g_s.", "bypass.")
IN_TRANSFORMS, ELSEWHERE = 16, 4
BASE, MODEL, STEP = "/base", "/model", "/step"

Arrays = Mapping[str, np.ndarray]


def stored_file(folder: Path) -> Path:
    """Return the file with the weights of a folder: the whole ones come before a difference.

    Where there are neither, it is that of whole weights.
    """
    whole, difference = folder / WEIGHTS_FILE, folder / DIFFERENCE_FILE
    return difference if difference.is_file() and not whole.is_file() else whole


def pack(arrays: Arrays, base: Arrays) -> bytes:
    """Return what `unpack` makes weights of that are close to `arrays`.

    Args:
        arrays: the weights of a model, float16 or integers.
        base: those of another model of the same configuration.

    Raises:
        WeightsError: the two are not of the same configuration, or some weights cannot be stored.
    """
    kinds, base_kinds = ({name: _kind(of[name]) for name in of} for of in (arrays, base))
    is_half = all(_is_table(array) or array.dtype == np.float16 for array in arrays.values())
    if kinds != base_kinds or not is_half:
        raise WeightsError("a difference needs two models of the same configuration, in float16")
    stored = {}
    for name, array in arrays.items():
        if _is_table(array):
            stored[name] = array
            continue
        if not np.isfinite(array).all():
            raise WeightsError(f"{name} holds NaN or infinity")
        exact = array.astype(np.float32) - base[name].astype(np.float32)
        step = _step(exact, IN_TRANSFORMS if name.startswith(TRANSFORMS) else ELSEWHERE)
        stored[name] = _as_integers(name, exact / step)
        stored[name + STEP] = np.array([step], np.float32)
    stored[BASE] = _as_array(id_of_arrays(base))
    stored[MODEL] = _as_array(id_of_arrays(_sum(stored, base)))
    # Differences look like noise: a search for repetitions only takes time.
    packer = zlib.compressobj(9, zlib.DEFLATED, GZIP, zlib.DEF_MEM_LEVEL, zlib.Z_HUFFMAN_ONLY)
    data = packer.compress(save(stored)) + packer.flush()
    unpack(data, lambda _: base)
    return data


def id_in(data: bytes) -> bytes:
    """Return the id of the model that a difference makes.

    Raises:
        WeightsError: the difference is damaged.
    """
    return _open(data)[MODEL].tobytes()


def unpack(data: bytes, arrays_of: Callable[[bytes], Arrays]) -> dict[str, np.ndarray]:
    """Return the weights of a model, float16 or integers.

    Args:
        data: the difference, from `pack`.
        arrays_of: gives the weights of the model that it is from, by its id.

    Raises:
        WeightsError: the difference is damaged, or `arrays_of` raises it.
    """
    stored = _open(data)
    arrays = _sum(stored, arrays_of(stored[BASE].tobytes()))
    if id_of_arrays(arrays) != stored[MODEL].tobytes():
        raise WeightsError("the difference is damaged: it makes another model than it says")
    return arrays


def _kind(array: np.ndarray) -> tuple:
    """What two tensors have in common; entropy tables have any length."""
    return (array.dtype,) if _is_table(array) else (array.dtype, array.shape)


def _is_table(array: np.ndarray) -> bool:
    return np.issubdtype(array.dtype, np.integer)


def _step(difference: np.ndarray, resolution: float) -> float:
    if not difference.any():
        return 1.0
    rms = np.sqrt(np.mean(np.square(difference, dtype=np.float64)))
    return 2.0 ** np.rint(np.log2(rms / resolution))


def _as_integers(name: str, values: np.ndarray) -> np.ndarray:
    largest = np.abs(values).max(initial=0)
    for kind in (np.int8, np.int16):
        if largest <= np.iinfo(kind).max:
            return np.asarray(np.rint(values), kind)
    raise WeightsError(f"the differences in {name} are too unlike each other")


def _sum(stored: Arrays, base: Arrays) -> dict[str, np.ndarray]:
    arrays = {}
    for name, array in stored.items():
        if "/" in name:
            continue
        if (step := stored.get(name + STEP)) is not None:
            of = base.get(name)
            if of is None or (of.dtype, of.shape) != (np.float16, array.shape):
                raise WeightsError(f"the difference is not from the model that it names: {name}")
            is_sound = array.dtype in (np.int8, np.int16) and step.shape == (1,)
            if not is_sound or step.dtype != np.float32:
                raise WeightsError(f"the difference is damaged: {name}")
            with np.errstate(over="ignore", invalid="ignore"):  # the id tells
                single = of.astype(np.float32) + step[0] * array.astype(np.float32)
                array = np.asarray(single, np.float16)
        arrays[name] = array
    return arrays


def _as_array(model_id: bytes) -> np.ndarray:
    return np.frombuffer(model_id, np.uint8)


def _open(data: bytes) -> dict[str, np.ndarray]:
    unpacker = zlib.decompressobj(GZIP)
    try:
        content = unpacker.decompress(data, MAX_BYTES)
        if unpacker.unconsumed_tail:
            raise WeightsError(f"the difference is larger than {MAX_BYTES / 1e6:g} MB")
        if not unpacker.eof or unpacker.unused_data:
            raise WeightsError("the difference is damaged: it is cut or continued")
        stored = load(content)
    # KeyError: a type that NumPy lacks.
    except (zlib.error, SafetensorError, KeyError) as error:
        raise WeightsError(f"the difference is damaged: {error}") from error
    for name in (BASE, MODEL):
        found = stored.get(name)
        if found is None or (found.dtype, found.shape) != (np.uint8, (ID_BYTES,)):
            raise WeightsError(f"the difference is damaged: {name}")
    return stored

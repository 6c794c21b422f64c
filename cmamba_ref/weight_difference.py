"""Weights stored as their difference from a bundled model, in a quarter of the bytes.

A weight is `base + step * difference` in float32, rounded to float16.  The difference is an integer
of 8 bits, or more in a tensor that does not fit 8; the step is a power of two, one for each tensor.
IEEE arithmetic rounds both operations correctly, so the weights are the same on every machine.
Tensors of integers, the entropy tables, are stored whole.  All of it is one
`safetensors` file, compressed with gzip.  Our choice.

This module does not import torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from cmamba_ref.errors import WeightsError
from cmamba_ref.model_id import id_of_arrays

DIFFERENCE_FILE = "difference.safetensors.gz"
# Uncompressed: the difference of a model with nearly that many parameters.
MAX_BYTES = 100_000_000
GZIP = 16 + zlib.MAX_WBITS
# The root mean square of a tensor's differences in steps, to within a factor of sqrt(2).  Errors in
# the transforms are seen in images, those elsewhere only cost bytes.
TRANSFORMS = ("g_a.", "g_s.", "bypass.")
IN_TRANSFORMS, ELSEWHERE = 16, 4
INTEGERS = (np.int8, np.int16, np.int32)
# No tensor of a model has a slash in its name.
BASE, MODEL, STEP = "/base", "/model", "/step"

Arrays = Mapping[str, np.ndarray]


def pack(arrays: Arrays, base: Arrays) -> bytes:
    """Return what `unpack` makes weights of that are close to `arrays`.

    Args:
        arrays: the weights of a model, float16 or integers.
        base: those of another model of the same configuration.

    Raises:
        WeightsError: the two are not of the same configuration.
    """
    if {name: _kind(base[name]) for name in base} != {name: _kind(arrays[name]) for name in arrays}:
        raise WeightsError("a difference needs two models of the same configuration, in float16")
    stored = {}
    for name, array in arrays.items():
        if array.dtype != np.float16:
            stored[name] = array
            continue
        exact = array.astype(np.float32) - base[name].astype(np.float32)
        step = _step(exact, IN_TRANSFORMS if name.startswith(TRANSFORMS) else ELSEWHERE)
        steps = np.asarray(np.rint(exact / step))
        largest = np.abs(steps).max(initial=0)
        fitting = (kind for kind in INTEGERS if largest <= np.iinfo(kind).max)
        stored[name] = steps.astype(next(fitting))
        stored[name + STEP] = np.asarray(step, np.float32)
    stored[BASE] = _as_array(id_of_arrays(base))
    stored[MODEL] = _as_array(id_of_arrays(_sum(stored, base)))
    # Differences look like noise: matches of several bytes only cost time.
    packer = zlib.compressobj(9, zlib.DEFLATED, GZIP, zlib.DEF_MEM_LEVEL, zlib.Z_HUFFMAN_ONLY)
    return packer.compress(save(stored)) + packer.flush()


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
    return (array.dtype, array.shape) if array.dtype == np.float16 else (array.dtype,)


def _step(difference: np.ndarray, resolution: float) -> float:
    if not difference.any():
        return 1.0
    rms = np.sqrt(np.mean(np.square(difference, dtype=np.float64)))
    return 2.0 ** np.rint(np.log2(rms / resolution))


def _sum(stored: Arrays, base: Arrays) -> dict[str, np.ndarray]:
    arrays = {}
    for name, array in stored.items():
        if "/" in name:
            continue
        if name + STEP in stored:
            try:
                array = base[name].astype(np.float32) + stored[name + STEP].reshape(()) * array
            except (KeyError, ValueError) as error:
                raise WeightsError("the difference is from another model than it says") from error
            array = np.asarray(array, np.float16)
        arrays[name] = array
    return arrays


def _as_array(model_id: bytes) -> np.ndarray:
    return np.frombuffer(model_id, np.uint8)


def _open(data: bytes) -> dict[str, np.ndarray]:
    try:
        unpacker = zlib.decompressobj(GZIP)
        stored = load(unpacker.decompress(data, MAX_BYTES))
    except (zlib.error, SafetensorError) as error:
        raise WeightsError(f"the difference is damaged: {error}") from error
    if not unpacker.eof or not {BASE, MODEL} <= stored.keys():
        raise WeightsError("the difference is damaged: it is not complete")
    return stored

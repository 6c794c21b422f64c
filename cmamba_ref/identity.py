"""Which model is which: those that ship by name, any by its id.

Without torch, so that a file's model can be named without loading one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cmamba_ref.errors import WeightsError

WEIGHTS_FILE = "model.safetensors"
# Beside it: the SHA-256 of its bytes, as `sha256sum` writes and checks it.
HASH_FILE = "model.safetensors.sha256"
PRETRAINED = Path(__file__).parent / "pretrained"
ID_BYTES = 8


def pretrained_names() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(path.parent.name for path in PRETRAINED.glob(f"*/{WEIGHTS_FILE}"))


def name_of(model_id: bytes) -> str | None:
    """The name of the model of that id, if it ships."""
    for name in pretrained_names():
        if id_of_file(PRETRAINED / name / WEIGHTS_FILE) == model_id:
            return name
    return None


def id_of_file(path: str | os.PathLike) -> bytes:
    """The id of the model whose weights a file holds; float16 there stands for float32.

    Raises:
        WeightsError: the file is damaged.
        OSError: it cannot be read.
    """
    try:
        arrays = load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"cannot read the weights in {str(path)!r}: {error}") from error

    def describe(name: str) -> tuple[str, str, list[int], bytes]:
        array = arrays[name]
        array = array.astype(np.float32) if array.dtype == np.float16 else array
        return name, f"torch.{array.dtype}", list(array.shape), array.tobytes()

    return id_of(map(describe, sorted(arrays)))


def id_of(tensors: Iterable[tuple[str, str, list[int], bytes]]) -> bytes:
    """The id: the first 8 bytes of a SHA-256 over the tensors of a model, see docs/format.md.

    Args:
        tensors: sorted by name; of each its name, its type as torch writes it, its shape, and its
            values in C order.
    """
    digest = hashlib.sha256()
    for name, dtype, shape, values in tensors:
        digest.update(f"{name} {dtype} {shape}\n".encode())
        digest.update(values)
    return digest.digest()[:ID_BYTES]

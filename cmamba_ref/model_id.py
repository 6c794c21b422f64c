"""Model ids, computed from weights.

Importing this module does not import torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cmamba_ref.errors import WeightsError

if TYPE_CHECKING:
    from torch import nn

WEIGHTS_FILE = "model.safetensors"
# Beside it: the SHA-256 of its bytes, as `sha256sum` writes and checks it.
HASH_FILE = "model.safetensors.sha256"
ID_BYTES = 8


def arrays_in(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Return the weights that a file holds, as they are stored there.

    Raises:
        WeightsError: the file is damaged.
        OSError: it cannot be read.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"cannot read the weights in {str(path)!r}: {error}") from error


def id_of_arrays(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return the id of the model with these weights; float16 counts as float32."""

    def describe(name: str) -> tuple[str, str, list[int], bytes]:
        array = arrays[name]
        array = array.astype(np.float32) if array.dtype == np.float16 else array
        return name, f"torch.{array.dtype}", list(array.shape), array.tobytes()

    return id_of(map(describe, sorted(arrays)))


def id_of(tensors: Iterable[tuple[str, str, list[int], bytes]]) -> bytes:
    """Return the first 8 bytes of a SHA-256 over the tensors of a model, see docs/format.md.

    Args:
        tensors: sorted by name; of each its name, its type as torch writes it, its shape, and its
            values in C order.
    """
    digest = hashlib.sha256()
    for name, dtype, shape, values in tensors:
        digest.update(f"{name} {dtype} {shape}\n".encode())
        digest.update(values)
    return digest.digest()[:ID_BYTES]


def fingerprint(module: nn.Module) -> list[tuple]:
    """Return a value that changes whenever a parameter or buffer is replaced or written to.

    The sum of the bits is for writes that leave no other trace, through `.data` or in inference
    mode, and for memory that was given back and holds another tensor by now.  It is exact, so it
    never changes by itself; it does not detect permutations of values by such a write.
    """
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensors = (*module.parameters(), *module.buffers())
    return [
        (
            t.data_ptr(),
            0 if t.is_inference() else t._version,
            t.dtype,
            int(t.detach().view(integers[t.element_size()]).sum()),
        )
        for t in tensors
    ]

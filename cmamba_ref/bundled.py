"""The models in the package, by name and by id.

This module does not import torch, so that a file's model can be named without loading one.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from cmamba_ref.errors import WeightsError
from cmamba_ref.model_id import WEIGHTS_FILE, arrays_in, id_of_arrays
from cmamba_ref.weight_difference import DIFFERENCE_FILE, id_in, stored_file

PRETRAINED = Path(__file__).parent / "pretrained"


def pretrained_names() -> list[str]:
    """Return the names of the bundled models."""
    return sorted(folder.name for folder in PRETRAINED.glob("*") if stored_file(folder).is_file())


def name_of(model_id: bytes) -> str | None:
    """Return the name of the bundled model of that id, or None.

    Raises:
        WeightsError: a bundled model is damaged.
    """
    for name in pretrained_names():
        if _id_of(name) == model_id:
            return name
    return None


def arrays_of(model_id: bytes) -> dict[str, np.ndarray]:
    """Return the weights of the bundled model of that id, as they are stored, float16 or integers.

    Raises:
        WeightsError: no bundled model has that id and is stored whole.
    """
    for path in PRETRAINED.glob(f"*/{WEIGHTS_FILE}"):
        arrays = arrays_in(path)
        if id_of_arrays(arrays) == model_id:
            return arrays
    raise WeightsError(
        f"it is the difference from model {model_id.hex()}, which is not bundled with this version"
    )


def _id_of(name: str) -> bytes:
    path = stored_file(PRETRAINED / name)
    return _id_in(path, path.stat().st_mtime_ns)


@functools.cache  # hashing takes a tenth of the time to decode an image
def _id_in(path: Path, _: int) -> bytes:
    if path.name != DIFFERENCE_FILE:
        return id_of_arrays(arrays_in(path))
    try:
        return id_in(path.read_bytes())
    except WeightsError as error:
        raise WeightsError(f"cannot read the weights in {str(path)!r}: {error}") from error

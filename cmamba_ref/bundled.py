"""The models in the package, by name and by id.

This module does not import torch, so that a file's model can be named without loading one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from cmamba_ref.errors import WeightsError
from cmamba_ref.model_id import WEIGHTS_FILE, id_of_file
from cmamba_ref.weight_difference import DIFFERENCE_FILE, id_in

PRETRAINED = Path(__file__).parent / "pretrained"


def pretrained_names() -> list[str]:
    """Return the names of the bundled models."""
    files = *PRETRAINED.glob(f"*/{WEIGHTS_FILE}"), *PRETRAINED.glob(f"*/{DIFFERENCE_FILE}")
    return sorted({file.parent.name for file in files})


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
    for name in pretrained_names():
        path = PRETRAINED / name / WEIGHTS_FILE
        if path.is_file() and id_of_file(path) == model_id:
            return load_file(path)
    raise WeightsError(
        f"it is the difference from model {model_id.hex()}, which is not bundled with this version"
    )


def _id_of(name: str) -> bytes:
    whole, difference = (PRETRAINED / name / kind for kind in (WEIGHTS_FILE, DIFFERENCE_FILE))
    if whole.is_file():
        return id_of_file(whole)
    try:
        return id_in(difference.read_bytes())
    except WeightsError as error:
        raise WeightsError(f"cannot read the weights in {str(difference)!r}: {error}") from error

"""Checkpoints: whole, checked, and never a pickle.

One safetensors file holds all tensors, and in its metadata the rest of the state as JSON.  Its name
carries the number of the step and a hash of its bytes,

    checkpoint-000012000-3f9ab2c45d6e7f80.safetensors

so a file that was damaged, on disk or on its way, is told from a good one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor

from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.errors import TrainingError

HASH_DIGITS = 16
_NAME = re.compile(rf"checkpoint-(\d{{9,}})-([0-9a-f]{{{HASH_DIGITS}}})\.safetensors")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run: tensors by name, and all else as JSON values."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def write(folder: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint into `folder`, whole or not at all, and return its path.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()
    }
    data = serialize(tensors, metadata={"state": json.dumps(checkpoint.state)})
    path = folder / f"checkpoint-{step:09d}-{_hash(data)}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
    return path


def read(path: Path) -> Checkpoint:
    """The checkpoint in a file.

    Raises:
        TrainingError: the name is none of a checkpoint, or the bytes are not those it names.
        OSError: the file cannot be read.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise TrainingError(f"{path} has no name of a checkpoint, see cmamba_ref.training")
    data = path.read_bytes()
    if _hash(data) != match[2]:
        raise TrainingError(f"{path} is damaged: its bytes are not the ones its name stands for")
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
        return Checkpoint(deserialize(data), state)
    except (SafetensorError, ValueError, KeyError) as error:
        raise TrainingError(f"{path} is no checkpoint: {error}") from error


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; None where there is none at all.

    Raises:
        TrainingError: there are checkpoints, and all of them are damaged.
    """
    found = _paths(folder)
    for path in reversed(found):
        try:
            return read(path)
        except (TrainingError, OSError) as error:
            logger.warning("%s; going back to the one before", error)
    if found:
        raise TrainingError(
            f"`out` must hold a whole checkpoint or none, got {len(found)} damaged ones in "
            f"{str(folder)!r}; choose another folder, or delete them to start anew"
        )
    return None


def prune(folder: Path, step: int, keep: int, also: Iterable[int] = ()) -> None:
    """Delete old checkpoints of a run that has just been saved at `step`.

    The `keep` newest stay, and those of the steps in `also`.  Later ones than `step` go: they were
    refused when the run went on from an earlier one, and must not count as the newest.
    """
    of_step = {_step(path): path for path in _paths(folder)}  # the last written of each step
    newest_steps = sorted(s for s in of_step if s <= step)[-keep:]
    kept = {of_step[s] for s in {*newest_steps, *also} if s in of_step}
    for path in set(_paths(folder)) - kept:
        path.unlink()


def _paths(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first."""
    found = (path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: (_step(path), path.stat().st_mtime_ns))


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:HASH_DIGITS]

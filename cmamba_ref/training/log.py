"""The log of a run: one JSON object per line, and on request the same for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.errors import TrainingError


class Log:
    """Appends records to `log.jsonl` in the folder of a run; each has a `step`.

    Args:
        folder: of the run; it is made.
        step: where the run begins or goes on.  Records of later steps, and a line that a kill cut
            short, are taken out: the run is about to write them again.
        tensorboard: also write for TensorBoard, into the folder `tensorboard`.

    Raises:
        TrainingError: TensorBoard is asked for and is not installed.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool = False) -> None:
        self._board = _board(folder / "tensorboard", step) if tensorboard else None
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _is_record_until(line, step)]
            write_atomically(path, "".join(line + "\n" for line in kept).encode())
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in `close`)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in _numbers(record):
                self._board.add_scalar(name, value, record["step"])
            self._board.flush()

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _is_record_until(line: str, step: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and record.get("step", 0) <= step


def _numbers(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """All numbers in a record, also in records inside it, by path."""
    found = []
    for name, value in record.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            found.append((prefix + name, float(value)))
    return found


def _board(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError(
            f"`tensorboard` must be installed to log for it ({error}); "
            'in a clone: python -m pip install ".[train]"'
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1)

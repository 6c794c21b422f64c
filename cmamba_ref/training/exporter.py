"""Results of a run where they outlive it: few files, none large, each replaced by rename."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from cmamba_ref import weights
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.errors import TrainingError
from cmamba_ref.model import CMamba

MAX_BYTES = 16_000_000  # of a file
# The most important first. Weights come before their record: `--continue-from` refuses a record of
# other weights, so one that is cut off between the two is noticed.
_MODEL = (weights.CONFIG_FILE, weights.WEIGHTS_FILE, "run.json")
FILES = (*(f"model/{name}" for name in _MODEL), "log.jsonl", *(f"best/{name}" for name in _MODEL))


class Exporter:
    """Writes the log, the best and the current model of a run into `folder`, now and again.

    Args:
        every: seconds between exports of the current model.
        keep: at most so many files; the last ones of `FILES` are left out.
    """

    def __init__(self, folder: Path, every: float, keep: int) -> None:
        self.folder, self.every = folder, every
        self._files = FILES[:keep]
        self._written_at = -float("inf")

    @property
    def is_due(self) -> bool:
        """Whether `every` seconds have passed since the current model was written."""
        return time.monotonic() - self._written_at >= self.every

    def write(self, name: str, model: CMamba, record: dict[str, Any]) -> None:
        """Write a model as `best` or `model`, with the record that training goes on from.

        Args:
            model: rounded to float16.

        Raises:
            TrainingError: its weights take more than `MAX_BYTES`.
        """
        data = weights.to_bytes(model)
        if len(data) > MAX_BYTES:
            raise TrainingError(
                f"weights must take at most {MAX_BYTES / 1e6:g} MB for `export`, these take "
                f"{len(data) / 1e6:.1f} MB in float16; train without `export`"
            )
        texts = model.config.to_json(), json.dumps(record, indent=1) + "\n"
        for file, content in zip(_MODEL, (texts[0].encode(), data, texts[1].encode()), strict=True):
            self._put(f"{name}/{file}", content)
        if name == "model":
            self._written_at = time.monotonic()

    def write_log(self, path: Path) -> None:
        """Write the log, or its end where it has grown too long."""
        log = path.read_bytes()
        if len(log) > MAX_BYTES:
            log = log[-MAX_BYTES:].partition(b"\n")[2]
        self._put("log.jsonl", log)

    def _put(self, name: str, content: bytes) -> None:
        if name in self._files:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)

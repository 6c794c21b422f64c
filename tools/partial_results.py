"""Results of a long run, kept one by one, so that a run that was cut short can be completed.

They lie in a file beside the output. Each line is a JSON list: the conditions under which a result
was measured, its key, the result. Lines of other conditions are not used, nor is a line that was
cut short.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any


class PartialResults:
    """Results by key, in memory and in a file.

    Args:
        output: the file that the whole result will go to; the partial ones lie beside it. None
            keeps them in memory only.
        conditions: what results depend on beside their key; JSON values.
        fresh: forget what is kept.

    Raises:
        OSError: the file cannot be read or written.
    """

    def __init__(
        self, output: Path | None, conditions: dict[str, object], *, fresh: bool = False
    ) -> None:
        self.path = output and output.with_name(output.name + ".partial")
        self.results: dict[str, Any] = {}
        self._conditions = conditions
        if fresh:
            self.discard()
        if self.path is not None and self.path.exists():
            for line in self.path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # cut short
                    measured_under, key, result = json.loads(line)
                    if measured_under == conditions:
                        self.results[key] = result

    def add(self, key: str, result: object) -> None:
        """Keep one result; it is on disk when this returns."""
        self.results[key] = result
        if self.path is not None:
            with self.path.open("a") as file:
                # The line break goes first: the last line may have been cut short.
                file.write("\n" + json.dumps([self._conditions, key, result]))

    def discard(self) -> None:
        """Remove the file, once its results are elsewhere or are not wanted."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

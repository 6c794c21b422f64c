"""Results of a long run, kept one by one, so that a run that was cut short can be completed.

They lie in a file beside the output, one JSON value per line: first the conditions under which they
were measured, then a key and a result each.  A line that was cut short is dropped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cmamba_ref import CMambaError
from cmamba_ref.atomic_write import write_atomically


class OtherConditionsError(CMambaError):
    """What is kept was measured under other conditions."""


class PartialResults:
    """Results by key, in memory and in a file.

    Args:
        output: the file that the whole result will go to; the partial ones lie beside it.  None
            keeps them in memory only.
        conditions: what results depend on beside their key; JSON values.
        fresh: forget what is kept.

    Raises:
        OtherConditionsError: what is kept was measured under others.
        OSError: the file cannot be read or written.
    """

    def __init__(
        self, output: Path | None, conditions: dict[str, object], *, fresh: bool = False
    ) -> None:
        self.path = output and output.with_name(output.name + ".partial")
        self.results: dict[str, Any] = {}
        self._conditions = conditions
        if self.path is None:
            return
        if fresh:
            self.discard()
        elif self.path.exists():
            self._read(self.path)

    def add(self, key: str, result: object) -> None:
        """Keep one result; it is on disk when this returns."""
        self.results[key] = result
        if self.path is None:
            return
        new = not self.path.exists()
        with self.path.open("a") as file:
            for line in ([self._conditions] if new else []) + [[key, result]]:
                file.write(json.dumps(line) + "\n")

    def discard(self) -> None:
        """Remove the file, once its results are elsewhere or are not wanted."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        lines = []
        for line in path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break  # cut short in the middle of a line, and so the last one
        if not lines:
            self.discard()
            return
        kept = lines[0]
        names = kept.keys() | self._conditions.keys()
        if differing := sorted(n for n in names if kept.get(n) != self._conditions.get(n)):
            was_and_is = "; ".join(
                f"{name}: {kept.get(name)!r} there, {self._conditions.get(name)!r} now"
                for name in differing
            )
            raise OtherConditionsError(
                f"{path} holds results of a run under other conditions ({was_and_is}); "
                "complete that one, or start again with --fresh"
            )
        self.results = dict(lines[1:])
        # Without the torn line, to which the next one would be joined.
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())

"""Stretches of work inside functions, by name, for a tool that measures them.

Modules can be watched through forward hooks; the entropy coder and the scans are functions.  Where
nobody watches, a stretch costs one comparison.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

ENTROPY_CODER, SCAN = "entropy coder", "scan"

Watcher = Callable[[str], AbstractContextManager[object]]

_watcher: Watcher | None = None


@contextlib.contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Within the block, every stretch of work in this process runs within `watcher(name)`."""
    global _watcher
    before, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = before


def stage(name: str) -> AbstractContextManager[object]:
    """Return the context for a stretch of work."""
    return contextlib.nullcontext() if _watcher is None else _watcher(name)

"""Warnings, of this package and of libraries, as lines of the command's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def warning_lines(name: str, tell: Callable[[str], object]) -> Iterator[None]:
    """Replace what Python would print about a warning, with a line of source, by one plain line.

    Not for several threads at a time: where warnings go belongs to the process.

    Args:
        name: of the file at work, or ""; lines that do not begin with it get it as a prefix.
        tell: callback, called with each different line.
    """
    told = set()

    def show(message: Warning | str, *_: object) -> None:
        text = " ".join(str(message).split())
        line = text if text.startswith(name) else f"{name}: {text}"
        if line not in told:
            told.add(line)
            tell(line)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield

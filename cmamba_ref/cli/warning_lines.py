"""Warnings, of this package and of libraries, as lines of the command's own."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cmamba_ref.codec.files import naming
from cmamba_ref.errors import one_line


@contextmanager
def warning_lines(name: str, tell: Callable[[str], object]) -> Iterator[None]:
    """Replace what Python would print about a warning, with a line of source, by one plain line.

    Not for several threads at a time: where warnings go belongs to the process.

    Args:
        name: of the file at work, or ""; lines that do not begin with it get it as a prefix.
        tell: callback, called at the end with each different line.
    """
    lines: dict[str, None] = {}

    def show(message: Warning | str, *_: object) -> None:
        text = one_line(message)
        lines[naming(name, text) if name else text] = None

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = show
            yield
    finally:
        for line in lines:
            tell(line)


@contextmanager
def no_native_output() -> Iterator[None]:
    """Drop what libraries in C print to stderr, as libtiff does about every fault of a file."""
    try:
        stderr = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    if sys.stderr:
        sys.stderr.flush()
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)

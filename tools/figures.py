"""Figures by matplotlib, without a display.

Needs matplotlib (extra `eval`), which is imported with the first figure: a command that only prints
its help does without.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from cmamba_ref.atomic_write import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches, whose parts make room for each other."""
    # Not pyplot, which keeps every figure and looks for a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a figure; the suffix says how.

    Raises:
        ValueError: matplotlib does not know this kind of file.
    """
    write_atomically(path, as_file(figure, path.suffix.removeprefix(".")))


def as_file(figure: Figure, kind: str) -> bytes:
    """Return a figure as a file of a kind; of the same figure the same bytes at any time."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "cmamba"}):  # names inside an SVG are random otherwise
        dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
        figure.savefig(buffer, format=kind, dpi=150, metadata=dates)
    return buffer.getvalue()

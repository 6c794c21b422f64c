"""Figures by matplotlib, without a display, written whole or not at all.

Needs matplotlib (extra `eval`), which is imported with the first figure: a command that only prints
its help does without.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from cmamba_ref.atomic_write import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, whose parts make room for each other."""
    # Not pyplot, which keeps every figure and looks for a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path, *, few_colours: bool = False) -> None:
    """Write a figure; the suffix says how.

    Args:
        few_colours: it is of lines and letters: as a PNG it needs no more than 256 colours, and is
            a third as large with them.
    """
    kind = path.suffix.lower().removeprefix(".")
    data = as_file(figure, kind)
    if few_colours and kind == "png":
        buffer, colours = io.BytesIO(), Image.Quantize.FASTOCTREE
        with Image.open(io.BytesIO(data)) as image:
            few = image.convert("RGB").quantize(256, method=colours, dither=Image.Dither.NONE)
        few.save(buffer, "PNG", optimize=True)
        data = buffer.getvalue()
    write_atomically(path, data)


def as_file(figure: Figure, kind: str) -> bytes:
    """A figure as a file of a kind. The same figure gives the same bytes at any time."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with rc_context({"svg.hashsalt": "cmamba"}):  # names inside an SVG are random otherwise
        figure.savefig(buffer, format=kind, dpi=150, metadata=dates.get(kind))
    return buffer.getvalue()

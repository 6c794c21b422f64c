"""Large maps in bounded memory: the rows of a map, strip after strip.

A layer that looks no further than a few rows needs its input and its output as a whole, and what
lies between only for one strip. The scan looks at everything, but in the order of a direction, and
so it too needs what it reads only for a few lines at a time; see `ReadByRegion`.

Strips change a result by its rounding only, and so there is nothing for an encoder and a decoder to
agree on: what decides how symbols are read is computed in float64, with a margin (docs/format.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cmamba_ref.ops import chunked, dispatch

# Positions of a strip. A map of no more is not cut.
STRIP_POSITIONS = 2**17
# Positions of what each direction of a scan reads from; there are four at a time.
REGION_POSITIONS = 2**16

# project(direction, lines): what a direction reads in those lines, `[B, rows, columns, D]` and
# `[B, rows, columns, R + 2N]`. Lines are rows for directions 0 and 2, columns for 1 and 3.
Project = Callable[[int, slice], tuple[Tensor, Tensor]]


def are_needed(x: Tensor) -> bool:
    """Whether a map `[B, C, H, W]` is cut: a large one on the CPU, without gradient or compiler."""
    return (
        x.shape[0] * x.shape[2] * x.shape[3] > STRIP_POSITIONS
        and type(x) is Tensor  # not a fake tensor, for instance
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and x.dtype in (torch.float32, torch.float64)
        and dispatch.choose("auto", "cpu") in ("chunked", "compiled")
    )


class Strip(NamedTuple):
    """Rows of a map."""

    rows: slice  # of the map
    with_halo: slice  # of the map: the rows and, as far as the map goes, those around them
    inside: slice  # of with_halo: the rows


def cut(lines: int, positions_of_line: int, positions: int, halo: int = 0) -> Iterator[Strip]:
    """All lines of a map in strips of about so many positions, at least one line."""
    size = max(positions // positions_of_line, 1)
    for start in range(0, lines, size):
        stop = min(start + size, lines)
        yield with_halo(slice(start, stop), lines, halo)


def with_halo(rows: slice, lines: int, halo: int) -> Strip:
    """A strip of these rows of a map that has so many lines."""
    first, last = max(rows.start - halo, 0), min(rows.stop + halo, lines)
    return Strip(rows, slice(first, last), slice(rows.start - first, rows.stop - first))


def of_map(x: Tensor, halo: int = 0) -> Iterator[Strip]:
    """The strips of rows of a map `[B, C, H, W]`."""
    batch, _, height, width = x.shape
    return cut(height, batch * width, STRIP_POSITIONS, halo)


def take(x: Tensor, axis: int, lines: slice) -> Tensor:
    """These lines of an axis, as a view."""
    return x.narrow(axis, lines.start, lines.stop - lines.start)


class ReadByRegion:
    """What the directions of a scan read, computed for a few lines at a time; a `chunked.Read`.

    Every direction holds the region it is in.

    Args:
        project: computes a region.
        batch, height, width: of the map.
    """

    def __init__(self, project: Project, batch: int, height: int, width: int):
        self._project = project
        self._lines = (height, width)  # of even and odd directions
        self._size = tuple(max(REGION_POSITIONS // (batch * n), 1) for n in (width, height))
        self._held: dict[int, tuple[int, Tensor, Tensor]] = {}

    def __call__(
        self, direction: int, start: int, stop: int, u: Tensor, projections: Tensor
    ) -> None:
        axis = direction % 2
        size, width = self._size[axis], self._lines[1 - axis]
        done = 0
        while start + done < stop:
            number, begin = divmod(start + done, size * width)
            x, proj = self._region(direction, number)
            end = min(begin + stop - start - done, x.shape[1] * x.shape[2])
            here = slice(done, done + end - begin)
            chunked.read_direction(x, direction, begin, end, u[here])
            chunked.read_direction(proj, direction, begin, end, projections[here])
            done += end - begin

    def _region(self, direction: int, number: int) -> tuple[Tensor, Tensor]:
        """Region `number` in the order of the direction."""
        held = self._held.get(direction)
        if held is None or held[0] != number:
            self._held.pop(direction, None)
            lines, size = self._lines[direction % 2], self._size[direction % 2]
            first, last = number * size, min((number + 1) * size, lines)
            if direction >= 2:
                first, last = lines - last, lines - first
            held = (number, *self._project(direction, slice(first, last)))
            self._held[direction] = held
        return held[1], held[2]

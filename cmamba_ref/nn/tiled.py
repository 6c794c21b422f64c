"""The blocks of `cmamba_ref.nn` on large maps, in bounded memory: strip after strip of rows.

    y = g_a(x, apply=tiled.apply)

A layer that looks no further than a few rows needs its input and its output as a whole, and what
lies between only for one strip. The scan looks at everything, but in the order of a direction, and
so it too needs what it reads only for a few lines at a time; see `ReadByRegion`.

Strips change a result by its rounding only, and so there is nothing for an encoder and a decoder to
agree on: what decides how symbols are read is computed in float64, with a margin (docs/format.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from cmamba_ref.nn.ablations import PlainFusion
from cmamba_ref.nn.blocks import CASSM, ResBlock, VSSBlock
from cmamba_ref.nn.ss2d import DIRECTIONS, SS2D
from cmamba_ref.ops import dispatch
from cmamba_ref.ops.chunked.scan import read_direction, scan_2d_strips
from cmamba_ref.stages import SCAN, stage

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
        and dispatch.choose("auto", "cpu") == "chunked"
    )


def apply(layer: nn.Module, x: Tensor) -> Tensor:
    """Compute `layer(x)` for a layer of g_a or g_s and a map `[B, C, H, W]` of any size.

    Forward hooks of a layer and of its paths run either way; where the map is cut, they are given a
    copy of the module, and the modules inside a path are not called one by one.
    """
    compute = _BY_STRIPS.get(type(layer))
    if compute is None or not are_needed(x):
        return layer(x)
    # Called in its place, with the same parameters and hooks: other threads use the layer itself.
    twin = copy.copy(layer)
    twin.forward = lambda x: compute(layer, x)
    return twin(x)


# ---------------------------------------------------------------- the blocks


def _res_block(block: ResBlock, x: Tensor) -> Tensor:
    out = x.clone()
    for rows, with_halo, inside in of_map(x, halo=2):
        change = block.conv2(block.act(block.conv1(x[:, :, with_halo])))
        out[:, :, rows].add_(change[:, :, inside])
    return out


def _vss_block(block: VSSBlock, x: Tensor) -> Tensor:
    out = x.clone()
    channels_last = "b c h w -> b h w c"
    _add_ss2d(block.ss2d, rearrange(x, channels_last), block.norm, rearrange(out, channels_last))
    return out


def _ca_ssm(block: CASSM, x: Tensor) -> Tensor:
    f_ssm, f_cnn = apply(block.ssm, x), apply(block.cnn, x)
    sums = (f_ssm[:, :, rows] + f_cnn[:, :, rows] for rows, *_ in of_map(x))
    largest = [reduce(part, "b c h w -> b c", "max") for part in sums]
    alpha, beta = block.fusion_weights(torch.stack(largest).amax(0))
    return _fuse(lambda ssm, cnn: block.w(alpha * ssm + beta * cnn), f_ssm, f_cnn)


def _plain_fusion(block: PlainFusion, x: Tensor) -> Tensor:
    return _fuse(block.fuse, apply(block.ssm, x), apply(block.cnn, x))


def _fuse(fuse: Callable[[Tensor, Tensor], Tensor], f_ssm: Tensor, f_cnn: Tensor) -> Tensor:
    """Overwrite `f_ssm` with `fuse(f_ssm, f_cnn)`, which looks at one position at a time."""
    for rows, *_ in of_map(f_ssm):
        f_ssm[:, :, rows] = fuse(f_ssm[:, :, rows], f_cnn[:, :, rows])
    return f_ssm


def _add_ss2d(ss2d: SS2D, x: Tensor, norm: nn.Module, out: Tensor) -> None:
    """`out += ss2d(norm(x))` for large maps x and out `[B, H, W, C]`.

    Besides x and out only the output of the scan exists as a whole: the scan's input is recomputed
    wherever it is needed, by each of the four directions and for the skip. For that the weights of
    `in_proj` and `x_proj` are used in parts: hooks on these two do not run.
    """
    batch, height, width, _ = x.shape
    inner = ss2d.D.shape[1]
    to_u, to_z = ss2d.in_proj.weight.split(inner)
    to_proj = ss2d.x_proj.weight.unflatten(0, (DIRECTIONS, -1))
    A, dt_weight, dt_bias, D = ss2d.scan_parameters(x.dtype)

    def scan_input(axis: int, lines: slice) -> Tensor:
        strip = with_halo(lines, x.shape[axis], halo=1)
        region = norm(take(x, axis, strip.with_halo))
        return take(ss2d.convolve(F.linear(region, to_u)), axis, strip.inside)

    def project(direction: int, lines: slice) -> tuple[Tensor, Tensor]:
        u = scan_input(1 + direction % 2, lines)
        return u, F.linear(u, to_proj[direction])

    y = x.new_zeros(batch, height, width, inner)
    read = ReadByRegion(project, batch, height, width)
    with stage(SCAN):
        scan_2d_strips(read, y, A, dt_weight, dt_bias)
    for rows, *_ in cut(height, batch * width, REGION_POSITIONS):
        scanned = y[:, rows].addcmul_(scan_input(1, rows), D.sum(0))
        z = F.linear(norm(x[:, rows]), to_z)
        out[:, rows].add_(ss2d.output(scanned, z))


_BY_STRIPS: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    ResBlock: _res_block,
    VSSBlock: _vss_block,
    CASSM: _ca_ssm,
    PlainFusion: _plain_fusion,
}


# ---------------------------------------------------------------- strips


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
    """What the directions of a scan read, computed for a few lines at a time; a `Read`.

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
            read_direction(x, direction, begin, end, u[here])
            read_direction(proj, direction, begin, end, projections[here])
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

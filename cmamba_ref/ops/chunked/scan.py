"""The scans of the backend `chunked`; `recurrence.py` explains the method.

`scan_*` takes sequences whose time steps are known. `scan_2d_*` takes a map and its projections.
It goes through the four directions side by side, one strip of positions after the other: what a
strip needs is read from the map in the order of each direction, and only then are its time steps
formed; so the map is never copied as a whole.  In the terms of `recurrence.py` the four directions
are the groups, G = 4: one call advances all of them, each at its own position of the map.

Types: all tensors of a call share one, fp32 or fp64. On a GPU the matrix products follow torch's
setting for TF32, which is off unless you allow it.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cmamba_ref.ops.chunked.recurrence import (
    Blocks,
    Gradients,
    Operands,
    block_length,
    count_of,
    segment_length,
)

DIRECTIONS = 4
# Floats of the memory of a strip, about: few enough to stay in cache, enough to be worth the calls.
STRIP_FLOATS = 2 * 1024 * 1024
# Positions that are summed in one matrix product for the gradient of dt_weight: more round more.
PRODUCT_LENGTH = 32

# read(k, start, stop, u, projections) writes what direction k reads at positions start to stop of
# its order into u [positions, S, D] and projections [positions, S, R + 2N].
Read = Callable[[int, int, int, Tensor, Tensor], None]


# ---------------------------------------------------------------- sequences


def scan_forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor,
    begins: Tensor | None,
    keep_starts: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence without skip, gate and bias.

    Args:
        u, dt: `[L, S, G, D]`.
        A: `[G, N, D]`.
        B, C: `[L, S, G, N, 1]` varying or `[1, 1, G, N, D]` constant.
        initial_state: `[S, G, N, D]`.
        begins: where another sequence begins, bool `[L, S]`; None: nowhere.
        keep_starts: whether to keep what the backward needs.

    Returns:
        y `[L, S, G, D]`, last state `[S, G, N, D]` and, if kept, the state before each segment
        `[segments, S, G, N, D]`.
    """
    operands = _operands(u, dt, B, C, begins)
    y = torch.empty_like(operands.u)
    blocks = Blocks(A, initial_state, len(u))
    starts = _alloc_starts(len(u), initial_state, keep_starts)
    state = initial_state.clone(memory_format=torch.contiguous_format)
    last = _run(blocks, operands, state, y, starts)
    return y.squeeze(3), last, starts


def scan_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    begins: Tensor | None,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C and initial_state of `scan_forward`."""
    operands = _operands(u, dt, B, C, begins)
    gradients = Gradients(
        *(torch.empty_like(operands.u), torch.empty_like(operands.dt)),
        # Not zeros_like: results are contiguous whatever the strides of the arguments.
        *(B.new_zeros(B.shape), C.new_zeros(C.shape), grad_last.new_zeros(grad_last.shape)),
    )
    blocks = Blocks(A, grad_last, len(u))
    grad_y = grad_y.contiguous().unsqueeze(3)
    grad_last = grad_last.clone(memory_format=torch.contiguous_format)
    grad_first = _run_backward(blocks, operands, starts, grad_y, grad_last, gradients)
    return (
        *(gradients.u.squeeze(3), gradients.dt.squeeze(3), gradients.A.sum(0)),
        *(gradients.B, gradients.C, grad_first),
    )


def _operands(u: Tensor, dt: Tensor, B: Tensor, C: Tensor, begins: Tensor | None) -> Operands:
    if begins is not None:
        begins = begins[:, :, None, None, None]
    return Operands(u.contiguous().unsqueeze(3), dt.contiguous().unsqueeze(3), B, C, begins)


def _alloc_starts(length: int, state: Tensor, keep: bool) -> Tensor:
    """Allocate the state before each segment, none if they are not to be kept."""
    count = count_of(segment_length(state.shape), length) if keep else 0
    return state.new_empty(count, *state.shape)


def _run(blocks: Blocks, operands: Operands, state: Tensor, y: Tensor, starts: Tensor) -> Tensor:
    """Fill y `[L, S, G, 1, D]`, and starts unless empty, block by block; the last state."""
    length, size = len(operands.u), block_length(state.shape)
    segment = segment_length(state.shape)
    for start in range(0, length, size):
        if len(starts) and start % segment == 0:
            starts[start // segment] = state
        state = blocks.forward(start, min(start + size, length), operands, state, y)
    return state


def _run_backward(
    blocks: Blocks,
    operands: Operands,
    starts: Tensor,
    grad_y: Tensor,
    grad_last: Tensor,
    gradients: Gradients,
) -> Tensor:
    """Fill the gradients of u and dt and add to the others, segment by segment from the last to
    the first; gradient of the state before the first."""
    length, size = len(operands.u), segment_length(grad_last.shape)
    for number in reversed(range(len(starts))):
        at = number * size, min((number + 1) * size, length)
        grad_last = blocks.backward(*at, operands, starts[number], grad_y, grad_last, gradients)
    return grad_last


# ---------------------------------------------------------------- orders of a map


def _rectangles(start: int, stop: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Positions start to stop of lines of `width` as rectangles (lines, places in a line)."""
    while start < stop:
        line, place = divmod(start, width)
        if place == 0 and stop - start >= width:
            lines, end = (stop - start) // width, width
        else:
            lines, end = 1, min(width, place + stop - start)
        yield slice(line, line + lines), slice(place, end)
        start += lines * (end - place)


def _parts(
    x: Tensor, direction: int, start: int, stop: int, sequence: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions start to stop of a direction as pairs of views of the map x [S, H, W, F] and of
    `sequence` [positions, S, F], both [lines, places, S, F].

    Of a reverse direction the view of the map runs the wrong way on both of its first axes.
    """
    lines = x if direction % 2 == 0 else x.transpose(1, 2)
    length, width = lines.shape[1] * lines.shape[2], lines.shape[2]
    is_reverse = direction >= 2
    first, last = (length - stop, length - start) if is_reverse else (start, stop)
    done = 0
    for rows, places in _rectangles(first, last, width):
        part = lines[:, rows, places].permute(1, 2, 0, 3)
        count = part.shape[0] * part.shape[1]
        begin = len(sequence) - done - count if is_reverse else done
        yield part, sequence[begin : begin + count].unflatten(0, part.shape[:2])
        done += count


def read_direction(x: Tensor, direction: int, start: int, stop: int, sequence: Tensor) -> None:
    """Copy positions start to stop of a direction from the map into `sequence`."""
    for part, place in _parts(x, direction, start, stop, sequence):
        place.copy_(part.flip(0, 1) if direction >= 2 else part)


def _add(x: Tensor, direction: int, start: int, stop: int, sequence: Tensor) -> None:
    """The adjoint of `read_direction`: add `sequence` to the map."""
    for part, place in _parts(x, direction, start, stop, sequence):
        part.add_(place.flip(0, 1) if direction >= 2 else place)


# ---------------------------------------------------------------- maps
#
# A strip is kept as [positions, S, 4, features], in memory that every strip uses again: touching
# fresh memory costs as much as the work on it.


def _strip_length(length: int, segment: int, position_floats: int) -> int:
    """Positions per strip: as many whole segments as STRIP_FLOATS allows, at least one."""
    strip = segment
    while strip < length and 2 * strip * position_floats <= STRIP_FLOATS:
        strip *= 2
    return min(strip, length)


def _per_channel(x: Tensor) -> Tensor:
    """A strip [positions, S, 4, D] as blocks take it, [positions, S, 4, 1, D]; a view."""
    return x.unsqueeze(3)


def _per_state(x: Tensor) -> Tensor:
    """A strip [positions, S, 4, N] as blocks take it, [positions, S, 4, N, 1]; a view."""
    return x.unsqueeze(4)


def _pre_softplus(r: Tensor, dt_weight: Tensor, dt_bias: Tensor, out: Tensor) -> None:
    """dt_weight r + dt_bias per direction: r [positions, S, 4, R], out [positions, S, 4, D]."""
    for k in range(DIRECTIONS):
        out_k, r_k = out[:, :, k].flatten(0, 1), r[:, :, k].flatten(0, 1)
        torch.addmm(dt_bias[k], r_k, dt_weight[k].mT, out=out_k)


def scan_2d_strips(
    read: Read,
    y: Tensor,
    A: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    keep_starts: bool = False,
) -> Tensor:
    """Add the four directions, without skip, to a map y `[S, H, W, D]`.

    Args:
        read: gives what a direction reads, see `Read`.  Positions are asked for in rising order,
            of all four directions in turn.
        A, dt_weight, dt_bias: `[4, D, N]`, `[4, D, R]`, `[4, D]`.
        keep_starts: whether to keep what the backward needs.

    Returns:
        If kept, the state before each segment `[segments, S, 4, N, D]`.
    """
    batch, height, width, channels = y.shape
    length, n, rank = height * width, A.shape[2], dt_weight.shape[2]
    state = y.new_zeros(batch, DIRECTIONS, n, channels)
    blocks = Blocks(A.mT.contiguous(), state, length, softplus=True)
    segment = segment_length(state.shape)
    starts = _alloc_starts(length, state, keep_starts)

    features = (channels, rank + 2 * n, channels, channels)
    per_strip = _strip_length(length, segment, batch * DIRECTIONS * sum(features))
    buffers = [y.new_empty(per_strip, batch, DIRECTIONS, count) for count in features]
    for start in range(0, length, max(per_strip, 1)):
        stop = min(start + per_strip, length)
        u, projections, dt, output = (buffer[: stop - start] for buffer in buffers)
        for k in range(DIRECTIONS):
            read(k, start, stop, u[:, :, k], projections[:, :, k])
        r, B, C = projections.split((rank, n, n), dim=3)
        _pre_softplus(r, dt_weight, dt_bias, out=dt)
        operands = Operands(_per_channel(u), _per_channel(dt), _per_state(B), _per_state(C))
        state = _run(blocks, operands, state, _per_channel(output), starts[start // segment :])
        for k in range(DIRECTIONS):
            _add(y, k, start, stop, output[:, :, k])
    return starts


def _reading(x: Tensor, proj: Tensor) -> Read:
    """Reads from a map and its projections in memory."""

    def read(direction: int, start: int, stop: int, u: Tensor, projections: Tensor) -> None:
        read_direction(x, direction, start, stop, u)
        read_direction(proj[:, :, :, direction], direction, start, stop, projections)

    return read


def scan_2d_forward(
    x: Tensor,
    proj: Tensor,
    A: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    skip: Tensor | None,
    keep_starts: bool,
) -> tuple[Tensor, Tensor]:
    """The sum of four directions and of the map times `skip`.

    Args:
        x: `[S, H, W, D]`.
        proj: `[S, H, W, 4, R + 2N]`.
        skip: `[D]`; none is 0.
        A, dt_weight, dt_bias, keep_starts: as in `scan_2d_strips`.

    Returns:
        y `[S, H, W, D]` and, if kept, the state before each segment `[segments, S, 4, N, D]`.
    """
    y = _skipped(x, skip)
    read = _reading(x, proj)
    return y, scan_2d_strips(read, y, A, dt_weight, dt_bias, keep_starts)


def _skipped(x: Tensor, skip: Tensor | None) -> Tensor:
    """A new map, what a skip connection adds to the output or, backwards, to the gradient of x."""
    y = x.new_zeros(x.shape)
    return y if skip is None else torch.mul(x, skip, out=y)


def scan_2d_backward(
    grad_y: Tensor,
    x: Tensor,
    proj: Tensor,
    A: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    skip: Tensor | None,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, proj, A, dt_weight, dt_bias and skip (0 of none) of `scan_2d_forward`."""
    batch, height, width, channels = x.shape
    length, n, rank = height * width, A.shape[2], dt_weight.shape[2]
    grad_x, grad_proj = _skipped(grad_y, skip), proj.new_zeros(proj.shape)
    grad_weight, grad_bias = x.new_zeros(dt_weight.shape), x.new_zeros(dt_bias.shape)
    grad_skip = x.new_zeros(channels)
    grad_state = starts.new_zeros(starts.shape[1:])
    grad_A = torch.zeros_like(grad_state)
    blocks = Blocks(A.mT.contiguous(), grad_state, length)
    segment = segment_length(grad_state.shape)
    read = _reading(x, proj)

    features = (channels, rank + 2 * n, channels, channels) * 2
    per_strip = _strip_length(length, segment, batch * DIRECTIONS * sum(features))
    buffers = [x.new_empty(per_strip, batch, DIRECTIONS, count) for count in features]
    for start in reversed(range(0, length, max(per_strip, 1))):
        stop = min(start + per_strip, length)
        u, projections, dt, grad_output, grad_u, grads, grad_dt, pre = (
            buffer[: stop - start] for buffer in buffers
        )
        for k in range(DIRECTIONS):
            read(k, start, stop, u[:, :, k], projections[:, :, k])
            read_direction(grad_y, k, start, stop, grad_output[:, :, k])
        if skip is not None:
            grad_skip += (u[:, :, 0] * grad_output[:, :, 0]).sum((0, 1))
        r, B, C = projections.split((rank, n, n), dim=3)
        grad_r, grad_B, grad_C = grads.zero_().split((rank, n, n), dim=3)
        _pre_softplus(r, dt_weight, dt_bias, out=pre)
        torch.ops.aten.softplus.out(pre, out=dt)
        grad_state = _run_backward(
            blocks,
            Operands(_per_channel(u), _per_channel(dt), _per_state(B), _per_state(C)),
            starts[start // segment :][: count_of(segment, stop - start)],
            _per_channel(grad_output),
            grad_state,
            Gradients(
                *(_per_channel(grad_u), _per_channel(grad_dt)),
                *(_per_state(grad_B), _per_state(grad_C), grad_A),
            ),
        )

        grad_pre = torch.ops.aten.softplus_backward(grad_dt, pre, 1, 20)  # F.softplus's defaults
        grad_bias += grad_pre.sum((0, 1))
        for k in range(DIRECTIONS):
            grad_pre_k, r_k = grad_pre[:, :, k].flatten(0, 1), r[:, :, k].flatten(0, 1)
            grad_weight[k] += _product_over_positions(grad_pre_k, r_k)
            grad_r[:, :, k] = (grad_pre_k @ dt_weight[k]).view(grad_r[:, :, k].shape)
            _add(grad_x, k, start, stop, grad_u[:, :, k])
            _add(grad_proj[:, :, :, k], k, start, stop, grads[:, :, k])
    return grad_x, grad_proj, grad_A.sum(0).mT.contiguous(), grad_weight, grad_bias, grad_skip


def _product_over_positions(x: Tensor, y: Tensor) -> Tensor:
    """x^T y for x [positions, D] and y [positions, R], from short products, which round less."""
    whole = len(x) // PRODUCT_LENGTH * PRODUCT_LENGTH
    x_pieces, y_pieces = (z[:whole].unflatten(0, (-1, PRODUCT_LENGTH)) for z in (x, y))
    return (x_pieces.mT @ y_pieces).sum(0) + x[whole:].mT @ y[whole:]

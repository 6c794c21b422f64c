"""The scans of the backend `chunked`, block by block; `blocks.py` explains the method.

`scan_*` takes sequences whose time steps are known. `scan_2d_*` takes a map and its projections
and forms, for one block at a time, the four sequences and their time steps, so that the map is
never copied four times. Types: all arguments of a call share one, fp32 or fp64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cmamba_ref.ops.blocks import Block, Scratch, backward_block, forward_block, plan


def scan_forward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence without skip, gate and bias.

    Args:
        u, dt: `[L, S, G, D]`.
        A: `[N, G, D]`.
        B, C: `[L, N, S, G, 1]` varying or `[1, N, 1, G, D]` constant.
        initial_state: `[N, S, G, D]`.

    Returns:
        y `[L, S, G, D]`, last state `[N, S, G, D]`, state before each block `[blocks, N, S, G, D]`.
    """
    blocks = plan(len(u), initial_state.numel())
    scratch = Scratch(u, 2, blocks, initial_state.shape)
    u, dt, A = u.contiguous().unsqueeze(1), dt.contiguous().unsqueeze(1), A[None, :, None, None]
    y = torch.empty_like(u)
    starts = u.new_empty(len(blocks), *initial_state.shape)

    state = initial_state
    for block, start in zip(blocks, starts, strict=True):
        start.copy_(state)
        dt_, B_, C_ = block.view(dt), block.view(B), block.view(C)
        dtu = dt_ * block.view(u)
        y_, state = forward_block(dt_, dtu, A, B_, C_, start, scratch.buffers(block))
        block.view(y).copy_(y_)
    return y.squeeze(1), state, starts


def scan_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C and initial_state of `scan_forward`."""
    blocks = plan(len(u), grad_last.numel())
    scratch = Scratch(u, 3, blocks, grad_last.shape)
    u, dt, A = u.contiguous().unsqueeze(1), dt.contiguous().unsqueeze(1), A[None, :, None, None]
    grad_y = grad_y.contiguous().unsqueeze(1)
    grad_u, grad_dt = torch.empty_like(u), torch.empty_like(dt)
    grad_A = torch.zeros_like(grad_last)
    # Not zeros_like: the operator's results are contiguous whatever the strides of its arguments.
    grad_B, grad_C = B.new_zeros(B.shape), C.new_zeros(C.shape)

    for block, start in zip(reversed(blocks), starts.flip(0), strict=True):
        u_, dt_, B_, C_ = block.view(u), block.view(dt), block.view(B), block.view(C)
        grads = backward_block(
            block.view(grad_y), grad_last, dt_, dt_ * u_, A, B_, C_, start, scratch.buffers(block)
        )
        torch.mul(grads.dtu, dt_, out=block.view(grad_u))
        torch.addcmul(grads.dt, grads.dtu, u_, out=block.view(grad_dt))
        grad_A += grads.A.sum(1)
        block.view(grad_B).add_(grads.B)
        block.view(grad_C).add_(grads.C)
        grad_last = grads.first
    return grad_u.squeeze(1), grad_dt.squeeze(1), grad_A.sum(1), grad_B, grad_C, grad_last


def _both_orders(x: Tensor) -> Tensor:
    """A map [S, H, W, F] in row-major and in column-major order: [L, S, 2, F]."""
    rows = x.permute(1, 2, 0, 3).flatten(0, 1)
    columns = x.permute(2, 1, 0, 3).flatten(0, 1)
    return torch.stack((rows, columns), dim=2)


def _to_map(x: Tensor, height: int, width: int) -> Tensor:
    """The inverse: the sum over both orders of x [L, S, 2, F], as a map [S, H, W, F]."""
    rows = x[:, :, 0].unflatten(0, (height, width)).permute(2, 0, 1, 3)
    columns = x[:, :, 1].unflatten(0, (width, height)).permute(2, 1, 0, 3)
    return (rows + columns).contiguous()


def _gather(x: Tensor, block: Block) -> Tensor:
    """A block of all four directions [steps, 1, chunks, S, 4, F] from both orders [L, S, 2, F]."""
    opposite = slice(len(x) - block.stop, len(x) - block.start)
    four = torch.cat((x[block.start : block.stop], x[opposite].flip(0)), dim=2)
    return block.split(four.unsqueeze(1))


def _scatter_add(total: Tensor, x: Tensor, block: Block) -> None:
    """The adjoint of `_gather`: adds x [steps, 1, chunks, S, 4, F] to total [L, S, 2, F]."""
    four = x.squeeze(1).movedim(1, 0).flatten(0, 1)
    opposite = slice(len(total) - block.stop, len(total) - block.start)
    total[block.start : block.stop] += four[:, :, :2]
    total[opposite] += four[:, :, 2:].flip(0)


def _projections(proj: Tensor) -> Tensor:
    """Projections [S, H, W, 4, F] in the order of each direction: [L, S, 4, F]."""
    forward, backward = proj.split(2, dim=3)
    orders = []
    for pair in (forward, backward):
        rows = pair[:, :, :, 0].permute(1, 2, 0, 3).flatten(0, 1)
        columns = pair[:, :, :, 1].permute(2, 1, 0, 3).flatten(0, 1)
        orders.append(torch.stack((rows, columns), dim=2))
    return torch.cat((orders[0], orders[1].flip(0)), dim=2)


def _projections_to_map(x: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `_projections`: [L, S, 4, F] to [S, H, W, 4, F]."""
    reverse = x.flip(0)
    rows = torch.stack((x[:, :, 0], reverse[:, :, 2])).unflatten(1, (height, width))
    columns = torch.stack((x[:, :, 1], reverse[:, :, 3])).unflatten(1, (width, height))
    # [2, H, W, S, F] and [2, W, H, S, F], to be interleaved as directions 0, 1, 2, 3.
    both = torch.stack((rows, columns.transpose(1, 2)), dim=1).flatten(0, 1)
    return both.permute(3, 1, 2, 0, 4).contiguous()


def _split(projections: Tensor, rank: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """r [L, 1, S, 4, R] and, as a block takes them, B and C [L, N, S, 4, 1]; views."""
    r, B, C = projections.split((rank, n, n), dim=-1)
    return r.unsqueeze(1), B.movedim(-1, 1).unsqueeze(-1), C.movedim(-1, 1).unsqueeze(-1)


def _by_direction(x: Tensor) -> Tensor:
    """x [steps, 1, chunks, S, 4, F] as [4, positions, F], for matrix products per direction."""
    return x.movedim(4, 0).flatten(1, 4)


def _pre_softplus(r: Tensor, dt_weight: Tensor, dt_bias: Tensor) -> Tensor:
    """dt_weight r + dt_bias per direction, [steps, 1, chunks, S, 4, D]."""
    product = torch.baddbmm(dt_bias.unsqueeze(1), _by_direction(r), dt_weight.mT)
    return product.unflatten(1, r.shape[:4]).movedim(0, 4).contiguous()


def scan_2d_forward(
    x: Tensor, proj: Tensor, A: Tensor, dt_weight: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The sum of four directions without skip.

    Args:
        x: `[S, H, W, D]`.
        proj: `[S, H, W, 4, R + 2N]`.
        A, dt_weight, dt_bias: `[4, D, N]`, `[4, D, R]`, `[4, D]`.

    Returns:
        y `[S, H, W, D]` and the state before each block `[blocks, N, S, 4, D]`.
    """
    batch, height, width, channels = x.shape
    rank, n = dt_weight.shape[2], A.shape[2]
    state = x.new_zeros(n, batch, 4, channels)
    blocks = plan(height * width, state.numel())
    scratch = Scratch(x, 2, blocks, state.shape)
    inputs = _both_orders(x)
    r, B, C = _split(_projections(proj), rank, n)
    A = A.permute(2, 0, 1)[None, :, None, None].contiguous()
    total = torch.zeros_like(inputs)
    starts = x.new_empty(len(blocks), *state.shape)

    for block, start in zip(blocks, starts, strict=True):
        start.copy_(state)
        dt = F.softplus(_pre_softplus(block.view(r), dt_weight, dt_bias))
        dtu = dt * _gather(inputs, block)
        B_, C_ = block.view(B), block.view(C)
        y, state = forward_block(dt, dtu, A, B_, C_, start, scratch.buffers(block))
        _scatter_add(total, y, block)
    return _to_map(total, height, width), starts


def scan_2d_backward(
    grad_y: Tensor,
    x: Tensor,
    proj: Tensor,
    A: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, proj, A, dt_weight and dt_bias of `scan_2d_forward`."""
    height, width = x.shape[1:3]
    rank, n = dt_weight.shape[2], A.shape[2]
    grad_last = torch.zeros_like(starts[0])
    blocks = plan(height * width, grad_last.numel())
    scratch = Scratch(x, 3, blocks, grad_last.shape)
    inputs, grad_outputs = _both_orders(x), _both_orders(grad_y)
    projections = _projections(proj)
    r, B, C = _split(projections, rank, n)
    A = A.permute(2, 0, 1)[None, :, None, None].contiguous()
    grad_inputs = torch.zeros_like(inputs)
    grad_projections = torch.empty_like(projections)
    grad_r, grad_B, grad_C = _split(grad_projections, rank, n)
    grad_A = torch.zeros_like(grad_last)
    grad_weight, grad_bias = x.new_zeros(dt_weight.shape), x.new_zeros(dt_bias.shape)

    for block, start in zip(reversed(blocks), starts.flip(0), strict=True):
        r_, B_, C_ = block.view(r), block.view(B), block.view(C)
        pre = _pre_softplus(r_, dt_weight, dt_bias)
        dt, u = F.softplus(pre), _gather(inputs, block)
        dy = _gather(grad_outputs, block)
        grads = backward_block(dy, grad_last, dt, dt * u, A, B_, C_, start, scratch.buffers(block))
        grad_last = grads.first
        grad_A += grads.A.sum(1)
        block.view(grad_B).copy_(grads.B)
        block.view(grad_C).copy_(grads.C)
        _scatter_add(grad_inputs, grads.dtu * dt, block)

        grad_dt = grads.dt.addcmul_(grads.dtu, u)
        grad_pre = torch.ops.aten.softplus_backward(grad_dt, pre, 1, 20)  # F.softplus's defaults
        grad_pre = _by_direction(grad_pre)
        grad_bias += grad_pre.sum(1)
        # One product per step, then a sum: a product over all positions would round more.
        r_steps = _by_direction(r_).unflatten(1, (block.steps, -1))
        grad_pre_steps = grad_pre.unflatten(1, (block.steps, -1))
        grad_weight += (grad_pre_steps.mT @ r_steps).sum(1)
        grad_r_ = (grad_pre @ dt_weight).unflatten(1, r_.shape[:4]).movedim(0, 4)
        block.view(grad_r).copy_(grad_r_)
    return (
        _to_map(grad_inputs, height, width),
        _projections_to_map(grad_projections, height, width),
        grad_A.sum(1).permute(1, 2, 0).contiguous(),
        grad_weight,
        grad_bias,
    )

"""Registration of the chunked scans with torch.library: autograd, fake tensors, autocast.

The public functions prepare their arguments in ordinary PyTorch; a compiler or an exporter sees
each scan as one opaque operator. Both operators also return the state before each segment, which
their backward needs; without gradients nobody does, and they return none.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cmamba_ref.ops import chunked
from cmamba_ref.ops.blocks import count_of, segment_length


@torch.library.custom_op("cmamba::chunked_scan", mutates_args=())
def chunked_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor,
    keep_starts: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`chunked.scan_forward` as an operator: (y, last state, segment starts)."""
    return chunked.scan_forward(u, dt, A, B, C, initial_state, keep_starts)


@torch.library.custom_op("cmamba::chunked_scan_backward", mutates_args=())
def chunked_scan_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`chunked.scan_backward` as an operator: gradients of u, dt, A, B, C, initial_state."""
    return chunked.scan_backward(grad_y, grad_last, u, dt, A, B, C, starts)


@torch.library.custom_op("cmamba::chunked_scan_2d", mutates_args=())
def chunked_scan_2d(
    x: Tensor,
    proj: Tensor,
    A: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    skip: Tensor | None,
    keep_starts: bool,
) -> tuple[Tensor, Tensor]:
    """`chunked.scan_2d_forward` as an operator: (y, segment starts)."""
    return chunked.scan_2d_forward(x, proj, A, dt_weight, dt_bias, skip, keep_starts)


@torch.library.custom_op("cmamba::chunked_scan_2d_backward", mutates_args=())
def chunked_scan_2d_backward(
    grad_y: Tensor,
    x: Tensor,
    proj: Tensor,
    A: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    skip: Tensor | None,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`chunked.scan_2d_backward` as an operator: gradients of the tensors of `chunked_scan_2d`."""
    return chunked.scan_2d_backward(grad_y, x, proj, A, dt_weight, dt_bias, skip, starts)


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous fake tensors of the same shapes."""
    return tuple(x.new_empty(x.shape) for x in tensors)


def _starts(length: int, state: Sequence[int], keep_starts: bool) -> tuple[int, ...]:
    """Shape of the states before each segment."""
    return count_of(segment_length(state), length) if keep_starts else 0, *state


@chunked_scan.register_fake
def _(u, dt, A, B, C, initial_state, keep_starts):
    starts = _starts(u.shape[0], initial_state.shape, keep_starts)
    return *_like(u, initial_state), u.new_empty(starts)


@chunked_scan_backward.register_fake
def _(grad_y, grad_last, u, dt, A, B, C, starts):
    return _like(u, dt, A, B, C, grad_last)


@chunked_scan_2d.register_fake
def _(x, proj, A, dt_weight, dt_bias, skip, keep_starts):
    batch, height, width, channels = x.shape
    state = (batch, 4, A.shape[2], channels)
    return *_like(x), x.new_empty(_starts(height * width, state, keep_starts))


@chunked_scan_2d_backward.register_fake
def _(grad_y, x, proj, A, dt_weight, dt_bias, skip, starts):
    return *_like(x, proj, A, dt_weight, dt_bias), x.new_empty(x.shape[3])


def _save(ctx, inputs, output):
    starts = output[2]
    ctx.mark_non_differentiable(starts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], starts)


def _differentiate(ctx, grad_y, grad_last, _):
    u, *_, starts = ctx.saved_tensors
    if grad_y is None and grad_last is None:
        return (None,) * 7
    if grad_y is None:
        grad_y = u.new_zeros(u.shape)
    if grad_last is None:
        grad_last = starts.new_zeros(starts.shape[1:])
    grads = chunked_scan_backward(grad_y, grad_last, *ctx.saved_tensors)
    return *grads, None


def _save_2d(ctx, inputs, output):
    starts = output[1]
    ctx.mark_non_differentiable(starts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], starts)


def _differentiate_2d(ctx, grad_y, _):
    if grad_y is None:
        return (None,) * 7
    *grads, grad_skip = chunked_scan_2d_backward(grad_y, *ctx.saved_tensors)
    has_skip = ctx.needs_input_grad[5]
    return *grads, grad_skip if has_skip else None, None


def _refuse_second_derivative(ctx, *grads):
    raise NotImplementedError(
        "the chunked scan has no second derivative; use backend='reference' for double backward"
    )


chunked_scan.register_autograd(_differentiate, setup_context=_save)
chunked_scan_2d.register_autograd(_differentiate_2d, setup_context=_save_2d)
for _operator in (chunked_scan_backward, chunked_scan_2d_backward):
    _operator.register_autograd(_refuse_second_derivative)

# Under autocast the operators still compute in fp32 (fp64 arguments stay as they are).
for _operator in (chunked_scan, chunked_scan_backward, chunked_scan_2d, chunked_scan_2d_backward):
    for _device in ("cpu", "cuda"):
        _operator.register_autocast(_device, torch.float32)

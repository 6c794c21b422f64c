"""Registration of the chunked scan with torch.library: autograd, fake tensors, autocast.

The public functions prepare their arguments in ordinary PyTorch and call `chunked_scan`, which a
compiler or an exporter sees as one opaque operator.
"""

import torch
from torch import Tensor

from cmamba_ref.ops import chunked


@torch.library.custom_op("cmamba::chunked_scan", mutates_args=())
def chunked_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`chunked.scan_forward` as an operator: (y, last state, states before each block)."""
    return chunked.scan_forward(u, dt, A, B, C, initial_state)


@chunked_scan.register_fake
def _(u, dt, A, B, C, initial_state):
    blocks = chunked.block_count(u.shape[0], initial_state.numel())
    y = u.new_empty(u.shape)
    last_state = u.new_empty(initial_state.shape)
    return y, last_state, u.new_empty(blocks, *initial_state.shape)


@torch.library.custom_op("cmamba::chunked_scan_backward", mutates_args=())
def chunked_scan_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    block_starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`chunked.scan_backward` as an operator: gradients of u, dt, A, B, C, initial_state."""
    return chunked.scan_backward(grad_y, grad_last, u, dt, A, B, C, block_starts)


@chunked_scan_backward.register_fake
def _(grad_y, grad_last, u, dt, A, B, C, block_starts):
    first_state = u.new_empty(grad_last.shape)
    return (*(u.new_empty(x.shape) for x in (u, dt, A, B, C)), first_state)


def _save(ctx, inputs, output):
    u, dt, A, B, C, _ = inputs
    block_starts = output[2]
    ctx.mark_non_differentiable(block_starts)
    ctx.save_for_backward(u, dt, A, B, C, block_starts)


def _differentiate(ctx, grad_y, grad_last, _):
    return chunked_scan_backward(grad_y, grad_last, *ctx.saved_tensors)


def _refuse_second_derivative(ctx, *grads):
    raise NotImplementedError(
        "the chunked scan has no second derivative; use backend='reference' for double backward"
    )


chunked_scan.register_autograd(_differentiate, setup_context=_save)
chunked_scan_backward.register_autograd(_refuse_second_derivative)

# The operators compute in the type they are given, which the callers made fp32 or fp64.
for _device in ("cpu", "cuda"):
    chunked_scan.register_autocast(_device, torch.float32)
    chunked_scan_backward.register_autocast(_device, torch.float32)

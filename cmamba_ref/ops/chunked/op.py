"""The backend `chunked`: public shapes in and out, around operators registered with torch.library.

A compiler or an exporter sees each scan as one opaque operator; eager code calls the same as an
`autograd.Function`, see `function.py`. All else here is ordinary differentiable PyTorch. Both scans
also return the state before each segment, which their backward needs; without gradients nobody
does, and they return none.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cmamba_ref.ops.chunked import scan
from cmamba_ref.ops.chunked.recurrence import count_of, segment_length
from cmamba_ref.ops.function import as_function, is_plain
from cmamba_ref.ops.reference import compute_dtype
from cmamba_ref.ops.validation import Scan2dInputs, ScanInputs, sequence_begins

# ---------------------------------------------------------------- operators


_operator = partial(torch.library.custom_op, mutates_args=())
chunked_scan = _operator("cmamba::chunked_scan", scan.scan_forward)
chunked_scan_backward = _operator("cmamba::chunked_scan_backward", scan.scan_backward)
chunked_scan_2d = _operator("cmamba::chunked_scan_2d", scan.scan_2d_forward)
chunked_scan_2d_backward = _operator("cmamba::chunked_scan_2d_backward", scan.scan_2d_backward)


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous fake tensors of the same shapes."""
    return tuple(x.new_empty(x.shape) for x in tensors)


def _starts(length: int, state: Sequence[int], keep_starts: bool) -> tuple[int, ...]:
    """Shape of the states before each segment."""
    return count_of(segment_length(state), length) if keep_starts else 0, *state


@chunked_scan.register_fake
def _(u, dt, A, B, C, initial_state, begins, keep_starts):
    starts = _starts(u.shape[0], initial_state.shape, keep_starts)
    return *_like(u, initial_state), u.new_empty(starts)


@chunked_scan_backward.register_fake
def _(grad_y, grad_last, u, dt, A, B, C, begins, starts):
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
    *tensors, _, begins, _ = inputs
    starts = output[2]
    ctx.mark_non_differentiable(starts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, begins, starts)


def _differentiate(backward, ctx, grad_y, grad_last, _):
    if grad_y is None and grad_last is None:
        return (None,) * 8
    saved = ctx.saved_tensors  # once: hooks may allow no more
    u, *_, starts = saved
    if grad_y is None:
        grad_y = u.new_zeros(u.shape)
    if grad_last is None:
        grad_last = starts.new_zeros(starts.shape[1:])
    return *backward(grad_y, grad_last, *saved), None, None


def _save_2d(ctx, inputs, output):
    starts = output[1]
    ctx.mark_non_differentiable(starts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], starts)


def _differentiate_2d(backward, ctx, grad_y, _):
    if grad_y is None:
        return (None,) * 7
    *grads, grad_skip = backward(grad_y, *ctx.saved_tensors)
    has_skip = ctx.needs_input_grad[5]
    return *grads, grad_skip if has_skip else None, None


def _refuse_second_derivative(ctx, *grads):
    raise NotImplementedError(
        "the chunked scan has no second derivative; use backend='reference' for double backward"
    )


chunked_scan.register_autograd(partial(_differentiate, chunked_scan_backward), setup_context=_save)
chunked_scan_2d.register_autograd(
    partial(_differentiate_2d, chunked_scan_2d_backward), setup_context=_save_2d
)
for _op in (chunked_scan_backward, chunked_scan_2d_backward):
    _op.register_autograd(_refuse_second_derivative)

# Under autocast the operators still compute in fp32 (fp64 arguments stay as they are).
for _op in (chunked_scan, chunked_scan_backward, chunked_scan_2d, chunked_scan_2d_backward):
    for _device in ("cpu", "cuda"):
        _op.register_autocast(_device, torch.float32)

_scan_backward = as_function("ChunkedScanBackward", scan.scan_backward, _refuse_second_derivative)
_scan_2d_backward = as_function(
    "ChunkedScan2dBackward", scan.scan_2d_backward, _refuse_second_derivative
)
_scan = as_function(
    "ChunkedScan", scan.scan_forward, partial(_differentiate, _scan_backward), _save
)
_scan_2d = as_function(
    "ChunkedScan2d", scan.scan_2d_forward, partial(_differentiate_2d, _scan_2d_backward), _save_2d
)


# ---------------------------------------------------------------- the backend


def _operand(x: Tensor, groups: int) -> Tensor:
    """B or C in any accepted form as the operator takes it: `[L or 1, B or 1, G, N, 1 or D/G]`."""
    if x.dim() == 2:  # [D, N], constant
        return x.unflatten(0, (groups, -1)).mT[None, None]
    if x.dim() == 3:  # [B, N, L], one group
        x = x.unsqueeze(1).expand(-1, groups, -1, -1)
    elif x.shape[1] != groups:
        x = x.expand(-1, groups, -1, -1)
    return x.permute(3, 0, 1, 2).unsqueeze(-1)


def _group_count(B: Tensor, C: Tensor) -> int:
    """Groups that B and C share: each has its own count, or one group for all channels."""
    return max(B.shape[1] if B.dim() == 4 else 1, C.shape[1] if C.dim() == 4 else 1)


def selective_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Output `[B, D, L]` in u's type and last state `[B, D, N]` in the compute type."""
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx = inputs
    dtype = compute_dtype(u.dtype)
    batch, channels, length = u.shape
    n, groups = A.shape[1], _group_count(B, C)
    per_group = (groups, channels // groups)

    u_ = u.to(dtype).permute(2, 0, 1)  # [L, B, D]
    dt = delta.to(dtype).permute(2, 0, 1)
    if delta_bias is not None:
        dt = dt + delta_bias
    if delta_softplus:
        dt = F.softplus(dt)
    if initial_state is None:
        state = u_.new_zeros(batch, groups, n, channels // groups)
    else:
        state = initial_state.to(dtype).unflatten(1, per_group).mT

    run = _scan if is_plain(u) else chunked_scan
    y, last_state, _ = run(
        u_.unflatten(2, per_group),
        dt.unflatten(2, per_group),
        A.unflatten(0, per_group).mT,
        _operand(B.to(dtype), groups),
        _operand(C.to(dtype), groups),
        state,
        None if seq_idx is None else sequence_begins(seq_idx).mT,
        torch.is_grad_enabled(),
    )
    y = y.flatten(2)
    if D is not None:
        y = y + D * u_
    y = y.permute(1, 2, 0)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype).contiguous(), last_state.mT.flatten(1, 2)


def selective_scan_2d(inputs: Scan2dInputs) -> Tensor:
    """Sum of the four directions `[B, H, W, D]` in x's type."""
    x, proj, A, dt_weight, dt_bias, D = inputs
    dtype = compute_dtype(x.dtype)
    run = _scan_2d if is_plain(x) else chunked_scan_2d
    skip = None if D is None else D.sum(0)
    keep_starts = torch.is_grad_enabled()
    y, _ = run(x.to(dtype), proj.to(dtype), A, dt_weight, dt_bias, skip, keep_starts)
    return y.to(x.dtype)

"""The backend `chunked`: public shapes in and out, the operator in between.

Everything here is ordinary differentiable PyTorch; only the recurrence is a custom operator.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmamba_ref.ops import chunked
from cmamba_ref.ops.library import chunked_scan, chunked_scan_2d
from cmamba_ref.ops.reference import compute_dtype


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


def _unobserved(x: Tensor) -> bool:
    """Whether a scan of x may do without its operator: no gradient, no compiler, no exporter.

    The first call of an operator imports torch._dynamo, which takes longer than to encode a
    photograph. On the CPU only, where a command is short enough for it to matter.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and type(x) in (Tensor, nn.Parameter)  # not a fake tensor, for instance
    )


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output `[B, D, L]` in u's type and last state `[B, D, N]` in the compute type."""
    dtype = compute_dtype(u.dtype)
    batch, channels, length = u.shape
    n, groups = A.shape[1], _group_count(B, C)
    per_group = (groups, channels // groups)

    inputs = u.to(dtype).permute(2, 0, 1)  # [L, B, D]
    dt = delta.to(dtype).permute(2, 0, 1)
    if delta_bias is not None:
        dt = dt + delta_bias
    if delta_softplus:
        dt = F.softplus(dt)
    if initial_state is None:
        state = inputs.new_zeros(batch, groups, n, channels // groups)
    else:
        state = initial_state.to(dtype).unflatten(1, per_group).mT

    y, last_state, _ = chunked_scan(
        inputs.unflatten(2, per_group),
        dt.unflatten(2, per_group),
        A.unflatten(0, per_group).mT,
        _operand(B.to(dtype), groups),
        _operand(C.to(dtype), groups),
        state,
        torch.is_grad_enabled(),
    )
    y = y.flatten(2)
    if D is not None:
        y = y + D * inputs
    y = y.permute(1, 2, 0)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype).contiguous(), last_state.mT.flatten(1, 2)


def selective_scan_2d(
    x: Tensor,
    proj: Tensor,
    A: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    D: Tensor | None,
) -> Tensor:
    """Sum of the four directions `[B, H, W, D]` in x's type."""
    dtype = compute_dtype(x.dtype)
    inputs = x.to(dtype)
    scan = chunked.scan_2d_forward if _unobserved(x) else chunked_scan_2d
    skip = None if D is None else D.sum(0)
    keep_starts = torch.is_grad_enabled()
    y, _ = scan(inputs, proj.to(dtype), A, dt_weight, dt_bias, skip, keep_starts)
    return y.to(x.dtype)

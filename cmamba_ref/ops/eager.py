"""The backend `chunked`: public shapes in and out, the chunked operator in between.

Everything here is ordinary differentiable PyTorch; only the recurrence is a custom operator.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cmamba_ref.ops.library import chunked_scan
from cmamba_ref.ops.reference import compute_dtype


def _operand(x: Tensor, groups: int) -> Tensor:
    """B or C in any accepted form as the operator takes it: `[L or 1, N, B or 1, G, 1 or D/G]`."""
    if x.dim() == 2:  # [D, N], constant
        return x.T.reshape(1, x.shape[1], 1, groups, -1)
    if x.dim() == 3:  # [B, N, L], one group
        x = x.unsqueeze(1).expand(-1, groups, -1, -1)
    elif x.shape[1] != groups:
        x = x.expand(-1, groups, -1, -1)
    return x.permute(3, 2, 0, 1).unsqueeze(-1)


def _group_count(B: Tensor, C: Tensor) -> int:
    """Groups that B and C share: each has its own count, or one group for all channels."""
    return max(B.shape[1] if B.dim() == 4 else 1, C.shape[1] if C.dim() == 4 else 1)


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
        state = inputs.new_zeros(n, batch, *per_group)
    else:
        state = initial_state.to(dtype).permute(2, 0, 1).unflatten(2, per_group)

    y, last_state, _ = chunked_scan(
        inputs.unflatten(2, per_group),
        dt.unflatten(2, per_group),
        A.T.unflatten(1, per_group),
        _operand(B.to(dtype), groups),
        _operand(C.to(dtype), groups),
        state,
    )
    y = y.flatten(2)
    if D is not None:
        y = y + D * inputs
    y = y.permute(1, 2, 0)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype).contiguous(), last_state.flatten(2).permute(1, 2, 0)


def _sequences(rows: Tensor, columns: Tensor, backward_rows: Tensor, backward_columns: Tensor):
    """Four maps [B, H, W, F], one per direction, as sequences [H*W, B, 4, F]."""
    along_rows = [x.permute(1, 2, 0, 3).flatten(0, 1) for x in (rows, backward_rows)]
    along_columns = [x.permute(2, 1, 0, 3).flatten(0, 1) for x in (columns, backward_columns)]
    return torch.stack(
        (along_rows[0], along_columns[0], along_rows[1].flip(0), along_columns[1].flip(0)), dim=2
    )


def selective_scan_2d(
    x: Tensor, proj: Tensor, A: Tensor, dt_weight: Tensor, dt_bias: Tensor, D: Tensor | None
) -> Tensor:
    """The four directions as four groups of one scan, then summed on the map."""
    dtype = compute_dtype(x.dtype)
    height, width = x.shape[1:3]
    rank, n = dt_weight.shape[-1], A.shape[-1]

    inputs = x.to(dtype)
    sequences = _sequences(inputs, inputs, inputs, inputs)  # [L, B, 4, D]
    r, B, C = _sequences(*proj.to(dtype).unbind(3)).split((rank, n, n), dim=-1)
    dt = F.softplus(torch.einsum("lbkr,kdr->lbkd", r, dt_weight) + dt_bias)

    state = inputs.new_zeros(n, x.shape[0], *A.shape[:2])
    y, _, _ = chunked_scan(
        sequences,
        dt,
        A.permute(2, 0, 1),
        B.permute(0, 3, 1, 2).unsqueeze(-1),
        C.permute(0, 3, 1, 2).unsqueeze(-1),
        state,
    )
    rows = y[:, :, 0] + y[:, :, 2].flip(0)  # [L, B, D], row-major
    columns = y[:, :, 1] + y[:, :, 3].flip(0)  # [L, B, D], column-major
    total = rows.unflatten(0, (height, width)).permute(2, 0, 1, 3)
    total = total + columns.unflatten(0, (width, height)).permute(2, 1, 0, 3)
    if D is not None:
        total = total + D.sum(0) * inputs
    return total.to(x.dtype).contiguous()

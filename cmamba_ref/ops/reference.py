"""The literal recurrence: slow, readable, any device, plain autograd. The oracle of all backends.

Equation (discretised state-space model, Gu and Dao 2023, arXiv:2312.00752, with B discretised by
Euler's rule as in their code):

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t
    y_t = <C_t, h_t> + D u_t
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cmamba_ref.ops.validation import Scan2dInputs, ScanInputs


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type a scan computes in: fp64 for fp64, fp32 for everything else."""
    return torch.promote_types(dtype, torch.float32)


def _per_channel(x: Tensor, channels: int) -> Tensor:
    """B or C in any accepted form as [1 or B, D, N, 1 or L]."""
    if x.dim() == 2:  # constant, one row per channel
        return x[None, :, :, None]
    if x.dim() == 3:  # one group
        x = x.unsqueeze(1)
    return x.repeat_interleave(channels // x.shape[1], dim=1)


def selective_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Output `[B, D, L]` in u's type and last state `[B, D, N]` in the compute type."""
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx = inputs
    dtype = compute_dtype(u.dtype)
    batch, channels, length = u.shape
    io_dtype = u.dtype
    u, dt, A = u.to(dtype), delta.to(dtype), A.to(dtype)
    B, C = _per_channel(B.to(dtype), channels), _per_channel(C.to(dtype), channels)
    B, C = B.expand(-1, -1, -1, length), C.expand(-1, -1, -1, length)

    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)

    state = u.new_zeros(batch, channels, A.shape[1])
    if initial_state is not None:
        state = initial_state.to(dtype)
    outputs = []
    for t in range(length):
        dt_t, u_t = dt[:, :, t, None], u[:, :, t, None]
        if seq_idx is not None and t > 0:
            goes_on = seq_idx[:, t] == seq_idx[:, t - 1]
            state = torch.where(goes_on[:, None, None], state, 0)
        state = torch.exp(dt_t * A) * state + dt_t * B[..., t] * u_t
        outputs.append((C[..., t] * state).sum(-1))
    y = torch.stack(outputs, dim=-1)

    if D is not None:
        y = y + D.to(dtype)[:, None] * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(io_dtype), state


def selective_scan_2d(inputs: Scan2dInputs) -> Tensor:
    """Sum of four 1-D scans over the map, each over an explicitly permuted sequence."""
    x, proj, A, dt_weight, dt_bias, D = inputs
    dtype = compute_dtype(x.dtype)
    batch, height, width, channels = x.shape
    rank, n = dt_weight.shape[-1], A.shape[-1]

    row_major = torch.arange(height * width, device=x.device)
    column_major = row_major.view(height, width).t().reshape(-1)
    orders = (row_major, column_major, row_major.flip(0), column_major.flip(0))

    positions = x.to(dtype).reshape(batch, height * width, channels)  # [B, L, D]
    projections = proj.to(dtype).reshape(batch, height * width, 4, rank + 2 * n)
    total = torch.zeros_like(positions)
    for k, order in enumerate(orders):
        r, B, C = projections[:, order, k].split((rank, n, n), dim=-1)  # [B, L, R], 2x [B, L, N]
        # W r as products and a sum: autocast would run the backward of a matmul in 16 bits.
        delta = (r.unsqueeze(2) * dt_weight[k].to(dtype)).sum(-1)
        of_direction = ScanInputs(
            u=positions[:, order].mT,
            delta=delta.mT,
            A=A[k],
            B=B.mT,
            C=C.mT,
            D=None if D is None else D[k],
            z=None,
            delta_bias=dt_bias[k],
            delta_softplus=True,
            initial_state=None,
        )
        y, _ = selective_scan(of_direction)
        # Position order[i] of the map is step i of the scan, so its inverse puts y back.
        total = total + y.mT[:, order.argsort()]
    return total.view(x.shape).to(x.dtype)

"""The backend `triton`: public shapes in and out, the operator in between.

Everything here is ordinary differentiable PyTorch. What a caller has with channels last anyway is
not copied; a 1-D scan of `[B, D, L]` that is contiguous in L is turned around once.
"""

from typing import Any

import torch
from torch import Tensor

from cmamba_ref.ops.function import is_plain
from cmamba_ref.ops.validation import sequence_begins

from .op import eager_scan, triton_scan


def _sequence(x: Tensor) -> Tensor:
    """`[B, D, L]` as a map of one row `[B, 1, L, D]`."""
    return x.mT.unsqueeze(1)


def _operand(x: Tensor, groups: int) -> Tensor:
    """B or C in any accepted form: constant `[N, D]` or varying `[B, 1, L, G, N]`."""
    if x.dim() == 2:  # [D, N]
        return x.T
    if x.dim() == 3:  # [B, N, L], one group
        x = x.unsqueeze(1)
    return x.expand(-1, groups, -1, -1).permute(0, 3, 1, 2).unsqueeze(1)


def _scan(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Call the operator with contiguous tensors, so that the backward need not copy again."""
    run = eager_scan if is_plain(x) else triton_scan
    return run(*(a.contiguous() if isinstance(a, Tensor) else a for a in (x, *others)))


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
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output `[B, D, L]` in u's type and last state `[B, D, N]` in the compute type."""
    groups = max(x.shape[1] if x.dim() == 4 else 1 for x in (B, C))
    zeros = A.new_zeros(len(A))
    y, last_state, _ = _scan(
        _sequence(u),
        _sequence(delta),
        _operand(B, groups),
        _operand(C, groups),
        None if z is None else _sequence(z),
        A.T.unsqueeze(0),
        None,
        (zeros if delta_bias is None else delta_bias).unsqueeze(0),
        zeros if D is None else D,
        None if initial_state is None else initial_state.mT,
        None if seq_idx is None else sequence_begins(seq_idx).to(torch.int8),
        delta_softplus,
        groups,
    )
    return y.squeeze(1).mT.contiguous(), last_state.mT


def selective_scan_2d(
    x: Tensor, proj: Tensor, A: Tensor, dt_weight: Tensor, dt_bias: Tensor, D: Tensor | None
) -> Tensor:
    """Sum of the four directions `[B, H, W, D]` in x's type."""
    skip = torch.zeros_like(dt_bias[0]) if D is None else D.sum(0)
    y, _, _ = _scan(
        x, proj, None, None, None, A.mT, dt_weight.mT, dt_bias, skip, None, None, True, 1
    )
    return y

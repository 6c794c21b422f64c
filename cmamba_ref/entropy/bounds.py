"""Numerical helpers shared by the entropy models."""

from __future__ import annotations

import torch
from torch import Tensor

# Smallest likelihood that training sees; keeps log2 finite (as in Ballé et al. 2018).
LIKELIHOOD_MIN = 1e-9


class _LowerBound(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp_min(bound)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        # Below the bound only a gradient that pushes x back up may pass (descent subtracts it).
        passes = (x >= ctx.bound) | (grad < 0)
        return grad * passes, None


def lower_bound(x: Tensor, bound: float) -> Tensor:
    """`max(x, bound)` whose gradient still lets values below the bound rise (Ballé et al. 2018)."""
    return _LowerBound.apply(x, bound)  # type: ignore[return-value]


def ste_round(x: Tensor) -> Tensor:
    """Rounding to the nearest integer (ties to even) with the gradient of the identity."""
    return x + (torch.round(x) - x).detach()

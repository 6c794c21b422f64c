"""The encoder's dead zone: a symbol of magnitude 1 becomes 0 where it costs more than it improves.

Our choice; neither the decoder nor the format knows of it.  A residual r = y - mean of scale s is
taken as 0 where

    |r| < 1/2 + k max(0, d(s) - 1)        k = SLOPE max(0, ln(LARGEST_LMBDA / lambda))

with d(s) the bits of a one beyond those of a zero, for a Gaussian.  Whatever the residual, it is 0
where the table is one of those that are skipped.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cmamba_ref.entropy.gaussian import SCALES, scale_index

# Chosen for `tiny` on training images, see docs/benchmarks.md.  LARGEST_LMBDA is that of its best
# quality, which gains nothing from a dead zone.
SLOPE = 0.008
LARGEST_LMBDA = 0.18


def _excess_bits(scale: float) -> float:
    """Return max(0, d(scale) - 1)."""
    beyond = [0.5 * math.erfc(edge / scale / math.sqrt(2)) for edge in (0.5, 1.5)]
    zero, one = 1 - 2 * beyond[0], beyond[0] - beyond[1]
    return max(0.0, math.log2(zero / one) - 1)


EXCESS_BITS = torch.tensor(
    [_excess_bits(scale) for scale in SCALES], dtype=torch.float64, device="cpu"
)


def dead_zone_slope(lmbda: Tensor) -> Tensor:
    """Return k for values of lambda, of the same shape."""
    return SLOPE * torch.log(LARGEST_LMBDA / lmbda).clamp(min=0)


def is_zeroed(residual: Tensor, log_scales: Tensor, skipped: int, slope: Tensor | None) -> Tensor:
    """Where the encoder makes symbols of y 0: in skipped tables, see `is_skipped`, and in the zone.

    Args:
        residual: y - mean, any shape.
        log_scales: natural logarithms of the scales, same shape.
        skipped: number of tables that are skipped.
        slope: k, to be broadcast to that shape; None for 0, which leaves skipped tables alone.

    Returns:
        bool, of the same shape.
    """
    index = scale_index(log_scales, shift=0)
    in_table = index < skipped
    if slope is None:
        return in_table
    excess = EXCESS_BITS.to(residual.device, residual.dtype)[index]
    return in_table | (residual.abs() < 0.5 + slope.to(residual) * excess)

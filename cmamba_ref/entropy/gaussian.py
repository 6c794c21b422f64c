"""The single Gaussian conditional: likelihoods for training, table indexes for coding."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from cmamba_ref.entropy.bounds import LIKELIHOOD_MIN, lower_bound
from cmamba_ref.entropy.stored_tables import TableBuffers
from cmamba_ref.entropy.tables import fitted_tables, gaussian_tables
from cmamba_ref.errors import CMambaError

# The field's scale table: 64 levels, log-spaced from 0.11 to 256.
SCALE_LEVELS = 64
LOG_SCALE_MIN = math.log(0.11)
LOG_SCALE_MAX = math.log(256.0)
LOG_SCALE_STEP = (LOG_SCALE_MAX - LOG_SCALE_MIN) / (SCALE_LEVELS - 1)
SCALES = [math.exp(LOG_SCALE_MIN + LOG_SCALE_STEP * i) for i in range(SCALE_LEVELS)]

# The encoder shifts the decision boundaries between levels until every scale keeps this distance
# (in ln units) from all of them; float64 evaluations differ by about 1e-13 between machines.
MARGIN = 1e-9
# One shift is this part of a level; the number of shifts is stored in one byte.
SHIFT = 2.0**-16
MAX_SHIFT = 255


class GaussianConditional(nn.Module):
    """p(y | mean, scale): a Gaussian convolved with the unit box that quantisation is."""

    def __init__(self) -> None:
        super().__init__()
        self.stored = TableBuffers()

    def likelihood(self, y: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
        """Probability mass of the unit interval around `y`, at least 1e-9, shape of `y`."""
        bounded = lower_bound(log_scales, LOG_SCALE_MIN)
        bounded = -lower_bound(-bounded, -LOG_SCALE_MAX)
        scales = torch.exp(bounded)
        distance = (y - means).abs()
        # In the tails both terms are small, so their difference keeps its precision.
        upper = _normal_cdf((0.5 - distance) / scales)
        lower = _normal_cdf((-0.5 - distance) / scales)
        return lower_bound(upper - lower, LIKELIHOOD_MIN)

    def update(self) -> None:
        """Make the tables of the 64 levels."""
        self.stored.store(gaussian_tables(SCALES))

    def fit(self, counts: np.ndarray) -> None:
        """Make the tables of the 64 levels from symbols that were counted; see `fitted_tables`.

        Args:
            counts: for each level how many symbols had each magnitude `[64, K + 1]`.
        """
        self.stored.store(fitted_tables(SCALES, counts))


def scale_index(log_scales: Tensor, shift: int) -> Tensor:
    """The level nearest to each log-scale, its boundaries moved down by `shift` parts of a level.

    Args:
        log_scales: natural logarithm of the scale, float64, any shape.
        shift: number of shifts, 0...255, as stored in the file.

    Returns:
        int64 indexes 0...63 of the same shape.
    """
    level = (log_scales - LOG_SCALE_MIN) / LOG_SCALE_STEP
    return torch.floor(level + (0.5 + shift * SHIFT)).clamp(0, SCALE_LEVELS - 1).long()


def is_skipped(log_scales: Tensor, tables: int) -> Tensor:
    """Where an encoder makes symbols 0: wherever some shift lets a decoder skip the first `tables`.

    An encoder does not know the shift yet; a larger one only takes scales out of those tables.
    """
    return scale_index(log_scales, shift=0) < tables


def choose_shift(log_scales: Tensor) -> int:
    """The first shift for which no log-scale is within MARGIN of a decision boundary.

    Raises:
        CMambaError: none of the 256 shifts will do (which no image has been seen to need).
    """
    position = (log_scales.flatten() - LOG_SCALE_MIN) / LOG_SCALE_STEP + 0.5
    # Boundaries lie at whole positions 1...63; further out there is only one level to choose.
    position = position[(position > 0.5) & (position < SCALE_LEVELS - 0.5)]
    fraction = position - torch.floor(position)
    margin = MARGIN / LOG_SCALE_STEP
    for shift in range(MAX_SHIFT + 1):
        shifted = fraction + shift * SHIFT
        distance = (shifted - torch.round(shifted)).abs()
        if not (distance < margin).any():
            return shift
    raise CMambaError(
        "no table shift keeps every scale clear of a decision boundary; encode at another quality"
    )


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(x * -(0.5**0.5))

"""One model for all qualities: gain and inverse gain (Cui et al. 2021), not in the paper."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmamba_ref.config import CMambaConfig


class Gains(NamedTuple):
    """The gains of a batch, each `[B, channels, 1, 1]`.

    Attributes:
        latent, inverse: of y before quantisation, and of y_bar.
        analysis, synthesis: of the features at H/8 in g_a and in g_s; None without `feature_gain`.
    """

    latent: Tensor
    inverse: Tensor
    analysis: Tensor | None
    synthesis: Tensor | None


class GainUnits(nn.Module):
    """A gain per latent channel and quality, interpolated between whole qualities.

    A larger gain spreads y over more integers: finer quantisation, more bits.  The hyperprior, the
    CAE and the LRP all work on the scaled latent; the inverse gain applies to y_bar, after LRP.
    Gains are kept as logarithms, so that interpolation is geometric and gains stay positive.

    With `feature_gain` the features at H/8 of both transforms have a gain per channel and quality
    too, one at the start (our choice, after published variable-rate codecs that scale features at
    1/8 per quality: DCVC-RT and DCVC-UF).
    """

    def __init__(self, config: CMambaConfig) -> None:
        super().__init__()
        # Numbers, no buffer: models are loaded on the meta device, where a buffer has no values.
        self.log_lmbdas = [math.log(lmbda) for lmbda in config.lmbdas]
        # At high rate the best step size goes with lambda^(-1/2); start from there.
        centre = sum(self.log_lmbdas) / len(self.log_lmbdas)
        m = config.latent_channels
        log_gain = [[0.5 * (value - centre)] * m for value in self.log_lmbdas]
        log_inverse_gain = [[0.5 * (centre - value)] * m for value in self.log_lmbdas]
        self.log_gain = nn.Parameter(torch.tensor(log_gain))
        self.log_inverse_gain = nn.Parameter(torch.tensor(log_inverse_gain))
        self.log_analysis_gain = self.log_synthesis_gain = None
        if config.feature_gain:
            shape = len(config.lmbdas), config.widths[2]
            self.log_analysis_gain = nn.Parameter(torch.zeros(shape))
            self.log_synthesis_gain = nn.Parameter(torch.zeros(shape))

    def forward(self, quality: Tensor) -> Gains:
        """Interpolate the gains for qualities `[B]` in 1...Q."""

        def gain(table: Tensor) -> Tensor:
            return _interpolate(table, quality).exp()[..., None, None]

        return Gains(
            gain(self.log_gain),
            gain(self.log_inverse_gain),
            None if self.log_analysis_gain is None else gain(self.log_analysis_gain),
            None if self.log_synthesis_gain is None else gain(self.log_synthesis_gain),
        )

    def lmbda(self, quality: Tensor) -> Tensor:
        """The trade-off that a quality was trained for, `[B]` to `[B]`."""
        log_lmbdas = torch.tensor(self.log_lmbdas, device=quality.device)
        return _interpolate(log_lmbdas[:, None], quality).exp()[:, 0]


def _interpolate(table: Tensor, quality: Tensor) -> Tensor:
    position = quality.to(table.dtype) - 1
    low = position.floor().clamp(0, table.shape[0] - 2).long()
    weight = (position - low)[:, None]
    return table[low] * (1 - weight) + table[low + 1] * weight

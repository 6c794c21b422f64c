"""One model for all qualities: gain and inverse gain (Cui et al. 2021), not in the paper."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmamba_ref.config import CMambaConfig


class Gains(NamedTuple):
    """The gains of a batch.

    Attributes:
        latent: of y before quantisation `[B, M, 1, 1]`.
        inverse: of y_bar, same shape.
        quality: that they are for `[B]`.
    """

    latent: Tensor
    inverse: Tensor
    quality: Tensor


class GainUnits(nn.Module):
    """A gain per latent channel and quality, interpolated between whole qualities.

    A larger gain spreads y over more integers: finer quantisation, more bits.  The hyperprior, the
    CAE and the LRP all work on the scaled latent; the inverse gain applies to y_bar, after LRP.
    Gains are kept as logarithms, so that interpolation is geometric and gains stay positive.
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

    def forward(self, quality: Tensor) -> Gains:
        """Interpolate the gains for qualities `[B]` in 1...Q."""

        def gain(table: Tensor) -> Tensor:
            return _interpolate(table, quality).exp()[..., None, None]

        return Gains(gain(self.log_gain), gain(self.log_inverse_gain), quality)

    def lmbda(self, quality: Tensor) -> Tensor:
        """The trade-off that a quality was trained for, `[B]` to `[B]`."""
        # Filled on the device: a copy from the host could be in no CUDA graph.
        log_lmbdas = [torch.full((), value, device=quality.device) for value in self.log_lmbdas]
        return _interpolate(torch.stack(log_lmbdas)[:, None], quality).exp()[:, 0]


def _interpolate(table: Tensor, quality: Tensor) -> Tensor:
    position = quality.to(table.dtype) - 1
    low = position.floor().clamp(0, table.shape[0] - 2).long()
    weight = (position - low)[:, None]
    return table[low] * (1 - weight) + table[low + 1] * weight

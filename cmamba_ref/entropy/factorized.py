"""The factorised prior of the hyper latent z (Ballé et al. 2018, appendix 6.1)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmamba_ref.entropy.bounds import LIKELIHOOD_MIN, lower_bound
from cmamba_ref.entropy.precision import StoredPrecision
from cmamba_ref.entropy.stored_tables import TableBuffers
from cmamba_ref.entropy.tables import tables_from_pmfs

# Widths of the small monotone network that is each channel's cumulative distribution.
FILTERS = (3, 3, 3)
INIT_SCALE = 10.0
# Mass left outside a table, half on either side; what falls there is coded as an escape.
TAIL_MASS = 1e-5
# A table never spans more integers than this on either side of the median.
MAX_REACH = 512


class FactorizedPrior(StoredPrecision):
    """One learned density per channel, the same at every position.

    Args:
        channels: channels Z of z.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (1, *FILTERS, 1)
        scale = INIT_SCALE ** (1 / (len(FILTERS) + 1))
        self.matrices = nn.ParameterList()
        self.biases = nn.ParameterList()
        self.factors = nn.ParameterList()
        for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True):
            init = math.log(math.expm1(1 / scale / fan_out))
            self.matrices.append(nn.Parameter(torch.full((channels, fan_out, fan_in), init)))
            bias = torch.empty(channels, fan_out, 1).uniform_(-0.5, 0.5)
            self.biases.append(nn.Parameter(bias))
        for width in FILTERS:
            self.factors.append(nn.Parameter(torch.zeros(channels, width, 1)))
        # Lower tail, median and upper tail of each channel, learned by `aux_loss` alone.
        self.quantiles = nn.Parameter(torch.tensor([[-INIT_SCALE, 0.0, INIT_SCALE]] * channels))
        self.stored = TableBuffers()

    @property
    def medians(self) -> Tensor:
        """Median of every channel, `[Z, 1, 1]`: z is quantised to integer distances from it."""
        return self.quantiles.detach()[:, 1, None, None]

    def likelihood(self, z: Tensor) -> Tensor:
        """Probability mass of the unit interval around each element of `z` `[B, Z, h, w]`."""
        values = z.transpose(0, 1).flatten(1).unsqueeze(1)  # [Z, 1, B*h*w]
        likelihood = lower_bound(self._interval_mass(values), LIKELIHOOD_MIN)
        batch, _, height, width = z.shape
        return likelihood.unflatten(2, (batch, height, width)).squeeze(1).transpose(0, 1)

    def aux_loss(self) -> Tensor:
        """Distance of the stored quantiles from the density's, a scalar."""
        logit_tail = math.log(2 / TAIL_MASS - 1)
        # Made on the device: for a copy from the host, the host would wait.
        ends = torch.arange(-1, 2, dtype=self.quantiles.dtype, device=self.quantiles.device)
        target = logit_tail * ends
        return (self._logit_cdf(self.quantiles.unsqueeze(1), frozen=True) - target).abs().sum()

    @torch.no_grad()
    def update(self) -> None:
        """Make the integer table of every channel from its density.

        A table reaches as far as the density has mass, and at least one integer to either side of
        the median.  It does not rely on the learned outer quantiles, which lag behind in training.
        """
        symbols = torch.arange(-MAX_REACH, MAX_REACH + 1, device=self.quantiles.device)
        mass = self._interval_mass(self.quantiles[:, 1:2, None] + symbols)[:, 0].double().cpu()
        pmfs = []
        for pmf in mass.numpy():
            below = np.count_nonzero(np.cumsum(pmf) < TAIL_MASS / 2)
            above = np.count_nonzero(np.cumsum(pmf[::-1]) < TAIL_MASS / 2)
            first = min(below, MAX_REACH - 1)
            last = max(len(pmf) - above, MAX_REACH + 2)
            kept = pmf[first:last]
            pmfs.append((first - MAX_REACH, kept, max(0.0, 1.0 - float(kept.sum()))))
        self.stored.store(tables_from_pmfs(pmfs))

    def _interval_mass(self, values: Tensor) -> Tensor:
        both = torch.cat([values - 0.5, values + 0.5], dim=-1)
        lower, upper = self._logit_cdf(both).chunk(2, dim=-1)
        # sigmoid(a) - sigmoid(b) is accurate where both are small: mirror the upper half.
        sign = torch.where(lower + upper > 0, -1.0, 1.0)
        return (torch.sigmoid(sign * upper) - torch.sigmoid(sign * lower)).abs()

    def _logit_cdf(self, values: Tensor, frozen: bool = False) -> Tensor:
        """Logit of the cumulative distribution at `values` `[Z, 1, n]`."""
        logits = values
        for k, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            if frozen:
                matrix, bias = matrix.detach(), bias.detach()
            logits = F.softplus(matrix) @ logits + bias
            if k < len(self.factors):
                factor = self.factors[k].detach() if frozen else self.factors[k]
                logits = logits + torch.tanh(factor) * torch.tanh(logits)
        return logits

"""What an ablation puts in the place of the paper's parts; nothing here is in the paper."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmamba_ref.config import CMambaConfig
from cmamba_ref.entropy.bounds import lower_bound
from cmamba_ref.nn.blocks import ResBlock, VSSBlock, register_block, scan_sizes


class PlainFusion(nn.Module):
    """CA-SSM without attention: `w(F_ssm + F_cnn)` or `w([F_ssm, F_cnn])`.

    Args:
        concatenate: rather than add.
    """

    def __init__(
        self,
        channels: int,
        *,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        concatenate: bool = False,
    ) -> None:
        super().__init__()
        self.ssm = VSSBlock(channels, d_state=d_state, ssm_ratio=ssm_ratio)
        self.cnn = ResBlock(channels)
        self.concatenate = concatenate
        self.w = nn.Conv2d(2 * channels if concatenate else channels, channels, 1)
        # The mean of both paths: as in CA-SSM, a fresh block is the identity.
        mean = 0.5 * torch.eye(channels)[:, :, None, None]
        with torch.no_grad():
            self.w.weight.copy_(torch.cat([mean, mean], dim=1) if concatenate else mean)
        nn.init.zeros_(self.w.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to `[B, C, H, W]`."""
        return self.fuse(self.ssm(x), self.cnn(x))

    def fuse(self, f_ssm: Tensor, f_cnn: Tensor) -> Tensor:
        """Join the outputs of both paths."""
        return self.w(torch.cat([f_ssm, f_cnn], dim=1) if self.concatenate else f_ssm + f_cnn)


class GDN(nn.Module):
    """Generalised divisive normalisation (Ballé et al. 2016) on `[B, C, H, W]`.

    `x_i / sqrt(beta_i + sum_j gamma_ij x_j^2)`, or times the root in g_s (`inverse`).  beta and
    gamma are stored as roots, so that they stay positive; they begin with beta = 1 and
    gamma = 0.1 on the diagonal, as is usual.
    """

    BETA_MIN = 1e-6
    # Added under the roots: gradients do not vanish where gamma is 0.
    PEDESTAL = 2.0**-36

    def __init__(self, channels: int, *, inverse: bool) -> None:
        super().__init__()
        self.inverse = inverse
        self.beta_root = nn.Parameter((torch.ones(channels) + self.PEDESTAL).sqrt())
        self.gamma_root = nn.Parameter((0.1 * torch.eye(channels) + self.PEDESTAL).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to `[B, C, H, W]`."""
        beta_bound = (self.BETA_MIN + self.PEDESTAL) ** 0.5
        beta = lower_bound(self.beta_root, beta_bound).square() - self.PEDESTAL
        gamma = lower_bound(self.gamma_root, self.PEDESTAL**0.5).square() - self.PEDESTAL
        norm = F.conv2d(x.square(), gamma[:, :, None, None], beta)
        return x * (norm.sqrt() if self.inverse else norm.rsqrt())


class Hyperprior(nn.Module):
    """In the place of the CAE: Phi' itself is means and log-scales.

    Minnen et al. 2018, without their autoregression.
    """

    def __init__(self, config: CMambaConfig, begin: int, slice_width: int) -> None:
        super().__init__()
        self.of_slice = slice(begin, begin + slice_width)
        self.latent_channels = config.latent_channels

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Map `[B, context_channels, h, w]` to means, log-scales: each `[B, slice_width, h, w]`."""
        phi_mean, phi_scale = context[:, : 2 * self.latent_channels].chunk(2, dim=1)
        return phi_mean[:, self.of_slice], phi_scale[:, self.of_slice]


register_block(
    "sum",
    lambda channels, config, inverse: PlainFusion(channels, **scan_sizes(config)),
)
register_block(
    "concatenation",
    lambda channels, config, inverse: PlainFusion(channels, **scan_sizes(config), concatenate=True),
)
register_block("gdn", lambda channels, config, inverse: GDN(channels, inverse=inverse))

"""The blocks of the transforms: a local path, a global path, and CA-SSM, which fuses the two.

Beside them those that an ablation puts in the place of CA-SSM.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from cmamba_ref import strips
from cmamba_ref.config import CMambaConfig
from cmamba_ref.entropy.bounds import lower_bound
from cmamba_ref.ss2d import SS2D


class ResBlock(nn.Module):
    """The local path: `x + conv3x3(LeakyReLU(conv3x3(x)))` on `[B, C, H, W]`.

    The paper names a ResBlock and does not define it; two 3x3 convolutions are our choice.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.act = nn.LeakyReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        # A fresh block is the identity, see cmamba_ref.walsh.
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if not strips.are_needed(x):
            return x + self.conv2(self.act(self.conv1(x)))
        out = x.clone()
        for rows, with_halo, inside in strips.of_map(x, halo=2):
            change = self.conv2(self.act(self.conv1(x[:, :, with_halo])))
            out[:, :, rows].add_(change[:, :, inside])
        return out


class VSSBlock(nn.Module):
    """The global path: VMamba's `x + SS2D(LayerNorm(x))` on `[B, C, H, W]`, without an FFN."""

    def __init__(self, channels: int, *, d_state: int, ssm_ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.ss2d = SS2D(channels, d_state=d_state, ssm_ratio=ssm_ratio)
        nn.init.zeros_(self.ss2d.out_proj.weight)  # fresh: the identity

    def forward(self, x: Tensor) -> Tensor:
        channel_last = rearrange(x, "b c h w -> b h w c")
        if strips.are_needed(x):
            out = x.clone()
            self.ss2d.add_in_strips(channel_last, self.norm, rearrange(out, "b c h w -> b h w c"))
            return out
        out = self.ss2d(self.norm(channel_last))
        return x + rearrange(out, "b h w c -> b c h w")


class CASSM(nn.Module):
    """Content-adaptive SSM: global and local path over the same features, fused by content.

    The paper: global max pooling and an MLP give attention weights alpha and beta, and
    `out = w(alpha * F_ssm + beta * F_cnn)` with a learned projection w.  Our choices, where the
    paper is silent: the pooled map is the sum of both paths, the weights are per channel, and a
    softmax over the two branches makes them sum to one.
    """

    def __init__(
        self, channels: int, *, d_state: int, ssm_ratio: float, fusion_reduction: int
    ) -> None:
        super().__init__()
        self.ssm = VSSBlock(channels, d_state=d_state, ssm_ratio=ssm_ratio)
        self.cnn = ResBlock(channels)
        hidden = max(1, channels // fusion_reduction)
        self.attention = nn.Sequential(
            nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, 2 * channels)
        )
        self.w = nn.Conv2d(channels, channels, 1)
        # Both paths are residual: with w the identity, a fresh block is the identity.
        nn.init.dirac_(self.w.weight)
        nn.init.zeros_(self.w.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to `[B, C, H, W]`."""
        f_ssm, f_cnn = self.ssm(x), self.cnn(x)
        alpha, beta = self.fusion_weights(f_ssm, f_cnn)
        return _join(lambda ssm, cnn: self.w(alpha * ssm + beta * cnn), f_ssm, f_cnn)

    def fusion_weights(self, f_ssm: Tensor, f_cnn: Tensor) -> tuple[Tensor, Tensor]:
        """Attention weights alpha and beta, each `[B, C, 1, 1]` in 0...1, with alpha + beta = 1."""
        pooled = _max_of_sum(f_ssm, f_cnn)
        logits = rearrange(self.attention(pooled), "b (branch c) -> branch b c 1 1", branch=2)
        alpha, beta = logits.softmax(dim=0)
        return alpha, beta


class PlainFusion(nn.Module):
    """CA-SSM without attention, for comparison: `w(F_ssm + F_cnn)` or `w([F_ssm, F_cnn])`.

    Args:
        concatenate: rather than add.
    """

    def __init__(self, channels: int, *, d_state: int, ssm_ratio: float, concatenate: bool) -> None:
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
        return _join(self._fused, self.ssm(x), self.cnn(x))

    def _fused(self, f_ssm: Tensor, f_cnn: Tensor) -> Tensor:
        return self.w(torch.cat([f_ssm, f_cnn], dim=1) if self.concatenate else f_ssm + f_cnn)


def _join(fuse: Callable[[Tensor, Tensor], Tensor], f_ssm: Tensor, f_cnn: Tensor) -> Tensor:
    """`fuse(f_ssm, f_cnn)`, which looks at one position at a time; large maps replace `f_ssm`."""
    if not strips.are_needed(f_ssm):
        return fuse(f_ssm, f_cnn)
    for rows, *_ in strips.of_map(f_ssm):
        f_ssm[:, :, rows] = fuse(f_ssm[:, :, rows], f_cnn[:, :, rows])
    return f_ssm


class GDN(nn.Module):
    """Generalised divisive normalisation (Ballé et al. 2016) on `[B, C, H, W]`, for comparison.

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
        beta_bound = (self.BETA_MIN + self.PEDESTAL) ** 0.5
        beta = lower_bound(self.beta_root, beta_bound).square() - self.PEDESTAL
        gamma = lower_bound(self.gamma_root, self.PEDESTAL**0.5).square() - self.PEDESTAL
        norm = F.conv2d(x.square(), gamma[:, :, None, None], beta)
        return x * (norm.sqrt() if self.inverse else norm.rsqrt())


def _max_of_sum(x: Tensor, y: Tensor) -> Tensor:
    """Largest value of x + y per channel: maps `[B, C, H, W]` to `[B, C]`."""
    if not strips.are_needed(x):
        return reduce(x + y, "b c h w -> b c", "max")
    sums = (x[:, :, rows] + y[:, :, rows] for rows, *_ in strips.of_map(x))
    return torch.stack([reduce(part, "b c h w -> b c", "max") for part in sums]).amax(0)


def stage(config: CMambaConfig, number: int, *, inverse: bool) -> list[nn.Module]:
    """The blocks of one stage: CA-SSM, or what `config.block` puts in its place.

    Args:
        number: 0 for H/2, 1 for H/4, 2 for H/8.
        inverse: whether the stage is one of g_s.
    """
    channels = config.widths[number]
    scan = {"d_state": config.d_state, "ssm_ratio": config.ssm_ratio}
    make: dict[str, Callable[[], nn.Module]] = {
        "ca-ssm": lambda: CASSM(channels, **scan, fusion_reduction=config.fusion_reduction),
        "sum": lambda: PlainFusion(channels, **scan, concatenate=False),
        "concatenation": lambda: PlainFusion(channels, **scan, concatenate=True),
        "ssm": lambda: VSSBlock(channels, **scan),
        "cnn": lambda: ResBlock(channels),
        "gdn": lambda: GDN(channels, inverse=inverse),
    }
    # A stage without the global path is local, but for GDN, which knows no paths.
    block = config.block if config.ssm_stages[number] or config.block == "gdn" else "cnn"
    return [make[block]() for _ in range(config.depths[number])]

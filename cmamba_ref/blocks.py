"""The blocks of the transforms: a local path, a global path, and CA-SSM, which fuses the two."""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from cmamba_ref import strips
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
        if not strips.are_needed(x):
            return self.w(alpha * f_ssm + beta * f_cnn)
        for rows, *_ in strips.of_map(x):
            f_ssm[:, :, rows] = self.w(alpha * f_ssm[:, :, rows] + beta * f_cnn[:, :, rows])
        return f_ssm

    def fusion_weights(self, f_ssm: Tensor, f_cnn: Tensor) -> tuple[Tensor, Tensor]:
        """Attention weights alpha and beta, each `[B, C, 1, 1]` in 0...1, with alpha + beta = 1."""
        pooled = _max_of_sum(f_ssm, f_cnn)
        logits = rearrange(self.attention(pooled), "b (branch c) -> branch b c 1 1", branch=2)
        alpha, beta = logits.softmax(dim=0)
        return alpha, beta


def _max_of_sum(x: Tensor, y: Tensor) -> Tensor:
    """Largest value of x + y per channel: maps `[B, C, H, W]` to `[B, C]`."""
    if not strips.are_needed(x):
        return reduce(x + y, "b c h w -> b c", "max")
    sums = (x[:, :, rows] + y[:, :, rows] for rows, *_ in strips.of_map(x))
    return torch.stack([reduce(part, "b c h w -> b c", "max") for part in sums]).amax(0)


def stage(
    channels: int,
    depth: int,
    *,
    ssm: bool,
    d_state: int,
    ssm_ratio: float,
    fusion_reduction: int,
) -> list[nn.Module]:
    """`depth` CA-SSM blocks, or ResBlocks where a stage has no global path."""
    if not ssm:
        return [ResBlock(channels) for _ in range(depth)]
    return [
        CASSM(channels, d_state=d_state, ssm_ratio=ssm_ratio, fusion_reduction=fusion_reduction)
        for _ in range(depth)
    ]

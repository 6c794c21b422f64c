"""The blocks of the transforms: a local path, a global path, and CA-SSM, which fuses the two.

All maps are `[B, C, H, W]`.  Every fresh block is the identity, see `cmamba_ref.nn.hadamard_init`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from einops import rearrange, reduce
from torch import Tensor, nn

from cmamba_ref.config import CMambaConfig
from cmamba_ref.nn.ss2d import SS2D

# make(channels, config, inverse): a block of g_a, or of g_s if `inverse`.
MakeBlock = Callable[[int, CMambaConfig, bool], nn.Module]
# What `CMambaConfig.block` may name.
BLOCKS: dict[str, MakeBlock] = {}


def register_block(name: str, make: MakeBlock) -> None:
    """Let `CMambaConfig(block=name)` build its stages of `make(channels, config, inverse)`.

    A model with such a block is saved and loaded like any other, where the name is registered.
    """
    BLOCKS[name] = make


class ResBlock(nn.Module):
    """The local path: `F_cnn = x + conv3x3(LeakyReLU(conv3x3(x)))`.

    The paper names a ResBlock and does not define it; two 3x3 convolutions are our choice.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.act = nn.LeakyReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        # With F_cnn = x, a fresh block is the identity.
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to `[B, C, H, W]`."""
        return x + self.conv2(self.act(self.conv1(x)))


class VSSBlock(nn.Module):
    """The global path: VMamba's `F_ssm = x + SS2D(LayerNorm(x))`, without an FFN."""

    def __init__(self, channels: int, *, d_state: int = 16, ssm_ratio: float = 2.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.ss2d = SS2D(channels, d_state=d_state, ssm_ratio=ssm_ratio)
        nn.init.zeros_(self.ss2d.out_proj.weight)  # F_ssm = x, as in ResBlock

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to `[B, C, H, W]`."""
        change = self.ss2d(self.norm(rearrange(x, "b c h w -> b h w c")))
        return x + rearrange(change, "b h w c -> b c h w")


class CASSM(nn.Module):
    """Content-adaptive SSM: global and local path over the same features, fused by content.

    The paper: global max pooling and an MLP give attention weights alpha and beta, and
    `out = w(alpha * F_ssm + beta * F_cnn)` with a learned projection w.  Our choices, where the
    paper is silent: the pooled map is the sum of both paths, the weights are per channel, and a
    softmax over the two branches makes them sum to one.
    """

    def __init__(
        self,
        channels: int,
        *,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        fusion_reduction: int = 4,
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
        alpha, beta = self.fusion_weights(reduce(f_ssm + f_cnn, "b c h w -> b c", "max"))
        return self.w(alpha * f_ssm + beta * f_cnn)

    def fusion_weights(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Compute alpha and beta, each `[B, C, 1, 1]` in 0...1, with alpha + beta = 1.

        Args:
            pooled: the largest value of `F_ssm + F_cnn` in each channel `[B, C]`.
        """
        logits = rearrange(self.attention(pooled), "b (branch c) -> branch b c 1 1", branch=2)
        alpha, beta = logits.softmax(dim=0)
        return alpha, beta


class ScanSizes(TypedDict):
    """The arguments of every block that holds a scan."""

    d_state: int
    ssm_ratio: float


def scan_sizes(config: CMambaConfig) -> ScanSizes:
    """Take the sizes of the scans from a configuration."""
    return {"d_state": config.d_state, "ssm_ratio": config.ssm_ratio}


register_block(
    "ca-ssm",
    lambda channels, config, inverse: CASSM(
        channels, **scan_sizes(config), fusion_reduction=config.fusion_reduction
    ),
)
register_block("ssm", lambda channels, config, inverse: VSSBlock(channels, **scan_sizes(config)))
register_block("cnn", lambda channels, config, inverse: ResBlock(channels))

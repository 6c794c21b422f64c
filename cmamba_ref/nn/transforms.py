"""The analysis and synthesis transforms g_a, g_s and the hyper transforms h_a, h_s.

All maps are `[B, C, H, W]`.  Every down- and upsampling is by two: y lives at H/16, z at H/64.
The paper gives no layer sizes; see `cmamba_ref.config`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from cmamba_ref.config import CMambaConfig
from cmamba_ref.entropy.precision import StoredPrecision
from cmamba_ref.errors import InvalidArgumentError
from cmamba_ref.nn import ablations as ablations  # registers its blocks
from cmamba_ref.nn import hadamard_init
from cmamba_ref.nn.blocks import BLOCKS
from cmamba_ref.nn.float64_layers import Conv3x3


def downsample(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
    """A strided convolution that halves height and width."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride=2, padding=kernel_size // 2)


def upsample(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    """A transposed 5x5 convolution that doubles height and width."""
    return nn.ConvTranspose2d(in_channels, out_channels, 5, stride=2, padding=2, output_padding=1)


def stage(config: CMambaConfig, number: int, *, inverse: bool) -> list[nn.Module]:
    """Make the blocks of one stage: CA-SSM, or the block that `config.block` names.

    Args:
        number: 0 for H/2, 1 for H/4, 2 for H/8.
        inverse: whether the stage is one of g_s.

    Raises:
        InvalidArgumentError: no block of that name is registered.
    """
    if config.block not in BLOCKS:
        raise InvalidArgumentError(
            f"`block` must be one of {', '.join(map(repr, BLOCKS))}, got {config.block!r:.80}; "
            "or register it first, see cmamba_ref.nn.blocks.register_block"
        )
    # A stage without a scan is made of ResBlocks; GDN has no scan to leave out.
    block = config.block if config.ssm_stages[number] or config.block == "gdn" else "cnn"
    make = BLOCKS[block]
    return [make(config.widths[number], config, inverse) for _ in range(config.depths[number])]


# How a layer of g_a or g_s is applied to its input.
Apply = Callable[[nn.Module, Tensor], Tensor]


def call(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer as it is."""
    return layer(x)


class Transform(nn.Sequential):
    """Layers in turn, each applied by `apply`."""

    def forward(self, input: Tensor, apply: Apply = call) -> Tensor:
        """Compute y or x_hat."""
        x = input
        for layer in self:
            x = apply(layer, x)
        return x


class Analysis(Transform):
    """g_a: image `[B, 3, H, W]` in 0...1 to latent y `[B, M, H/16, W/16]`."""

    def __init__(self, config: CMambaConfig) -> None:
        c1, c2, c3 = config.widths
        stage1, stage2, stage3 = (stage(config, number, inverse=False) for number in range(3))
        sizes = [(3, c1, 5), (c1, c2, 5), (c2, c3, 5), (c3, config.latent_channels, 3)]
        down1, down2, down3, down4 = (downsample(*size) for size in sizes)
        layers = down1, *stage1, down2, *stage2, down3, *stage3, down4
        super().__init__(*layers)
        hadamard_init.init_analysis([down1, down2, down3, down4])


class Synthesis(Transform):
    """g_s: latent y_bar `[B, M, H/16, W/16]` to image `[B, 3, H, W]`, not yet clipped."""

    def __init__(self, config: CMambaConfig) -> None:
        c1, c2, c3 = config.widths
        stage1, stage2, stage3 = (stage(config, number, inverse=True) for number in range(3))
        sizes = [(config.latent_channels, c3), (c3, c2), (c2, c1)]
        up4, up3, up2 = (upsample(*channels) for channels in sizes)
        last = nn.Conv2d(c1, 3 * 2 * 2, 3, padding=1)
        layers = up4, *stage3, up3, *stage2, up2, *stage1, last, nn.PixelShuffle(2)
        super().__init__(*layers)
        hadamard_init.init_synthesis([up4, up3, up2], last)


class HyperAnalysis(nn.Sequential):
    """h_a: latent y `[B, M, h, w]` to hyper latent z `[B, Z, h/4, w/4]`."""

    def __init__(self, config: CMambaConfig) -> None:
        m = config.latent_channels
        hidden, z_channels = config.hyper_widths
        super().__init__(
            nn.Conv2d(m, m, 3, padding=1),
            nn.GELU(),
            downsample(m, hidden, 5),
            nn.GELU(),
            downsample(hidden, z_channels, 5),
        )


class HyperSynthesis(StoredPrecision):
    """h_s: z_hat `[B, Z, h/4, w/4]` to the two halves of Phi', each `[B, M, h, w]`.

    The halves carry what is known of the means and of the scales of y before any slice is decoded.
    """

    def __init__(self, config: CMambaConfig) -> None:
        super().__init__()
        self.mean = self._branch(config)
        self.scale = self._branch(config)

    @staticmethod
    def _branch(config: CMambaConfig) -> nn.Sequential:
        hidden, z_channels = config.hyper_widths
        return nn.Sequential(
            upsample(z_channels, z_channels),
            nn.GELU(),
            upsample(z_channels, hidden),
            nn.GELU(),
            Conv3x3(hidden, config.latent_channels),
        )

    def forward(self, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(z_hat), self.scale(z_hat)

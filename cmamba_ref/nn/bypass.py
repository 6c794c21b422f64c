"""A linear path beside g_a and g_s, between 16x16 blocks of the image and y (our choice).

A transform that is still being learned loses what its narrow stages cannot hold.  A linear path
around them carries any 16x16 transform from the first step on, and costs 768·M multiplications per
position of y on either side.  Shortcuts of this kind are known to speed up training (AuxT, Li et
al. 2025, uses wavelets).
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

# Pixels along one side of a position of y.
BLOCK = 16


class LinearBypass(nn.Module):
    """Adds a linear function of each 16x16 block to y, and one of y to each block.

    Both begin as zero, so that a fresh model is the one without the bypass.

    Args:
        latent_channels: channels M of y.
    """

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        self.analysis = nn.Conv2d(3, latent_channels, BLOCK, stride=BLOCK, bias=False)
        self.synthesis = nn.ConvTranspose2d(latent_channels, 3, BLOCK, stride=BLOCK, bias=False)
        nn.init.zeros_(self.analysis.weight)
        nn.init.zeros_(self.synthesis.weight)

    def to_latent(self, x: Tensor) -> Tensor:
        """Map an image `[B, 3, H, W]` in 0...1 to `[B, M, H/16, W/16]`."""
        return self.analysis(x - 0.5)

    def to_image(self, y: Tensor) -> Tensor:
        """Map y `[B, M, h, w]`, after the inverse gain, to `[B, 3, 16 h, 16 w]`."""
        # What `self.synthesis(y)` computes, as one matrix product: three times as fast on a CPU.
        blocks = F.linear(rearrange(y, "b m h w -> b h w m"), self.synthesis.weight.flatten(1).mT)
        return rearrange(blocks, "b h w (c i j) -> b c (h i) (w j)", i=BLOCK, j=BLOCK)

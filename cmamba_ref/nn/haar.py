"""Down- and upsampling by Haar transforms: what `resampling="haar"` puts in g_a and g_s.

Both layers join three linear steps: an orthonormal 2x2 Haar (Walsh) transform of every channel, a
learned scale per sub-band, and a 1x1 convolution between the sub-bands and the coarser map.
Together these are one convolution with 2x2 kernel and stride 2; only that is computed, so that no
map of sub-bands is ever held.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmamba_ref.errors import InvalidArgumentError


def haar(blocks: Tensor) -> Tensor:
    """Transform `[..., 2, 2]`; its own inverse.

    Entry (i, j) of the result is half the sum over the block, with the second row's sign changed
    if i is 1, and the second column's if j is 1.
    """
    for dim in (-2, -1):
        first, second = blocks.unbind(dim)
        blocks = torch.stack([first + second, first - second], dim)
    return 0.5 * blocks


class HaarDownsample(nn.Conv2d):
    """Halve height and width: Haar transform, scale per sub-band, 1x1 convolution.

    Attributes:
        weight: of the 1x1 convolution, `[C_out, C_in, 2, 2]`; the last two axes are the sub-band.
        scale: `[C_in, 2, 2]`.
        bias: `[C_out]`.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 2, stride=2)
        self.scale = nn.Parameter(torch.ones(in_channels, 2, 2))

    def kernel(self) -> Tensor:
        """Compute the 2x2 kernel of all three steps, `[C_out, C_in, 2, 2]`."""
        return haar(self.weight * self.scale)

    def forward(self, input: Tensor) -> Tensor:
        """Map `[B, C_in, H, W]` to `[B, C_out, H/2, W/2]`.

        Raises:
            InvalidArgumentError: H or W is odd.
        """
        height, width = input.shape[-2:]
        if height % 2 or width % 2:
            raise InvalidArgumentError(
                f"`input` must have even height and width, got {height}x{width}; pad it"
            )
        return F.conv2d(input, self.kernel(), self.bias, stride=2)


class HaarUpsample(nn.ConvTranspose2d):
    """Double height and width: 1x1 convolution, scale per sub-band, inverse Haar transform.

    Attributes:
        weight: of the 1x1 convolution, `[C_in, C_out, 2, 2]`; the last two axes are the sub-band.
        scale: `[C_out, 2, 2]`.
        bias: `[C_out]`, added to the result.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 2, stride=2)
        self.scale = nn.Parameter(torch.ones(out_channels, 2, 2))

    def kernel(self) -> Tensor:
        """Compute the 2x2 kernel of all three steps, `[C_in, C_out, 2, 2]`."""
        return haar(self.weight * self.scale)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Map `[B, C_in, H, W]` to `[B, C_out, 2 H, 2 W]`; `output_size` can be nothing else."""
        return F.conv_transpose2d(input, self.kernel(), self.bias, stride=2)

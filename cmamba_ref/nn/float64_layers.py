"""Convolutions that are also fast in float64, in which the entropy path is computed.

PyTorch has no fast convolution in float64 for CPUs. Where coding runs them, without gradients,
these layers compute the same in other steps; everywhere else they are PyTorch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _needs_other_steps(x: Tensor) -> bool:
    return x.dtype == torch.float64 and x.device.type == "cpu" and not torch.is_grad_enabled()


class Conv3x3(nn.Conv2d):
    """`nn.Conv2d` of kernel 3 and padding 1.

    PyTorch copies nine shifted inputs side by side for one matrix product. Here the nine are views
    of one padded input, and the products are added up: measured 0.8 to 3 times as fast, with a
    ninth of the memory.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        """Map `[B, in_channels, H, W]` to `[B, out_channels, H, W]`."""
        if not _needs_other_steps(input) or self.bias is None:
            return super().forward(input)
        batch, _, height, width = input.shape
        # Lines follow each other in memory, so a view that starts at another place of the padded
        # input is the whole input shifted; two columns of its result mix lines, and are cut off.
        padded = F.pad(input, (1, 1, 1, 2)).flatten(2)
        line = width + 2
        out = self.bias[:, None].repeat(batch, 1, height * line)
        for place, weight in enumerate(self.weight.flatten(2).unbind(2)):
            start = place // 3 * line + place % 3
            shifted = padded[:, :, start : start + height * line]
            out.baddbmm_(weight.expand(batch, -1, -1), shifted)
        return out.unflatten(2, (height, line))[..., :width]


class DepthwiseConv3x3(nn.Conv2d):
    """`nn.Conv2d` of kernel 3, padding 1 and one input channel for each output channel.

    PyTorch makes as many convolutions as there are channels. Here shifted inputs are scaled and
    added up, with channels last: measured 5 times faster.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, input: Tensor) -> Tensor:
        """Map `[B, channels, H, W]` to `[B, channels, H, W]`."""
        if not _needs_other_steps(input) or self.bias is None:
            return super().forward(input)
        _, _, height, width = input.shape
        padded = F.pad(input.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        out = self.bias.expand(*padded[:, 2:, 2:].shape).clone(
            memory_format=torch.contiguous_format
        )
        for place, weight in enumerate(self.weight.flatten(1).unbind(1)):
            top, left = divmod(place, 3)
            out.addcmul_(padded[:, top : top + height, left : left + width], weight)
        return out.permute(0, 3, 1, 2)

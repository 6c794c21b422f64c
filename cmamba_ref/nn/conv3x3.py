"""3x3 convolutions that are also fast in float64, in which the entropy path is computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Conv3x3(nn.Conv2d):
    """`nn.Conv2d` of kernel 3 and padding 1.

    PyTorch has no fast convolution in float64 for CPUs: it copies nine shifted inputs side by side
    for one matrix product. Here the nine are views of one padded input, and the products are added
    up: measured 1 to 3 times faster, with a ninth of the memory.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        """Map `[B, in_channels, H, W]` to `[B, out_channels, H, W]`."""
        is_slow = input.dtype == torch.float64 and input.device.type == "cpu"
        if not is_slow or torch.is_grad_enabled() or self.bias is None:
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

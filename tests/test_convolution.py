"""The 3x3 convolution of the entropy path against PyTorch's."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cmamba_ref.nn.conv3x3 import Conv3x3


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (6, 1), (5, 8)])
@torch.no_grad()
def test_equals_a_convolution(height, width, memory_format):
    layer = Conv3x3(5, 4).double().to(memory_format=memory_format)
    x = torch.randn(2, 5, height, width, dtype=torch.float64).to(memory_format=memory_format)
    expected = F.conv2d(x, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-14)


def test_float64_inference_avoids_the_slow_convolution(monkeypatch):
    def refuse(*_):
        raise AssertionError("called")

    layer, x = Conv3x3(2, 2), torch.randn(1, 2, 3, 3)
    monkeypatch.setattr(nn.Conv2d, "forward", refuse)
    with torch.no_grad():
        layer.double()(x.double())
    with pytest.raises(AssertionError):
        layer.double()(x.double())
    with torch.no_grad(), pytest.raises(AssertionError):
        layer.float()(x)

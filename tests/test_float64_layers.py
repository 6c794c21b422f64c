"""The layers of the entropy path against PyTorch's."""

import pytest
import torch
from torch import nn

from cmamba_ref.nn.float64_layers import Conv3x3, DepthwiseConv3x3

# Each with the class of PyTorch that it stands for.
LAYERS = {
    "Conv3x3": (lambda: Conv3x3(5, 4), nn.Conv2d),
    "DepthwiseConv3x3": (lambda: DepthwiseConv3x3(5), nn.Conv2d),
}
layers = pytest.mark.parametrize(("make", "base"), LAYERS.values(), ids=LAYERS)


@layers
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (6, 1), (5, 8)])
@torch.no_grad()
def test_equals_the_layer_of_pytorch(make, base, height, width, memory_format):
    layer = make().double().to(memory_format=memory_format)
    x = torch.randn(2, 5, height, width, dtype=torch.float64).to(memory_format=memory_format)
    torch.testing.assert_close(layer(x), base.forward(layer, x), rtol=0, atol=1e-14)


@layers
def test_only_float64_inference_avoids_the_slow_layer(make, base, monkeypatch):
    def refuse(*_):
        raise AssertionError("called")

    layer, x = make(), torch.randn(1, 5, 3, 3)
    monkeypatch.setattr(base, "forward", refuse)
    with torch.no_grad():
        layer.double()(x.double())
    with pytest.raises(AssertionError):
        layer.double()(x.double())
    with torch.no_grad(), pytest.raises(AssertionError):
        layer.float()(x)

"""The dead zone of the encoder's rounding."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from cmamba_ref import CMamba
from cmamba_ref.cli.demo import DEMO_IMAGE
from cmamba_ref.codec.refinement import refine
from cmamba_ref.entropy.dead_zone import LARGEST_LMBDA, SLOPE, dead_zone_slope, is_zeroed
from cmamba_ref.entropy.gaussian import SCALES, GaussianConditional


@pytest.fixture(scope="module")
def model() -> CMamba:
    return CMamba.from_pretrained("tiny")


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    pixels = np.asarray(Image.open(DEMO_IMAGE).convert("RGB"))[:256, :256]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


def test_the_zone_is_that_of_the_formula():
    """Its edge at every level, from the likelihoods that training uses."""
    scales = torch.tensor(SCALES, dtype=torch.float64)
    zero, one = (
        GaussianConditional().likelihood(torch.full_like(scales, v), torch.zeros(64), scales.log())
        for v in (0.0, 1.0)
    )
    lmbda = 0.01
    slope = SLOPE * math.log(LARGEST_LMBDA / lmbda)
    edges = 0.5 + slope * (torch.log2(zero / one) - 1).clamp(min=0)
    coded = one > 1e-6  # below, likelihoods are clipped
    assert coded[4:].all() and edges[coded].max() > 0.55 and edges[-1] == 0.5
    log_scales, k = scales.log()[coded], dead_zone_slope(torch.tensor(lmbda))
    for sign in (-1, 1):
        inside, outside = (sign * (edges[coded] + d) for d in (-1e-6, 1e-6))
        assert is_zeroed(inside, log_scales, 0, k).all()
        assert not is_zeroed(outside, log_scales, 0, k).any()


def test_without_a_zone_only_skipped_tables_are_zeroed():
    log_scales = torch.tensor(SCALES, dtype=torch.float64).log()
    expected = torch.arange(64) < 7
    for slope in (None, dead_zone_slope(torch.tensor([LARGEST_LMBDA])), torch.zeros(64)):
        assert torch.equal(is_zeroed(torch.full((64,), 0.51), log_scales, 7, slope), expected)
    # No quality makes the edge lower than that of rounding.
    assert float(dead_zone_slope(torch.tensor(1.0))) == 0


@pytest.mark.parametrize("quality", [1.0, 3.5])
def test_the_codec_zeroes_ones_only(model, x, quality):
    """Against rounding, ones of small scale differ in the first slice, and nothing else does."""
    with torch.no_grad():
        y = model.analyze(x, quality)
        rounded = model.latent_coder.symbols(y, model.h_a(y))
    symbols = model.latent_symbols(x, quality)
    differs = symbols.y[0] != rounded.y[0]  # later slices see other symbols before them
    assert 0 < differs.double().mean() < 0.1
    assert not symbols.y[0][differs].any() and (rounded.y[0][differs].abs() == 1).all()
    assert model.compress(x, quality) == model.latent_coder.encode(symbols, quality)


@pytest.mark.parametrize("quality", [1.0, 2.0, 4.0])
def test_the_zone_lowers_the_loss(model, x, quality):
    """Rate plus lambda times error, of real strings, is lower with the zone than without."""

    def loss(symbols):
        coded = model.latent_coder.encode(symbols, quality)
        bits = 8 * sum(len(string) for strings in coded["strings"] for string in strings)
        x_hat = model.decompress(**coded)["x_hat"]
        lmbda = model.gain.lmbda(torch.tensor([quality]))[0]
        return bits / x[0, 0].numel() + lmbda * 255**2 * (x_hat - x).square().mean()

    with torch.no_grad():
        y = model.analyze(x, quality)
        rounded = model.latent_coder.symbols(y, model.h_a(y))
    assert loss(model.latent_symbols(x, quality)) < 0.999 * loss(rounded)


def test_an_image_of_a_batch_has_the_zone_of_its_quality(model, x):
    """`forward` in eval mode estimates the bits of both, as for each alone."""
    both = torch.cat([x, x])
    with torch.no_grad():
        together = model(both, torch.tensor([1.0, 6.0]))
        for b, quality in enumerate((1.0, 6.0)):
            alone = model(x, quality)
            torch.testing.assert_close(together["x_hat"][b], alone["x_hat"][0], atol=2e-3, rtol=0)


def test_forward_reconstructs_what_the_codec_decodes(model, x):
    coded = model.compress(x, 2.0)
    with torch.no_grad():
        x_hat = model(x, 2.0)["x_hat"].clamp(0, 1)
    difference = (x_hat - model.decompress(**coded)["x_hat"]).abs()
    assert difference.mean() < 1e-4  # a symbol in many may be rounded otherwise in float32


def test_refinement_begins_with_the_encoders_strings(model, x):
    """Without a step they are the best: rounding y as it is has a higher loss."""
    assert refine(model, x, 2.0, steps=0) == model.compress(x, 2.0)

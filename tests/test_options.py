"""Options of the architecture: unequal slices, linear bypass."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch
from codec_helpers import SMALL, as_input, make_image, random_model, recording, round_trip
from einops import rearrange
from torch import Tensor

import cmamba_ref
from cmamba_ref import CMamba, CMambaConfig, InvalidArgumentError
from cmamba_ref.config import BASE, LATER_OPTIONS, TINY
from cmamba_ref.config import SMALL as SHIPPED_SMALL
from cmamba_ref.losses import bits, rate_distortion_loss
from tools import observe, stage_clock

# The sizes of the models that were bundled as `tiny` before the one of 256 channels.
FIRST_TINY = dataclasses.replace(TINY, latent_channels=128, slices=4, lrp=True, bypass=False)

CHANGES = {
    "unequal slices": {"slices": (2, 9, 5)},
    "bypass": {"bypass": True},
}
CHANGES["all"] = {name: value for change in CHANGES.values() for name, value in change.items()}
OPTIONS = {name: dataclasses.replace(SMALL, **change) for name, change in CHANGES.items()}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def config(request) -> CMambaConfig:
    return request.param


@pytest.fixture
def image() -> Tensor:
    return as_input(make_image(128, 192))


# ---------------------------------------------------------------- the defaults


@pytest.mark.parametrize(
    ("config", "names", "values"),
    [
        (FIRST_TINY, "81ff728383afbb65", -112.89469),
        (SHIPPED_SMALL, "c3d6b2090987c762", 6.26400),
        (BASE, "c58d615169df9318", -328.37227),
    ],
    ids=["first tiny", "small", "base"],
)
def test_default_options_keep_the_model(config, names, values):
    """Parameters by name and shape, in order, and their values for one seed.

    The constants are of the commit before the options: another order of drawing random numbers
    moves the sum by tens.
    """
    torch.manual_seed(0)
    state = CMamba(config).state_dict()
    listed = "".join(
        f"{name} {tensor.dtype} {list(tensor.shape)}\n" for name, tensor in state.items()
    )
    assert hashlib.sha256(listed.encode()).hexdigest()[:16] == names
    weighted = [
        tensor.double().flatten() @ torch.linspace(-1, 1, tensor.numel(), dtype=torch.float64)
        for tensor in state.values()
    ]
    assert float(sum(weighted)) == pytest.approx(values, abs=1e-2)


def test_default_options_are_not_written():
    """Versions from before the options read such a file, and theirs are read here."""
    written = json.loads(SHIPPED_SMALL.to_json())
    assert not set(written) & set(LATER_OPTIONS)
    assert written["slices"] == 4
    assert CMambaConfig.from_json(SHIPPED_SMALL.to_json()) == SHIPPED_SMALL
    for name in LATER_OPTIONS:
        default = getattr(SHIPPED_SMALL, name)
        assert CMambaConfig.from_json(json.dumps({**written, name: default})) == SHIPPED_SMALL


# ---------------------------------------------------------------- every option


def test_an_option_survives_json(config):
    read = CMambaConfig.from_json(config.to_json())
    assert read == config and hash(read) == hash(config)
    assert sum(read.slice_widths) == config.latent_channels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "psnr"}, "`metric` must be one of .*, got 'psnr'"),
        ({"slices": (8, 7)}, "`slices` must sum to `latent_channels`, got a sum of 15 and 16"),
        ({"slices": ()}, "`slices` must sum to `latent_channels`, got a sum of 0 and 16"),
        ({"slices": (16, 0)}, "`slices` must be a positive integer"),
        ({"slices": (17, -1)}, "`slices` must be a positive integer"),
        ({"slices": [8, "8"]}, "`slices` must be a positive integer"),
        ({"slices": [8, 8.0]}, "`slices` must be a positive integer"),
        ({"slices": "88"}, "`slices` must be a positive integer"),
        ({"slices": 3}, "`latent_channels` must be a multiple of `slices`"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(change, message):
    with pytest.raises(InvalidArgumentError, match=message):
        dataclasses.replace(SMALL, **change)


def test_a_model_with_an_option_trains(config, image):
    """The loss reaches every parameter, those of the option with a gradient that is not zero."""
    torch.manual_seed(0)
    model = CMamba(config)
    quality = torch.tensor([3.5])
    output = model(image, quality)
    loss = rate_distortion_loss(output, image, model.gain.lmbda(quality))["loss"].sum()
    (loss + model.aux_loss()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        if name.endswith("scale"):
            assert parameter.grad.any(), name


def test_a_model_with_an_option_codes(config, image, tmp_path):
    """The decoder reads the encoder's symbols, `forward` estimates them, files keep the model."""
    model = random_model(config)
    values = (image[0].permute(1, 2, 0) * 255).round().byte().numpy()
    done = round_trip(model, values, 2.5, tmp_path / "x.cmb")
    assert np.any(done.encoder.symbols)
    with torch.no_grad():
        expected = model(image, 2.5)
    x_hat = expected["x_hat"].clamp(0, 1)[0].permute(1, 2, 0) * 255
    assert np.abs(done.decoded - x_hat.numpy()).max() <= 1.01
    estimate = sum(float(bits(likelihood)) for likelihood in expected["likelihoods"].values())
    coded = model.compress(image, 2.5)["strings"]
    assert 0.8 * estimate < 8 * sum(len(strings[0]) for strings in coded) < 1.1 * estimate

    model.save_pretrained(tmp_path / "model")
    loaded = CMamba.from_pretrained(tmp_path / "model")
    assert loaded.config == config and loaded.model_id == model.model_id
    decoded = cmamba_ref.decode((tmp_path / "x.cmb").read_bytes(), loaded)
    assert np.array_equal(decoded, done.decoded)


def test_blocks_and_stages_are_observed(config, image):
    """Tools that hook the children of g_a and g_s see each of them once."""
    model = CMamba(config).eval()
    default = CMamba(SMALL)
    for name, halvings in (("g_a", 0), ("g_s", 4)):
        stages = stage_clock.transform_stages(name, getattr(model, name), halvings)
        assert stages == stage_clock.transform_stages(name, getattr(default, name), halvings)
    called = []
    for child in (*model.g_a, *model.g_s):
        child.register_forward_hook(lambda module, *_: called.append(module))
    seen = observe.observe(model, image, 3)
    assert called == [*model.g_a, *model.g_s]
    assert [block.name for block in seen.blocks] == [
        *(f"g_a H/{n} 1" for n in (2, 4, 8)),
        *(f"g_s H/{n} 1" for n in (8, 4, 2)),
    ]


# ---------------------------------------------------------------- slices


def test_equal_slices_may_be_listed():
    """A list of equal widths makes the model that their number makes."""
    listed = dataclasses.replace(SMALL, slices=(8, 8))
    assert listed.slice_widths == SMALL.slice_widths == (8, 8)
    states = []
    for config in (SMALL, listed):
        torch.manual_seed(0)
        states.append(CMamba(config).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def test_unequal_slices_are_coded_with_their_own_widths(image):
    """Each slice sees the channels before it, and is one block of symbols."""
    model = random_model(OPTIONS["unequal slices"])
    contexts = [cae.w_sq.in_features for cae in model.context.cae]
    assert contexts == [32, 34, 43]
    assert [cae.head.out_features for cae in model.context.cae] == [4, 18, 10]
    assert [lrp.layers[0].in_channels for lrp in model.context.lrp] == [18, 27, 32]
    assert [lrp.layers[-1].out_channels for lrp in model.context.lrp] == [2, 9, 5]
    seen = []
    phi = (torch.randn(1, 16, 4, 4), torch.randn(1, 16, 4, 4))
    y_bar = model.context(phi, lambda i, means, _: seen.append((i, means.shape[1])) or means)
    assert seen == [(0, 2), (1, 9), (2, 5)] and y_bar.shape == (1, 16, 4, 4)
    with recording() as recordings:
        model.compress(image, 3)
    z_elements, y_elements = 8 * 2 * 3, 16 * 8 * 12
    assert recordings[0].symbols.size == z_elements + y_elements


def test_unequal_slices_work_with_the_hyperprior():
    config = dataclasses.replace(OPTIONS["unequal slices"], context="none", lrp=False)
    phi = (torch.randn(1, 16, 4, 4), torch.randn(1, 16, 4, 4))
    context = CMamba(config).context
    assert torch.equal(context(phi, lambda i, means, log_scales: means), phi[0])
    assert torch.equal(context(phi, lambda i, means, log_scales: log_scales), phi[1])


def test_noise_is_split_by_slice():
    """With unequal slices as with equal ones: no noise gives another rate than noise of one."""
    config = dataclasses.replace(OPTIONS["unequal slices"], context="none", lrp=False)
    model = CMamba(config).train()
    x = as_input(make_image(64, 64))
    noise = {name: torch.zeros(1, *shape) for name, shape in model.latent_shapes(64, 64).items()}
    without = model(x, 3.0, noise)["likelihoods"]["y"]
    noise["y"][:, 4] = 0.4
    changed = (model(x, 3.0, noise)["likelihoods"]["y"] != without).flatten(2).any(2)
    assert changed.nonzero()[:, 1].tolist() == [4]


# ---------------------------------------------------------------- linear bypass


def test_a_fresh_bypass_changes_nothing(image):
    torch.manual_seed(0)
    plain = CMamba(SMALL).eval()
    model = CMamba(OPTIONS["bypass"]).eval()
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == ["bypass.analysis.weight", "bypass.synthesis.weight"]
    with torch.no_grad():
        assert torch.equal(model(image, 3.0)["x_hat"], plain(image, 3.0)["x_hat"])


def test_a_bypass_carries_blocks_to_y_and_back(image):
    """Block by block and apart from g_a and g_s: y gets E (x - 0.5), the image gets D y."""
    model = CMamba(OPTIONS["bypass"]).eval()
    m = SMALL.latent_channels
    generator = torch.Generator().manual_seed(1)
    to_y = torch.randn(m, 3, 16, 16, generator=generator)
    to_image = torch.randn(m, 3, 16, 16, generator=generator)
    with torch.no_grad():
        before = model.analyze(image, 5.0)
        y = torch.randn(before.shape, generator=generator)
        image_before = model.synthesize(y, 5.0)
        model.bypass.analysis.weight.copy_(to_y)
        model.bypass.synthesis.weight.copy_(to_image)
        blocks = rearrange(image - 0.5, "b c (h i) (w j) -> b h w (c i j)", i=16, j=16)
        gains = model.gain(torch.tensor([5.0]))
        expected = gains.latent * rearrange(blocks @ to_y.flatten(1).T, "b h w m -> b m h w")
        assert torch.allclose(model.analyze(image, 5.0) - before, expected, atol=1e-3)
        pixels = rearrange(y * gains.inverse, "b m h w -> b h w m") @ to_image.flatten(1)
        expected = rearrange(pixels, "b h w (c i j) -> b c (h i) (w j)", i=16, j=16, c=3)
        assert torch.allclose(model.synthesize(y, 5.0) - image_before, expected, atol=1e-3)


def test_both_sides_of_a_fresh_bypass_learn(image):
    model = CMamba(OPTIONS["bypass"]).train()
    for _ in range(2):  # the first step makes the synthesis differ from 0
        model.zero_grad()
        output = model(image, 4.0)
        rate_distortion_loss(output, image, 0.01)["loss"].mean().backward()
        with torch.no_grad():
            for weight in (model.bypass.analysis.weight, model.bypass.synthesis.weight):
                assert weight.grad.abs().max() > 0
                weight -= 1e-3 * weight.grad

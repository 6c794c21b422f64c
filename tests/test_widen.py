"""The command `tools/widen.py`: a wider model that begins as the old one and its bypass."""

import dataclasses

import pytest
import torch

from cmamba_ref import CMamba
from tests.codec_helpers import ONE_RATE, SMALL, as_input, make_image, random_model
from tests.training_helpers import make_images
from tools import widen

CHANNELS = SMALL.latent_channels + 64


@pytest.fixture(scope="module")
def old() -> CMamba:
    return random_model(SMALL)


def widened(old: CMamba, top: float) -> CMamba:
    new = CMamba(widen.widened_config(old.config, CHANNELS, top)).eval()
    widen.copy_weights(old, new)
    return new


def test_widened_model_equals_the_old_one_on_its_channels(old):
    """With the same lambdas: the same latents, likelihoods and image, for any quality."""
    new = widened(old, top=old.config.lmbdas[-1])
    m = old.config.latent_channels
    x = as_input(make_image(128, 64))
    with torch.no_grad():
        for quality in (1.0, 3.7, 8.0):
            y = new.analyze(x, quality)
            assert torch.allclose(y[:, :m], old.analyze(x, quality), rtol=1e-4, atol=1e-4)
            assert not y[:, m:].any()  # the bypass is fitted later
            found, expected = new(x, quality), old(x, quality)
            assert torch.allclose(found["x_hat"], expected["x_hat"], atol=1e-4)
            y_likelihood = found["likelihoods"]["y"][:, :m]
            assert torch.allclose(y_likelihood, expected["likelihoods"]["y"], rtol=1e-3, atol=1e-5)
            assert torch.allclose(
                found["likelihoods"]["z"], expected["likelihoods"]["z"], rtol=1e-3, atol=1e-5
            )


def test_new_channels_learn(old):
    new = widened(old, top=0.18).train()
    with torch.no_grad():
        new.bypass.analysis.weight[-64:] = 0.1
    output = new(as_input(make_image(64, 64)), 5.0)
    (output["x_hat"].square().mean() + output["likelihoods"]["y"].log().mean()).backward()
    m = old.config.latent_channels
    for name in ("h_a.2.weight", "context.lrp.0.layers.0.weight", "context.cae.0.w_sq.weight"):
        assert new.get_parameter(name).grad is not None, name
    assert new.get_parameter("g_s.0.weight").grad[m:].abs().max() > 0


def test_gains_follow_lambda(old):
    """At a lambda that both models have they are the same, and above the last they rise on."""
    first, last = old.config.lmbdas[0], old.config.lmbdas[-1]
    new = widened(old, top=last * (last / first))  # one step of the old ladder is half a new one
    m = old.config.latent_channels
    with torch.no_grad():
        for number in range(0, len(old.config.lmbdas), 2):
            kept = new.gain.log_gain[number // 2, :m]
            assert torch.allclose(kept, old.gain.log_gain[number], atol=1e-5)
        beyond = new.gain.log_gain[-1, :m] - old.gain.log_gain[-1]
        slope = old.gain.log_gain[-1] - old.gain.log_gain[-2]
        assert torch.allclose(beyond, slope * (len(old.config.lmbdas) - 1), atol=1e-4)
        assert torch.allclose(new.gain.log_gain[:, m:], -new.gain.log_inverse_gain[:, m:])
        # Twice the lambda, half of the squared step.
        rise = (new.gain.log_gain[1:, m] - new.gain.log_gain[:-1, m]).mean().item()
        ratio = new.config.lmbdas[1] / new.config.lmbdas[0]
        assert rise == pytest.approx(0.5 * torch.tensor(ratio).log().item(), rel=1e-4)


def test_bypass_recovers_lost_detail(old, tmp_path, capsys):
    make_images(tmp_path / "photos")
    old.save_pretrained(tmp_path / "old")
    arguments = [str(tmp_path / "old"), str(tmp_path / "photos"), "-o", str(tmp_path / "new")]
    original = widen.HELD_OUT
    try:
        widen.HELD_OUT = 2
        assert widen.main([*arguments, "--channels", str(CHANNELS)]) == 0
    finally:
        widen.HELD_OUT = original
    words = capsys.readouterr().out.split()
    before, after = float(words[3]), float(words[6])
    assert after > before + 3  # a random model loses most of an image
    new = CMamba.from_pretrained(tmp_path / "new")
    assert new.config == widen.widened_config(old.config, CHANNELS, 0.18)


@pytest.mark.parametrize(
    ("channels", "message"), [(SMALL.latent_channels, "--channels"), (CHANNELS + 1, "--channels")]
)
def test_impossible_sizes_are_refused(old, tmp_path, capsys, channels, message):
    old.save_pretrained(tmp_path / "old")
    with pytest.raises(SystemExit):
        widen.main(
            [str(tmp_path / "old"), str(tmp_path), "-o", str(tmp_path), "--channels", str(channels)]
        )
    assert message in capsys.readouterr().err


def test_fixed_rate_models_are_refused(tmp_path, capsys):
    random_model(dataclasses.replace(ONE_RATE, name="one")).save_pretrained(tmp_path / "old")
    with pytest.raises(SystemExit):
        widen.main([str(tmp_path / "old"), str(tmp_path), "-o", str(tmp_path / "new")])
    assert "variable-rate" in capsys.readouterr().err

"""Analysis: what is observed is what the codec works with, and the statistics are what they say."""

import dataclasses
import json
from pathlib import Path

import analyze
import numpy as np
import observe
import pytest
import torch
from analyze import GRID, REACH
from codec_helpers import ONE_RATE, SMALL, as_input, make_image, random_model, recording
from PIL import Image

import cmamba_ref
from cmamba_ref.entropy.latent_coder import SKIPPED_TABLES
from cmamba_ref.model import pad
from cmamba_ref.nn.blocks import CASSM

MIDDLE = GRID // 2


@pytest.fixture(scope="module")
def model():
    """Random weights; its blocks do something, which fresh ones do not."""
    made = random_model(dataclasses.replace(SMALL, depths=(1, 2, 1)))
    torch.manual_seed(1)
    with torch.no_grad():
        for block in made.modules():
            if isinstance(block, CASSM):
                for weight in (block.ssm.ss2d.out_proj.weight, block.cnn.conv2.weight):
                    weight.normal_(0, 0.2)
        for cae in made.context.cae:  # and one scale that is below the table's
            cae.head.bias[-1] = -5  # type: ignore[union-attr, operator]
    made.update(force=True)
    return made


# ---------------------------------------------------------------- what is observed


def test_the_latent_and_its_bits_are_those_of_the_codec(model):
    x = as_input(make_image(128, 192))
    seen = observe.observe(model, x, 5)
    with recording() as recordings:
        coded = model.compress(x, 5)
    (coding,) = recordings
    scales = np.exp(np.clip(coding.log_scales, np.log(0.11), np.log(256)))
    symbols = coding.symbols[-scales.size :]  # after those of z, slice by slice as in y
    rounded = np.rint(seen.normalised.ravel() * scales)
    rounded[coding.indexes[-scales.size :] < SKIPPED_TABLES] = 0
    # The codec computes in float64, so a value in the middle may be rounded the other way.
    assert np.mean(rounded == symbols) > 0.999
    assert np.any(symbols != 0)
    bits = seen.y_bits.sum() + seen.z_bits
    # No symbol counts for more than 30 bits here; an escape costs less.
    assert 0.8 * bits < 8 * sum(len(strings[0]) for strings in coded["strings"]) < 1.1 * bits


def test_blocks_and_their_weights(model):
    x = as_input(make_image(64, 128))
    seen = {block.name: block for block in observe.observe(model, x, 4).blocks}
    order = ["g_a H/2 1", "g_a H/4 1", "g_a H/4 2", "g_a H/8 1"]
    order += ["g_s H/8 1", "g_s H/4 1", "g_s H/4 2", "g_s H/2 1"]
    assert list(seen) == order
    assert set(seen["g_a H/2 1"].paths) == {"cnn"} and seen["g_a H/2 1"].alpha is None
    with torch.no_grad():
        at_h4 = model.g_a[2](model.g_a[1](model.g_a[0](x)))
        block = model.g_a[3]
        f_ssm, f_cnn = block.ssm(at_h4), block.cnn(at_h4)
        alpha, beta = block.fusion_weights((f_ssm + f_cnn).amax((2, 3)))
        expected = {"ssm": f_ssm, "cnn": f_cnn, "fused": block.w(alpha * f_ssm + beta * f_cnn)}
    found = seen["g_a H/4 1"]
    for path, maps in expected.items():
        np.testing.assert_allclose(found.paths[path], maps[0].numpy(), rtol=1e-4, atol=1e-5)
    assert found.alpha is not None and found.alpha.std() > 0
    np.testing.assert_allclose(found.alpha, alpha.flatten().numpy(), rtol=1e-5)
    # Watching leaves nothing behind.
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_receptive_field_is_where_a_pixel_matters(model):
    """Without the SSM paths it is bounded; with them it is the whole image."""
    x = as_input(make_image(256, 256))
    field = observe.receptive_field(model, x)
    assert field.shape == (256, 256) and field.max() == 1
    top, left = np.unravel_index(field.argmax(), field.shape)
    assert abs(top - 128) < 24 and abs(left - 128) < 24
    assert field[0, 0] > 0
    local = random_model(dataclasses.replace(SMALL, ssm_stages=(False,) * 3))
    bounded = observe.receptive_field(local, x)
    assert bounded.max() == 1 and not bounded[:32].any() and not bounded[:, :32].any()


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("size", [(32, 64), (33, 47)])
def test_a_wave_has_its_place_in_the_spectrum(size):
    """A quarter of a turn per position to the right is pi/2; 0 is the constant."""
    wave = np.cos(np.pi / 2 * np.arange(size[1]))[None, None].repeat(size[0], 1)
    spectrum = analyze.log_spectrum(np.concatenate([wave + 0.1]))
    assert spectrum.shape == (GRID, GRID) and spectrum[MIDDLE, MIDDLE] == 0
    away = spectrum.copy()
    away[MIDDLE, MIDDLE] = -np.inf
    row, column = np.unravel_index(away.argmax(), away.shape)
    assert row == MIDDLE and abs(column - MIDDLE) == pytest.approx(GRID // 4, abs=1)


def test_amplitudes_are_relative_and_logarithmic():
    """An impulse has all frequencies alike; twice the constant part is ln 2 less of the rest."""
    impulse = np.zeros((2, 16, 24))
    impulse[:, 3, 5] = 1
    assert np.abs(analyze.log_spectrum(impulse)).max() < 1e-9
    constant = impulse + 1 / impulse[0].size
    spectrum = analyze.log_spectrum(constant)
    assert analyze.half_diagonal(spectrum)[-1] == pytest.approx(-np.log(2))
    assert len(analyze.half_diagonal(spectrum)) == MIDDLE + 1


def test_correlation_of_known_maps():
    noise = np.random.default_rng(0).normal(size=(16, 60, 70))
    white = analyze.spatial_correlation(noise + 5)  # the offset is no correlation
    assert white[REACH, REACH] == pytest.approx(1)
    white[REACH, REACH] = 0
    assert np.abs(white).max() < 0.02
    # Each value shares a half with its neighbour to the right.
    pairs = analyze.spatial_correlation(noise[:, :, 1:] + noise[:, :, :-1])
    assert pairs[REACH, REACH + 1] == pytest.approx(0.5, abs=0.02)
    assert pairs[REACH, REACH - 1] == pytest.approx(0.5, abs=0.02)
    assert abs(pairs[REACH + 1, REACH]) < 0.02
    down = analyze.spatial_correlation(noise[:, 2:] - noise[:, :-2])
    assert down[REACH + 2, REACH] == pytest.approx(-0.5, abs=0.02)


def test_correlation_of_small_and_constant_maps():
    small = analyze.spatial_correlation(np.random.default_rng(0).normal(size=(2, 2, 9)))
    assert small[REACH, REACH] == pytest.approx(1) and not small[0].any()
    assert not analyze.spatial_correlation(np.ones((2, 8, 8))).any()


@pytest.mark.parametrize(
    ("widths", "expected"),
    [((2, 2, 2), [[3, 0], [0, 0], [0, 7]]), ((1, 3, 2), [[1, 0], [2, 0], [0, 7]])],
)
def test_bits_go_to_their_slice(widths, expected):
    bits = np.zeros((6, 1, 2))
    bits[4, 0, 1], bits[0, 0, 0], bits[1, 0, 0] = 7, 1, 2
    assert analyze.bits_by_slice(bits, widths).tolist() == [[row] for row in expected]


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, the second grey, and one that is too small."""
    path = tmp_path / "images"
    path.mkdir()
    Image.fromarray(make_image(70, 140)).save(path / "a.png")
    Image.fromarray(make_image(128, 64, seed=1)[..., 0]).save(path / "b.png")
    Image.fromarray(make_image(60, 128)).save(path / "c.png")
    return path


def test_command(model, weights, folder, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = [str(folder), "-o", str(output), "--model", weights, "--quality", "3"]
    assert analyze.main([*arguments, "--image", "b.png"]) == 1
    assert "left out: c.png" in capsys.readouterr().err
    for name in ("spectra", "correlation", "fusion", "bits", "field"):
        with Image.open(output / f"{name}.png") as image:
            assert np.array(image.convert("L")).std() > 5
    numbers = json.loads((output / "analysis.json").read_text())
    assert numbers["meta"]["images"]["names"] == ["a.png", "b.png"]
    assert numbers["meta"]["model"]["quality"] == 3
    assert "ceiling" not in numbers
    assert set(numbers["fusion"]) == {
        f"{g} H/{n}" for g in ("g_a", "g_s") for n in ("4 1", "4 2", "8 1")
    }

    rows = []
    for crop in (
        make_image(70, 140)[:64, :128],
        make_image(128, 64, seed=1)[..., :1].repeat(3, axis=2),
    ):
        seen = observe.observe(model, as_input(crop), 3)
        bpp = seen.y_bits.sum() / (crop.shape[0] * crop.shape[1])
        rows.append((bpp, analyze.spatial_correlation(seen.normalised)))
    assert sum(numbers["bits"]["y_bpp"]) == pytest.approx(np.mean([bpp for bpp, _ in rows]))
    np.testing.assert_allclose(numbers["correlation"], np.mean([c for _, c in rows], axis=0))
    assert numbers["bits"]["image"] == "b.png"
    assert np.shape(numbers["bits"]["map"]) == (2, 8, 4)
    assert set(numbers["spectrum"]) == {"ssm", "cnn", "fused"}
    assert numbers["spectrum_of"] == "g_a H/8 1"


def test_the_image_that_is_shown_may_be_another(weights, folder, tmp_path):
    """It is in the map of bits, and in no mean."""
    apart = tmp_path / "apart.png"
    Image.fromarray(make_image(192, 64, seed=2)).save(apart)
    (folder / "c.png").unlink()
    found = []
    for more in ([], ["--image", str(apart)]):
        output = tmp_path / f"out{len(more)}"
        arguments = [str(folder), "-o", str(output), "--model", weights, "--ceiling", "8", "2.5"]
        assert analyze.main([*arguments, *more]) == 0
        found.append(json.loads((output / "analysis.json").read_text()))
    without, shown = (numbers.pop("bits") for numbers in found)
    meta, shown_meta = (numbers.pop("meta") for numbers in found)
    assert [row["quality"] for row in found[0]["ceiling"]] == [8, 2.5]
    assert found[0] == found[1] and without["y_bpp"] == shown["y_bpp"]
    assert meta["images"] == shown_meta["images"]
    assert (without["image"], shown["image"]) == ("a.png", "apart.png")
    assert np.shape(shown["map"]) == (2, 12, 4)


def test_a_second_run_completes_an_interrupted_one(weights, folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    arguments = [str(folder), "-o", str(output), "--model", weights, "--limit", "2"]
    analyzed = []

    def numbers_of(model, image, quality, numbers=analyze.numbers_of):
        if len(analyzed) == 1:
            analyzed.append("interrupted")
            raise KeyboardInterrupt
        analyzed.append(image.shape)
        return numbers(model, image, quality)

    monkeypatch.setattr(analyze, "numbers_of", numbers_of)
    assert analyze.main(arguments) == 130
    assert "1 images are kept" in capsys.readouterr().err
    assert not (output / "analysis.json").exists()
    assert analyze.main(arguments) == 0
    assert analyzed == [(70, 140, 3), "interrupted", (128, 64, 3)]
    assert not (output / "analysis.json.partial").exists()


def test_a_fixed_rate_model_without_ssm_paths(folder, tmp_path, capsys):
    local = random_model(dataclasses.replace(ONE_RATE, ssm_stages=(False,) * 3))
    local.save_pretrained(tmp_path / "local")
    output = tmp_path / "out"
    arguments = [str(folder), "-o", str(output), "--model", str(tmp_path / "local")]
    assert analyze.main([*arguments, "--limit", "1", "--ceiling"]) == 0
    assert (output / "spectra.png").exists() and not (output / "fusion.png").exists()
    (row,) = json.loads((output / "analysis.json").read_text())["ceiling"]
    assert row["quality"] is None and row["psnr_ceiling"] > 0
    with pytest.raises(SystemExit):
        analyze.main([*arguments, "--ceiling", "3"])
    assert "one rate" in capsys.readouterr().err


def test_ceiling_is_the_error_with_the_quantiser_off(model, weights, folder, tmp_path, capsys):
    """At all whole qualities, and of images at their full size."""
    output = tmp_path / "out"
    arguments = [str(folder), "-o", str(output), "--model", weights, "--limit", "2"]
    assert analyze.main([*arguments, "--ceiling"]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((output / "analysis.json").read_text())["ceiling"]
    assert [row["quality"] for row in rows] == list(range(1, 9))

    images = make_image(70, 140), make_image(128, 64, seed=1)[..., :1].repeat(3, axis=2)
    for row in rows:
        off, coded = [], []
        for image in images:
            height, width = image.shape[:2]
            with torch.no_grad():
                gains = model.gain(torch.tensor([row["quality"]]))
                x_hat = model.g_s(model.g_a(pad(as_input(image))) * gains.latent * gains.inverse)
            rounded = (255 * x_hat[0, :, :height, :width].clamp(0, 1)).round()
            off.append(np.mean((image - rounded.permute(1, 2, 0).double().numpy()) ** 2))
            decoded = cmamba_ref.decode(cmamba_ref.encode(image, model, row["quality"]), model)
            coded.append(np.mean((image - decoded.astype(float)) ** 2))
        off, coded = np.array(off), np.array(coded)
        assert row["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / coded)))
        assert row["psnr_ceiling"] == pytest.approx(np.mean(10 * np.log10(255**2 / off)), abs=1e-3)
        assert row["share_of_error"] == pytest.approx(off.mean() / coded.mean(), rel=1e-3)
        assert analyze.CEILING.format(**row) in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--quality", "9"], "quality"),
        (["--ceiling", "4", "9"], "quality"),
        (["--image", "z.png"], "z.png"),
        (["--model", "none"], "config.json"),
    ],
)
def test_wrong_arguments_are_refused(weights, folder, tmp_path, capsys, change, message):
    with pytest.raises(SystemExit) as stopped:
        analyze.main([str(folder), "-o", str(tmp_path / "out"), "--model", weights, *change])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        analyze.main([str(folder / "none"), "-o", str(tmp_path / "out")])
    assert "no folder" in capsys.readouterr().err

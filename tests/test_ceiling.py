"""The warning about images that gain nothing from their quality, as dithers do."""

import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from codec_helpers import ONE_RATE, load_image, make_image, random_model, shipped_model
from PIL import Image

from cmamba_ref import ImageWarning, MemoryLimitError, decode, encode, encode_file
from cmamba_ref.cli import main
from cmamba_ref.cli.demo import DEMO_IMAGE
from cmamba_ref.codec import ceiling
from cmamba_ref.metrics import psnr


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return load_image(DEMO_IMAGE)


@pytest.fixture(scope="module")
def dither() -> np.ndarray:
    """What no 256 numbers for 16x16 pixels represent: each pixel black or a full colour."""
    return np.random.default_rng(0).integers(0, 2, (800, 800, 3), np.uint8) * 255


def share(image: np.ndarray, quality: float) -> float:
    model = shipped_model()
    decoded = decode(encode(image, model, quality), model)
    return ceiling.share_at_any_quality(image, model, quality, decoded)


@pytest.mark.parametrize("quality", [4, 8])
def test_only_what_cannot_be_represented_gains_nothing(photo, dither, quality):
    model, dither = shipped_model(), dither[:256, :256]
    assert share(dither, quality) > ceiling.NOTHING_GAINED > share(photo, quality)
    quality = ceiling.PARTS_QUALITY
    assert ceiling.share_in_parts(dither, model, quality) > ceiling.NOTHING_GAINED
    assert ceiling.share_in_parts(photo, model, quality) < ceiling.NOTHING_GAINED


def test_the_share_bounds_what_the_top_quality_gains(dither):
    dither, model = dither[:256, :256], shipped_model()
    low, top = (
        np.square(decode(encode(dither, model, q), model) - dither.astype(float)).mean()
        for q in (4, 8)
    )
    assert top > 0.95 * share(dither, 4) * low


@pytest.mark.parametrize("form", ["grey", "rgba", "grey with alpha"])
def test_other_forms_have_a_share(dither, form):
    dither = dither[:256, :256]
    alpha = np.zeros((256, 256), np.uint8)
    alpha[:100] = 255
    image = {
        "grey": dither[..., 1],
        "rgba": np.dstack([dither, alpha]),
        "grey with alpha": np.dstack([dither[..., 1], alpha]),
    }[form]
    assert 0.5 < share(image, 6) < 1.1
    assert 0.5 < ceiling.share_in_parts(image, shipped_model(), 6) < 1.1


def test_grey_is_judged_as_it_is_decoded(photo):
    """By the mean of the three channels, which is nearer to the image than each of them."""
    grey, model = np.ascontiguousarray(photo[:128, :128, 1]), shipped_model()
    x_hat = ceiling._reconstructed(model, ceiling.as_input(grey), 8)
    unquantised = (x_hat[0].mean(0) * 255).round().byte().numpy()
    assert ceiling.share_at_any_quality(grey, model, 8, unquantised) == pytest.approx(1, rel=0.02)


def test_the_parts_are_those_with_most_detail():
    image = np.zeros((200, 300, 3), np.uint8)
    image[70:100, 140:170] = make_image(30, 30)
    image[128:192, :64] = make_image(64, 64)
    first, second = ceiling._detailed_parts(image)
    np.testing.assert_array_equal(first, image[128:192, :64])
    np.testing.assert_array_equal(second, image[64:128, 128:192])


def warned(image: np.ndarray, *args: object) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ceiling.warn_if_nothing_is_gained(image, *args)
    return [str(warning.message) for warning in seen]


def test_what_is_warned_of(photo, dither):
    model = shipped_model()
    (line,) = warned(dither, model, None)
    assert line.startswith("quality 4 gains nothing here: ") and "in fine detail" in line
    small = dither[:128, :128]
    (line,) = warned(small, model, 5, decode(encode(small, model, 5), model))
    assert line.startswith("quality 5 gains nothing here: ") and "of the error remains" in line
    large = np.tile(photo, (2, 2, 1))
    assert warned(large, model, 5) == warned(large, model, 8) == []
    assert warned(photo, model, 5, decode(encode(photo, model, 5), model)) == []
    assert warned(dither[:700], model, None) == []  # too small to judge by parts
    assert warned(dither, random_model(ONE_RATE), None) == []
    flat = np.full((64, 64, 3), 7, np.uint8)
    assert warned(flat, model, 5, flat) == []  # no error at all


@pytest.mark.parametrize("error", [MemoryLimitError("large"), MemoryError(), ValueError("wrong")])
def test_a_written_file_is_no_failure_where_memory_ends(error, photo, tmp_path, monkeypatch):
    Image.fromarray(photo[:64, :64]).save(tmp_path / "a.png")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(ceiling, "warn_if_nothing_is_gained", fail)
    is_mistake = type(error) is ValueError
    with pytest.raises(ValueError, match="wrong") if is_mistake else nullcontext():
        assert encode_file(tmp_path / "a.png").bytes_out > 0


def test_the_command_and_files_warn(dither, tmp_path: Path, capsys):
    """With and without knowing the decoded image."""
    source = tmp_path / "page.png"
    Image.fromarray(dither).save(source)
    reached = psnr(dither, decode(encode(dither)))
    for options, of_what in (
        ([], "the error in fine detail"),
        (["--verify"], "the error"),
        (["--target-psnr", f"{reached:.2f}"], "the error"),
    ):
        assert main(["encode", str(source), "--force", *options]) == 0
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"cmamba: warning: {source}: quality ")
        assert f"of {of_what} remains" in line
    assert main(["encode", str(tmp_path), "--force", "--jobs", "1"]) == 0
    assert "gains nothing here" in capsys.readouterr().err
    with pytest.warns(ImageWarning, match="gains nothing here"):
        encode_file(source, overwrite=True)


@pytest.mark.slow
def test_it_takes_a_twentieth_of_encoding(photo):
    model = shipped_model()
    image = np.tile(photo, (2, 2, 1))[:775, :775]  # just above MIN_PIXELS
    times: dict[str, list[float]] = {"encode": [], "warn": []}
    for _ in range(7):
        for name, work in (
            ("encode", lambda: encode(image, model)),
            ("warn", lambda: ceiling.warn_if_nothing_is_gained(image, model, None)),
        ):
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    print({name: sorted(values)[3] for name, values in times.items()})
    assert sorted(times["warn"])[3] < 0.05 * sorted(times["encode"])[3]

"""Targets: a size, a rate or a PSNR in place of a quality."""

import math

import numpy as np
import pytest
from codec_helpers import ONE_RATE, load_image, make_image, random_model, shipped_model

from cmamba_ref import InvalidArgumentError, decode, encode
from cmamba_ref.cli.demo import DEMO_IMAGE
from cmamba_ref.codec import targets
from cmamba_ref.codec.targets import Target, encode_to
from cmamba_ref.errors import MemoryLimitError, TargetError
from cmamba_ref.metrics import psnr


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return load_image(DEMO_IMAGE)[100:228, 200:328]


@pytest.fixture(scope="module")
def sizes(image) -> tuple[int, int]:
    """Of the smallest and the largest file."""
    return len(encode(image, shipped_model(), 1)), len(encode(image, shipped_model(), 8))


@pytest.fixture
def encodes(monkeypatch) -> list[tuple[float, int]]:
    """Quality and effort of each file that is encoded from here on."""
    made = []

    def watched(image, model, quality, **options):
        made.append((quality, options["effort"]))
        return encode(image, model, quality, **options)

    monkeypatch.setattr(targets, "encode", watched)
    return made


@pytest.mark.parametrize("part", [0.05, 0.35, 0.7, 0.97])
@pytest.mark.parametrize("kind", ["size", "bpp"])
def test_a_size_is_met_and_never_exceeded(image, sizes, encodes, kind, part):
    size = sizes[0] + part * (sizes[1] - sizes[0])
    target = Target(kind, size if kind == "size" else 8 * size / image[..., 0].size)
    found = encode_to(image, shipped_model(), target=target)
    assert 0.95 * size <= len(found.data) <= size
    assert found.data == encode(image, shipped_model(), found.quality)
    assert found.reached == len(found.data)
    assert len(encodes) <= 6


@pytest.mark.slow
def test_sizes_are_met_on_kodak(kodak_paths, encodes):
    """Three sizes inside the range of each of the 24 images, at equal ratios."""
    for path in kodak_paths:
        photo = load_image(path)
        low, high = (len(encode(photo, shipped_model(), quality)) for quality in (1, 8))
        for part in (0.25, 0.5, 0.75):
            size = low * (high / low) ** part
            encodes.clear()
            found = encode_to(photo, shipped_model(), target=Target("size", size))
            assert 0.95 * size <= len(found.data) <= size, (path.name, part)
            assert len(encodes) <= 6
            print(path.name, part, len(found.data) / size, len(encodes))


@pytest.mark.parametrize("decibels", [30.5, 32.0])
def test_a_psnr_is_met(image, encodes, decibels):
    found = encode_to(image, shipped_model(), target=Target("psnr", decibels))
    assert decibels <= psnr(image, decode(found.data, shipped_model())) <= decibels + 0.1
    assert found.reached == psnr(image, decode(found.data, shipped_model()))
    assert len(encodes) <= 6


def test_with_an_effort_the_search_begins_without(image, sizes, encodes):
    size = sum(sizes) / 2
    found = encode_to(image, shipped_model(), target=Target("size", size), effort=1)
    assert 0.95 * size <= len(found.data) <= size
    efforts = [effort for _, effort in encodes]
    assert efforts == sorted(efforts) and efforts[-1] == 1 and len(efforts) <= 6
    assert found.data == encode(image, shipped_model(), found.quality, effort=1)


def test_a_search_that_is_ended_returns_a_file_within_the_target(image, sizes, encodes):
    size = sum(sizes) / 2
    target = Target("size", size)
    found = encode_to(image, shipped_model(), target=target, effort=3, progress=lambda *_: True)
    assert [effort for _, effort in encodes].count(3) == 1
    assert len(found.data) <= size


@pytest.mark.parametrize(
    ("kind", "value", "nearest"),
    [("size", 10, 1), ("size", 10**6, 8), ("bpp", 0.001, 1), ("psnr", 60, 8), ("psnr", 5, 1)],
)
def test_what_is_out_of_reach_names_the_nearest(image, kind, value, nearest):
    target = Target(kind, value)
    with pytest.raises(TargetError, match=f"cannot be reached; the nearest is .* {nearest};"):
        encode_to(image, shipped_model(), target=target)
    found = encode_to(image, shipped_model(), target=target, nearest=True)
    assert found.data == encode(image, shipped_model(), nearest)


def test_limits_hold_for_encoding_and_decoding(image):
    target = Target("psnr", 32)
    with pytest.raises(MemoryLimitError):
        encode_to(image, shipped_model(), target=target, max_memory=1000)
    with pytest.raises(InvalidArgumentError, match="max_pixels"):
        encode_to(image, shipped_model(), target=target, max_pixels=1000)
    seen = []

    def watched(data, model, **options):
        seen.append(options)
        return decode(data, model, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "decode", watched)
        limits = {"max_pixels": 10**9, "max_memory": 2**40}
        encode_to(image, shipped_model(), target=target, **limits)
    assert seen and all(options == limits for options in seen)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_targets_are_checked(image, value):
    with pytest.raises(InvalidArgumentError, match="positive number"):
        encode_to(image, shipped_model(), target=Target("size", value))


def test_the_kind_of_a_target_is_checked(image):
    for target in (1000, "size", ("size",), ("size", 20, 30)):
        with pytest.raises(InvalidArgumentError, match="a kind and a number"):
            encode_to(image, target=target)
    with pytest.raises(InvalidArgumentError, match="a positive number, got '1000'"):
        encode_to(image, target=("size", "1000"))
    with pytest.raises(InvalidArgumentError, match="`image` must be a NumPy array"):
        encode_to("a.png", target=("bpp", 1))
    with pytest.raises(InvalidArgumentError, match="`image` must have 1 to"):
        encode_to(image[:0], target=("bpp", 1))
    with pytest.raises(InvalidArgumentError, match="`model` must be a CMamba"):
        encode_to(image, "tiny", target=("bpp", 1))
    with pytest.raises(InvalidArgumentError, match="must be of size, bpp, psnr, got 'ssim'"):
        encode_to(image, shipped_model(), target=Target("ssim", 1), nearest=True)


def test_a_model_of_one_rate_has_no_targets(image):
    with pytest.raises(InvalidArgumentError, match="several qualities"):
        encode_to(image, random_model(ONE_RATE), target=Target("size", 1000))


@pytest.mark.parametrize("shape", [(64, 64), (64, 64, 4), (64, 64, 2)])
def test_alpha_and_grey_have_targets_too(shape):
    image = make_image(64, 64)[..., : max(shape[2:], default=1)]
    image = image.reshape(shape) if len(shape) == 2 else np.resize(image, shape)
    found = encode_to(image, shipped_model(), target=Target("psnr", 20), nearest=True)
    decoded = decode(found.data)
    assert decoded.shape == image.shape
    colours = slice(None, -1) if shape[2:] in ((2,), (4,)) else slice(None)
    both = (image, decoded) if len(shape) == 2 else (image[..., colours], decoded[..., colours])
    assert found.reached == psnr(*both)


def test_a_search_that_is_ended_early_keeps_the_nearest(image, monkeypatch):
    """Whoever ends it has seen no sign that the target is out of reach."""
    monkeypatch.setattr(targets, "CHEAP_ENCODES", 1)
    monkeypatch.setattr(targets, "PSNR_SLOPE", 100.0)  # which makes the second try a bad one
    target = Target("psnr", 35.0)
    found = encode_to(image, shipped_model(), target=target, effort=1, progress=lambda *_: True)
    assert found.reached < 35
    assert found.reached == psnr(image, decode(found.data, shipped_model()))


@pytest.mark.parametrize("values", [(45.0, math.inf), (math.inf, 45.0), (math.inf, math.inf)])
def test_an_exact_copy_does_not_end_the_search(values):
    goal = targets._Goal(50.0, 50.04, 50.1, 0.9, is_size=False)
    points = [targets._Point(v, q, b"") for q, v in zip((3.0, 4.0), values, strict=True)]
    assert 1 <= targets._next(points, goal, 8) <= 8


def test_values_that_fall_between_neighbours_are_searched_on():
    """Where the value of a higher quality is lower, the search goes on above it."""
    values = {1.0: 10.0, 1.5: 29.99, 1.51: 29.9, 2.0: 40.0}
    goal = targets._Goal(30.0, 30.02, 30.1, 20.0, is_size=False)
    points = [targets._Point(v, q, b"") for q, v in values.items()]
    tried = targets._next(points, goal, 8)
    assert 1.51 < tried < 2
    wrong = [targets._Point(30.5, 3.0, b""), targets._Point(29.0, 3.5, b"")]
    assert 3.5 < targets._next(wrong, goal, 8) <= 8

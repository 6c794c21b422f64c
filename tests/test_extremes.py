"""Pictures that no photograph resembles, through files with the model that ships.

The symbols that are decoded are the encoder's: a check in the file says so, and `round_trip`
compares them once more.  The picture that is decoded is the one that the encoder would have made of
its own latent, within one step of 8 bits.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from codec_helpers import round_trip, shipped_model

import cmamba_ref


def flat(*colour: int) -> Callable[[int, int], np.ndarray]:
    return lambda height, width: np.full((height, width, 3), colour, np.uint8)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(9).integers(0, 256, (height, width, 3), dtype=np.uint8)


def black_or_white(is_white: np.ndarray) -> np.ndarray:
    return np.repeat(np.where(is_white, 255, 0).astype(np.uint8)[..., None], 3, axis=2)


def rows(height: int, width: int) -> np.ndarray:
    return black_or_white(np.indices((height, width))[0] % 2 == 0)


def columns(height: int, width: int) -> np.ndarray:
    return black_or_white(np.indices((height, width))[1] % 2 == 0)


def checkerboard(height: int, width: int) -> np.ndarray:
    return black_or_white(np.indices((height, width)).sum(axis=0) % 2 == 0)


def primary_noise(height: int, width: int) -> np.ndarray:
    """Every channel of every pixel 0 or 255, by chance."""
    return noise(height, width) // 128 * 255


KINDS = {
    "black": flat(0, 0, 0),
    "white": flat(255, 255, 255),
    "red": flat(255, 0, 0),
    "green": flat(0, 255, 0),
    "blue": flat(0, 0, 255),
    "cyan": flat(0, 255, 255),
    "magenta": flat(255, 0, 255),
    "yellow": flat(255, 255, 0),
    "noise": noise,
    "primary noise": primary_noise,
    "rows": rows,
    "columns": columns,
    "checkerboard": checkerboard,
}
QUALITIES = range(1, 9)


def assert_decodes_as_encoded(kind: str, height: int, width: int, quality: int, tmp_path) -> None:
    model, image = shipped_model(), KINDS[kind](height, width)
    done = round_trip(model, image, quality, tmp_path / "extreme.cmb")
    x_hat = model.reconstruct(torch.from_numpy(done.encoder.y_bar), torch.tensor([float(quality)]))
    own = (x_hat[0, :, :height, :width] * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(done.decoded - own).max() <= 1
    print(f"{kind} {width}x{height}, quality {quality}: {done.size} bytes")


@pytest.mark.parametrize("quality", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_small_extremes(tmp_path, kind, quality):
    assert_decodes_as_encoded(kind, 40, 90, quality, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (333, 450)])
def test_extremes_at_every_quality(tmp_path, height, width, kind, quality):
    assert_decodes_as_encoded(kind, height, width, quality, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("kind", ["white", "noise", "checkerboard"])
@pytest.mark.parametrize(("height", "width"), [(8, 16_384), (16_384, 8)])
def test_thin_extremes_at_every_quality(tmp_path, height, width, kind, quality):
    assert_decodes_as_encoded(kind, height, width, quality, tmp_path)


def test_extremes_in_grey(tmp_path):
    """One channel: the same symbols as of three equal ones."""
    for kind in ("black", "white", "checkerboard"):
        image = KINDS[kind](40, 90)
        grey = round_trip(shipped_model(), image[..., 0], 4, tmp_path / "grey.cmb")
        assert grey.size == len(cmamba_ref.encode(image, shipped_model(), 4))

"""Images unlike any photograph, through files with `tiny`.

The symbols that are decoded are the encoder's: a CRC in the file says so, and `round_trip` compares
them once more.  The decoded image is the one that the encoder would have made of its own latent,
within one step of 8 bits.
"""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from codec_helpers import round_trip, shipped_model

import cmamba_ref


def flat(colour: tuple[int, ...]) -> Callable[[int, int], np.ndarray]:
    return lambda height, width: np.full((height, width, 3), colour, np.uint8)


def black_and_white(number: Callable) -> Callable[[int, int], np.ndarray]:
    """White where the number of a row and a column is even."""

    def image(height: int, width: int) -> np.ndarray:
        is_white = number(*np.indices((height, width))) % 2 == 0
        return np.repeat(np.where(is_white, 255, 0).astype(np.uint8)[..., None], 3, axis=2)

    return image


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(9).integers(0, 256, (height, width, 3), dtype=np.uint8)


COLOURS = ("black", "blue", "green", "cyan", "red", "magenta", "yellow", "white")
KINDS = {
    **dict(zip(COLOURS, map(flat, product((0, 255), repeat=3)), strict=True)),
    "noise": noise,
    "primary noise": lambda height, width: noise(height, width) // 128 * 255,
    "rows": black_and_white(lambda row, column: row),
    "columns": black_and_white(lambda row, column: column),
    "checkerboard": black_and_white(np.add),
}
QUALITIES = range(1, 9)
CASES = [
    *product(KINDS, [(40, 90)], [1, 8]),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            *product(KINDS, [(1, 1), (333, 450)], QUALITIES),
            *product(["white", "noise", "checkerboard"], [(8, 16_384), (16_384, 8)], QUALITIES),
        )
    ),
]


@pytest.mark.parametrize(("kind", "shape", "quality"), CASES)
def test_extremes_decode_as_encoded(tmp_path, kind, shape, quality):
    model, (height, width) = shipped_model(), shape
    done = round_trip(model, KINDS[kind](height, width), quality, tmp_path / "extreme.cmb")
    x_hat = model.reconstruct(torch.from_numpy(done.encoder.y_bar), torch.tensor([float(quality)]))
    own = (x_hat[0, :, :height, :width] * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(done.decoded - own).max() <= 1


def test_extremes_in_grey(tmp_path):
    """One channel: the same symbols as of three equal ones."""
    for kind in ("black", "white", "checkerboard"):
        image = KINDS[kind](40, 90)
        grey = round_trip(shipped_model(), image[..., 0], 4, tmp_path / "grey.cmb")
        assert grey.size == len(cmamba_ref.encode(image, shipped_model(), 4))

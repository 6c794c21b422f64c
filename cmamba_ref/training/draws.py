"""Every random decision of a training run, as a function of the seed and its place in the run.

A crop is sample n of the run, whichever process makes it and whenever.  So a run that was
interrupted goes on as if it had not been, and several processes train on what one would have.
No generator is kept: there is no random state to save.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np

# What a draw is for: generators of different purposes share no stream.
_ORDER, _CROP, _QUALITY, _NOISE, _IS_GRAPHIC, _GRAPHIC, _TEST_GRAPHIC = range(7)


def _generator(seed: int, purpose: int, *place: int) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, *place])


def image(seed: int, sample: int, count: int) -> tuple[int, int]:
    """Return the visit and the number of the image that a sample is cut from.

    Each of `count` images is visited once before any is visited again.
    """
    visit, position = divmod(sample, count)
    return visit, int(_order(seed, visit, count)[position])


def sample_of(seed: int, visit: int, number: int, count: int) -> int:
    """Return the sample that is cut from a visit to image `number`: `image` reversed."""
    (position,) = np.flatnonzero(_order(seed, visit, count) == number)
    return visit * count + int(position)


# As many orders as two processes look ahead when they cut crops for later visits.
@functools.lru_cache(maxsize=64)
def _order(seed: int, visit: int, count: int) -> np.ndarray:
    return _generator(seed, _ORDER, visit).permutation(count).astype(np.int32)


def for_crop(seed: int, number: int, visit: int) -> np.random.Generator:
    """Return the generator that places the crop of a visit to image `number`."""
    return _generator(seed, _CROP, number, visit)


def is_graphic(seed: int, sample: int, share: float) -> bool:
    """Return whether a sample is a synthetic graphic instead of a crop, as a `share` of them is."""
    return share > 0 and _generator(seed, _IS_GRAPHIC, sample).random() < share


def for_graphic(seed: int, sample: int) -> np.random.Generator:
    """Return the generator that draws the graphic of a sample."""
    return _generator(seed, _GRAPHIC, sample)


def for_test_graphic(number: int) -> np.random.Generator:
    """Return the generator of a graphic that no training run draws, whatever its seed."""
    return _generator(0, _TEST_GRAPHIC, number)


def qualities(seed: int, step: int, batch: int, top: int) -> np.ndarray:
    """Return a quality in 1...top for each crop of a batch, float32 `[B]`.

    Stratified: one from each of B equal parts of the range, so that every step sees all rates.
    """
    rng = _generator(seed, _QUALITY, step)
    spread = (rng.permutation(batch) + rng.random(batch)) / batch
    return (1 + (top - 1) * spread).astype(np.float32)


def noise(
    seed: int, sample: int, shapes: Mapping[str, tuple[int, int, int]]
) -> dict[str, np.ndarray]:
    """Return uniform noise in -0.5...0.5 for each latent of a sample, float32 of these shapes."""
    rng = _generator(seed, _NOISE, sample)
    return {name: rng.random(shape, dtype=np.float32) - 0.5 for name, shape in shapes.items()}

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
_ORDER, _CROP, _QUALITY, _NOISE = range(4)


def _generator(seed: int, purpose: int, *place: int) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, *place])


def photograph(seed: int, sample: int, count: int) -> tuple[int, int]:
    """The visit and the number of the photograph that a sample is cut from.

    Each of `count` photographs is visited once before any is visited again.
    """
    visit, position = divmod(sample, count)
    return visit, int(_order(seed, visit, count)[position])


@functools.lru_cache(maxsize=4)
def _order(seed: int, visit: int, count: int) -> np.ndarray:
    return _generator(seed, _ORDER, visit).permutation(count)


def for_crop(seed: int, number: int, visit: int) -> np.random.Generator:
    """The generator that places the crop of a visit to photograph `number`."""
    return _generator(seed, _CROP, number, visit)


def qualities(seed: int, step: int, batch: int, top: int) -> np.ndarray:
    """A quality in 1...top for each crop of a batch, float32 `[B]`.

    Stratified: one from each of B equal parts of the range, so that every step sees all rates.
    """
    rng = _generator(seed, _QUALITY, step)
    spread = (rng.permutation(batch) + rng.random(batch)) / batch
    return (1 + (top - 1) * spread).astype(np.float32)


def noise(
    seed: int, sample: int, shapes: Mapping[str, tuple[int, int, int]]
) -> dict[str, np.ndarray]:
    """Uniform noise in -0.5...0.5 for each latent of a sample, float32 of the given shapes."""
    rng = _generator(seed, _NOISE, sample)
    return {name: rng.random(shape, dtype=np.float32) - 0.5 for name, shape in shapes.items()}

"""Encoding to a file size or a PSNR: a search for the quality that gives it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from cmamba_ref.codec.image_codec import (
    DEFAULT_MAX_PIXELS,
    check_image,
    checked_model,
    decode,
    encode,
    has_alpha,
)
from cmamba_ref.codec.metadata import NO_METADATA, Metadata
from cmamba_ref.codec.refinement import Progress, check_effort
from cmamba_ref.entropy.latent_prefix import QUALITY_UNITS
from cmamba_ref.errors import InvalidArgumentError, TargetError
from cmamba_ref.metrics import psnr
from cmamba_ref.model import CMamba

UNITS = {"size": "bytes", "bpp": "bits per pixel", "psnr": "dB"}

# Files that are encoded at most in one search.
ENCODES = 6
# Of those, at effort 0 where the effort is higher, to know where to begin.
CHEAP_ENCODES = 3
# Qualities differ by this, as files store them.
STEP = 1 / QUALITY_UNITS

# What is good enough, and what is aimed at: parts of a size, which is never exceeded, and dB above
# a PSNR, which is always reached.
ENOUGH_SIZE, AIMED_SIZE = 0.95, 0.98
ENOUGH_PSNR, AIMED_PSNR = 0.1, 0.04

# How fast the logarithm of the size and the PSNR rise with the quality, for the second encode.
SIZE_SLOPE, PSNR_SLOPE = 0.24, 0.9
# In place of the PSNR of an exact copy.
FINITE_PSNR = 150.0


class Target(NamedTuple):
    """What a file is to reach: a size in bytes, a rate in bits per pixel or a PSNR in dB."""

    kind: str  # one of UNITS
    value: float


class Found(NamedTuple):
    """A file, its quality, and its size in bytes or its PSNR in dB, whichever the target was."""

    data: bytes
    quality: float
    reached: float


class _Point(NamedTuple):
    value: float  # logarithm of the size, or PSNR
    quality: float
    data: bytes

    @property
    def finite(self) -> float:
        """The value, for lines through points: the PSNR of an exact copy is infinite."""
        return min(self.value, FINITE_PSNR)


class _Goal(NamedTuple):
    """The values to reach, from `low` to `high`; of a size the upper limit is strict."""

    low: float
    aim: float
    high: float
    slope: float  # how fast values rise with the quality, as a rule
    is_size: bool

    def is_met(self, point: _Point) -> bool:
        return self.low <= point.value <= self.high

    def is_kept(self, point: _Point) -> bool:
        """Whether a file is no larger, or no worse, than asked for."""
        return point.value <= self.high if self.is_size else point.value >= self.low


def encode_to(
    image: np.ndarray,
    model: CMamba | None = None,
    *,
    target: Target | tuple[str, float],
    nearest: bool = False,
    effort: int = 0,
    progress: Progress | None = None,
    metadata: Metadata = NO_METADATA,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    max_memory: int | None = None,
) -> Found:
    """Encode an image to a size, a rate or a PSNR, in at most six encodes.

    The file takes 95 to 100 % of a size or rate, or has a PSNR from the target to 0.1 dB above it.
    If six encodes do not find such a quality, it is the nearest that is not larger, or not worse.

    Args:
        image, model, effort, metadata, max_pixels, max_memory: as in `cmamba_ref.encode`.
        target: what to reach, a `Target` or its two values. The size is that of the whole file,
            metadata included.
        nearest: where the target is out of reach, return the nearest file in place of an error.
        progress: as in `cmamba_ref.encode`, for every file that is encoded with an effort; True
            ends the search for the quality too.

    Raises:
        TargetError: no quality of the model reaches the target; the message names the nearest.
        InvalidArgumentError: a target of another kind or no positive number, a fixed-rate model,
            and as `encode`.
    """
    check_image(image)
    model = checked_model(model)
    check_effort(effort, model)
    target = check_target(target, model)
    goal, top = _goal(target, image), len(model.config.lmbdas)
    limits: dict[str, Any] = {"max_pixels": max_pixels, "max_memory": max_memory}

    is_ended = False

    def watch(done: int, total: int) -> bool:
        nonlocal is_ended
        is_ended = bool(progress and progress(done, total))
        return is_ended

    def trial(quality: float, effort: int) -> _Point:
        data = encode(
            image, model, quality, effort=effort, progress=watch, metadata=metadata, **limits
        )
        if goal.is_size:
            return _Point(math.log(len(data)), quality, data)
        return _Point(_psnr(image, decode(data, model, **limits)), quality, data)

    points: list[_Point] = []
    start, slope = (1 + top) / 2, goal.slope
    if effort:
        points = list(_search(lambda q: trial(q, 0), goal, start, top, CHEAP_ENCODES))
        start, slope = points[-1].quality, _slope(points, slope)
    tries, goal = ENCODES - len(points), goal._replace(slope=slope)
    found = []
    for point in _search(lambda q: trial(q, effort), goal, start, top, tries):
        found.append(point)
        if is_ended:
            found += points
            break
    return _chosen(found, goal, target, top, nearest or is_ended)


def check_target(target: Target | tuple[str, float], model: CMamba) -> Target:
    """Return the target as such.

    Raises:
        InvalidArgumentError: it is of another kind or no positive number; or the model has a fixed
            rate.
    """
    if not model.config.lmbdas:
        raise InvalidArgumentError(
            f"`model` must have several qualities, got {model.config.name!r}, which has one rate"
        )
    if not isinstance(target, tuple | list) or len(target) != 2:
        raise InvalidArgumentError(
            f"the target must be a kind and a number, such as ('size', 20000), got {target!r}"
        )
    kind, value = target
    if kind not in UNITS:
        raise InvalidArgumentError(f"the target must be of {', '.join(UNITS)}, got {kind!r}")
    if not (isinstance(value, numbers.Real) and 0 < value < math.inf):  # NaN is not
        raise InvalidArgumentError(f"the target must be a positive number, got {value!r}")
    return Target(kind, float(value))


def _goal(target: Target, image: np.ndarray) -> _Goal:
    kind, value = target
    if kind == "psnr":
        return _Goal(value, value + AIMED_PSNR, value + ENOUGH_PSNR, PSNR_SLOPE, is_size=False)
    pixels = max(1, image.shape[0] * image.shape[1])  # `encode` refuses an image without any
    size = value if kind == "size" else value * pixels / 8
    low, aim, high = (math.log(part * size) for part in (ENOUGH_SIZE, AIMED_SIZE, 1))
    return _Goal(low, aim, high, SIZE_SLOPE, is_size=True)


def _psnr(image: np.ndarray, decoded: np.ndarray) -> float:
    """The PSNR of the colours; alpha is lossless."""
    if has_alpha(image):
        image, decoded = image[..., :-1], decoded[..., :-1]
    return psnr(image, decoded)


def _search(
    trial: Callable[[float], _Point], goal: _Goal, start: float, top: int, tries: int
) -> Iterator[_Point]:
    """Try qualities until one meets the goal or none is left to try."""
    points: list[_Point] = []
    quality = start
    for _ in range(tries):
        points.append(trial(quality))
        yield points[-1]
        quality = _next(points, goal, top)
        if goal.is_met(points[-1]) or any(abs(quality - p.quality) < STEP / 2 for p in points):
            break


def _next(points: list[_Point], goal: _Goal, top: int) -> float:
    """The quality to try next: by a line through the nearest points on both sides of the goal.

    Nearest by quality: values fall a little between some neighbouring qualities.
    """
    by_quality = sorted(points, key=lambda p: p.quality)
    below = next((p for p in reversed(by_quality) if p.value < goal.low), None)
    lowest = below.quality if below else 0
    above = next((p for p in by_quality if p.value > goal.high and p.quality > lowest), None)
    pair = [below, above] if below and above else points[-2:]
    last = pair[-1]
    quality = last.quality + (goal.aim - last.finite) / _slope(pair, goal.slope)
    low, high = below.quality if below else 1, above.quality if above else top
    return round(min(max(quality, low), high) * QUALITY_UNITS) / QUALITY_UNITS


def _slope(points: list[_Point], usual: float) -> float:
    """How fast values rise between the last two of these points."""
    if len(points) < 2:
        return usual
    first, second = points[-2:]
    slope = (second.finite - first.finite) / (second.quality - first.quality)
    return slope if slope > 0 else usual


def _chosen(points: list[_Point], goal: _Goal, target: Target, top: int, nearest: bool) -> Found:
    """The best of the files that were tried, if it is one that was asked for."""
    kept = [point for point in points if goal.is_kept(point)]
    best = min(kept or points, key=lambda point: abs(point.value - goal.aim))
    reached = len(best.data) if goal.is_size else best.value
    at_end = best.quality in (1, top) and not goal.is_met(best)
    if not nearest and (at_end or not kept):
        got = f"{len(best.data)} bytes" if goal.is_size else f"{best.value:.2f} dB"
        raise TargetError(
            f"{target.value:g} {UNITS[target.kind]} cannot be reached; the nearest is {got}, "
            f"with quality {best.quality:g}; --nearest (`nearest=True`) takes that"
        )
    return Found(best.data, best.quality, reached)

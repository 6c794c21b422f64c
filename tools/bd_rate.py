"""BD-rate: how much more or less rate a codec takes than an anchor for the same quality.

    python tools/bd_rate.py rd.json:jpeg420 rd.json
    python tools/bd_rate.py anchors.json:kodak/VTM-9.1 rd.json:cmamba anchors.json:kodak
    python tools/bd_rate.py rd.json:jpeg420 rd.json:cmamba --metric ms-ssim

Each argument is FILE or FILE:NAME, see tools/rd_curves.py; the first is one curve, the anchor. The
logarithm of the rate is interpolated over the quality in dB by a piecewise cubic that keeps
monotone data monotone (PCHIP), and the difference of the two is averaged over the qualities that
both codecs reach (Bjontegaard 2001, with PCHIP in the place of one cubic). Negative: fewer bits.

That range is reported, and a pair is refused whose range is small beside the curves, or whose
curves have fewer than four points or fall: then the number would say little. The exit status is 1
if a pair was refused. Curves of other images than the anchor's are marked, as far as files name
their images. Versions of one anchor differ by per cents (VTM's by 2), so its name and
source are always printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markdown_table import markdown_table, signed
from rd_curves import METRICS, Curve, CurveError, load_curve, load_curves

MIN_POINTS = 4
# What the common range of qualities must be at least, as a part of the smaller curve's.
MIN_OVERLAP = 0.5
COLUMNS = ("codec", "BD-rate", "over", "of anchor", "of codec")

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class BDRate:
    """A BD-rate and what it stands on.

    Attributes:
        percent: of the anchor's rate; -50 is half the bits.
        low, high: the qualities in dB between which it was taken, the range that both reach.
        of_anchor, of_test: that range as a part of the whole range of each curve, 0...1.
    """

    percent: float
    low: float
    high: float
    of_anchor: float
    of_test: float


# A curve with its BD-rate, or why there is none.
Outcome = tuple[Curve, BDRate | CurveError]


def bd_rate(anchor: Points, test: Points) -> BDRate:
    """Return the BD-rate of `test` against `anchor`.

    Needs the package `scipy` (extra `eval`).

    Args:
        anchor, test: (rate, quality in dB) of each point, in any order; rates in one unit.

    Raises:
        CurveError: too few points, too little overlap, or a quality that does not rise with rate.
    """
    curves = []
    for which, points in (("anchor", anchor), ("test", test)):
        rate, quality = np.array(sorted(points), dtype=np.float64).reshape(-1, 2).T
        if len(rate) < MIN_POINTS:
            raise CurveError(
                f"it takes {MIN_POINTS} points of each codec, the {which} has {len(rate)}"
            )
        if not np.isfinite(quality).all() or not (np.diff(quality) > 0).all():
            raise CurveError(
                f"quality must rise with rate, that of the {which} does not everywhere"
            )
        curves.append((quality, np.log(rate)))
    low, high = (float(f(quality[k] for quality, _ in curves)) for f, k in ((max, 0), (min, -1)))
    of_anchor, of_test = (float((high - low) / np.ptp(quality)) for quality, _ in curves)
    if high <= low:
        raise CurveError(
            f"there is no quality that both codecs reach: {low:.2f} is above {high:.2f} dB"
        )
    if max(of_anchor, of_test) < MIN_OVERLAP:
        raise CurveError(
            f"both codecs reach only {low:.2f} to {high:.2f} dB, {max(of_anchor, of_test):.0%} "
            f"of the smaller curve; at least {MIN_OVERLAP:.0%} are needed"
        )
    from scipy.interpolate import PchipInterpolator

    means = [PchipInterpolator(*curve).integrate(low, high) / (high - low) for curve in curves]
    percent = float(100 * np.expm1(means[1] - means[0]))
    return BDRate(percent, low, high, of_anchor, of_test)


def compare(anchor: Curve, test: Curve, metric: str) -> BDRate | CurveError:
    """Return the BD-rate of a curve against the anchor, or why there is none."""
    try:
        return bd_rate(anchor.points(metric), test.points(metric))
    except CurveError as error:
        return error


def compare_all(anchor: Curve, curves: Sequence[Curve], metric: str) -> list[Outcome]:
    """Return every curve but the anchor itself, with its BD-rate or why there is none."""
    return [(curve, compare(anchor, curve, metric)) for curve in curves if curve != anchor]


def caption(anchor: Curve, metric: str) -> str:
    """Return what a table of BD-rates is about."""
    on = anchor.dataset or "unnamed images"
    return f"BD-rate by {metric} against {anchor.label} on {on}, points from {anchor.source}"


def rows(anchor: Curve, outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """Return the outcomes as cells of `COLUMNS`, those that have a number by rising BD-rate."""
    found, refused = [], []
    for test, outcome in outcomes:
        name = f"{test.label} ({test.file}:{test.name})"
        if test.images != anchor.images:
            name += f", other images: {test.dataset or 'not named'}"
        if isinstance(outcome, CurveError):
            refused.append((name, f"none: {outcome}", "", "", ""))
        else:
            over = f"{outcome.low:.2f} to {outcome.high:.2f} dB"
            parts = f"{outcome.of_anchor:.0%}", f"{outcome.of_test:.0%}"
            found.append((outcome.percent, (name, signed(outcome.percent, 2), over, *parts)))
    return [cells for _, cells in sorted(found)] + refused


def table(anchor: Curve, metric: str, outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as text."""
    cells = markdown_table(COLUMNS, rows(anchor, outcomes), figures=4)
    return f"{caption(anchor, metric)}\n\n{cells}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("anchor", help="FILE:NAME, or FILE with one curve")
    add("tests", nargs="+", metavar="test", help="FILE:NAME, or FILE for all curves in it")
    add("--metric", choices=METRICS, default="psnr", help="default: psnr")
    args = parser.parse_args(argv)
    try:
        anchor = load_curve(args.anchor)
        tests = [curve for spec in args.tests for curve in load_curves(spec)]
        outcomes = compare_all(anchor, tests, args.metric)
    except CurveError as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}; in a clone: python -m pip install '.[eval]'")
    print(table(anchor, args.metric, outcomes))
    return int(any(isinstance(outcome, CurveError) for _, outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())

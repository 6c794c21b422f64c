"""BD-rate: how much more or less rate a codec takes than an anchor for the same quality.

    python tools/bd_rate.py rd.json:jpeg420 rd.json
    python tools/bd_rate.py anchors.json:kodak/VTM-9.1 rd.json:cmamba anchors.json:kodak
    python tools/bd_rate.py rd.json:jpeg420 rd.json:cmamba --metric ms-ssim

Each argument is FILE or FILE:NAME, see tools/rd_curves.py; the first is one curve, the anchor.  The
logarithm of the rate is interpolated over the quality in dB by a piecewise cubic that keeps
monotone data monotone (PCHIP), and the difference of the two is averaged over the qualities that
both codecs reach (Bjontegaard 2001, with PCHIP in the place of one cubic).  Negative: fewer bits.

That range is reported, and a pair is refused whose range is small beside the curves, or whose
curves have fewer than four points or fall: then the number would say little.  The exit status is 1
if a pair was refused.  Curves of other pictures than the anchor's are marked, as far as files name
their pictures.  Versions of one anchor differ by per cents (VTM's by 2), so its name and
source are always printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rd_curves import METRICS, Curve, CurveError, load_curve, load_curves

from cmamba_ref.atomic_write import write_atomically

MIN_POINTS = 4
MIN_OVERLAP = 0.5

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


def bd_rate(anchor: Points, test: Points, min_overlap: float = MIN_OVERLAP) -> BDRate:
    """BD-rate of `test` against `anchor`.

    Needs the package `scipy` (extra `eval`).

    Args:
        anchor, test: (rate, quality in dB) of each point, in any order; rates in one unit.
        min_overlap: what the common range of qualities must be at least, as a part of the range of
            the curve that has the smaller one.

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
    spans = [quality[-1] - quality[0] for quality, _ in curves]
    low = max(quality[0] for quality, _ in curves)
    high = min(quality[-1] for quality, _ in curves)
    if high <= low:
        raise CurveError(
            f"there is no quality that both codecs reach: {low:.2f} is above {high:.2f} dB"
        )
    if high - low < min_overlap * min(spans):
        raise CurveError(
            f"both codecs reach only {low:.2f} to {high:.2f} dB, {(high - low) / min(spans):.0%} "
            f"of the smaller curve; at least {min_overlap:.0%} are needed"
        )
    from scipy.interpolate import PchipInterpolator

    means = [PchipInterpolator(*curve).integrate(low, high) / (high - low) for curve in curves]
    percent = 100 * np.expm1(means[1] - means[0])
    return BDRate(
        float(percent), float(low), float(high), *(float((high - low) / s) for s in spans)
    )


def compare(
    anchor: Curve, tests: Sequence[Curve], metric: str, min_overlap: float = MIN_OVERLAP
) -> list[Outcome]:
    """The BD-rate of each curve against the anchor, or why there is none."""
    outcomes: list[Outcome] = []
    for test in tests:
        try:
            found = bd_rate(anchor.points(metric), test.points(metric), min_overlap)
            outcomes.append((test, found))
        except CurveError as error:
            outcomes.append((test, error))
    return outcomes


def as_json(anchor: Curve, metric: str, outcomes: Sequence[Outcome]) -> dict[str, object]:
    """The outcomes as JSON holds them."""
    return {
        "metric": metric,
        "interpolation": "PCHIP of log rate over dB",
        "anchor": anchor.identity(),
        "codecs": [
            test.identity()
            | ({"refused": str(o)} if isinstance(o, CurveError) else {"bd_rate": asdict(o)})
            for test, o in outcomes
        ],
    }


def table(anchor: Curve, metric: str, outcomes: Sequence[Outcome]) -> str:
    """The outcomes as text, those that have a number by rising BD-rate."""
    several = len({test.file for test, _ in outcomes}) > 1
    names = {id(t): f"{t.file}:{t.name}" if several else t.name for t, _ in outcomes}
    width = max(map(len, names.values()), default=0)
    lines = [
        f"BD-rate by {metric} against {anchor.label}, {anchor.dataset or 'pictures not named'}, "
        f"from {anchor.source}",
        f"{'':<{width}}{'BD-rate':>10}{'from':>8}{'to, dB':>8}{'of anchor':>11}{'of codec':>10}",
    ]
    found = [(test, o) for test, o in outcomes if isinstance(o, BDRate)]
    for test, o in sorted(found, key=lambda pair: pair[1].percent):
        lines.append(
            f"{names[id(test)]:<{width}}{o.percent:>+9.2f}%{o.low:>8.2f}{o.high:>8.2f}"
            f"{o.of_anchor:>11.0%}{o.of_test:>10.0%}"
            + ("" if test.pictures == anchor.pictures else f"  other pictures: {test.dataset}")
        )
    refused = [(test, o) for test, o in outcomes if isinstance(o, CurveError)]
    lines += [f"{names[id(test)]:<{width}}  none: {error}" for test, error in refused]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("anchor", help="FILE:NAME, or FILE with one curve")
    add("tests", nargs="+", metavar="test", help="FILE:NAME, or FILE for all curves in it")
    add("--metric", choices=METRICS, default="psnr", help="default: psnr")
    part = "part of the smaller curve that the other must cover (default: %(default)s)"
    add("--min-overlap", type=float, default=MIN_OVERLAP, help=part)
    add("--json", type=Path, metavar="FILE", help="write the numbers here")
    args = parser.parse_args(argv)
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json must lie in an existing directory, got {str(args.json)!r}")
    try:
        anchor = load_curve(args.anchor)
        tests = [curve for spec in args.tests for curve in load_curves(spec) if curve != anchor]
        outcomes = compare(anchor, tests, args.metric, args.min_overlap)
    except CurveError as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}; in a clone: python -m pip install '.[eval]'")
    print(table(anchor, args.metric, outcomes))
    if args.json:
        text = json.dumps(as_json(anchor, args.metric, outcomes), indent=1) + "\n"
        write_atomically(args.json, text.encode())
    return 1 if any(isinstance(outcome, CurveError) for _, outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())

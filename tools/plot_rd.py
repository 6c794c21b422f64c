"""Rate-distortion plots like the paper's Figs. 3 and 5: ours, measured and published points.

    python tools/plot_rd.py rd.json anchors.json:kodak/VTM-9.1 anchors.json:kodak/DCAE -o kodak.png
    python tools/plot_rd.py rd.json --metric ms-ssim -o kodak_ms_ssim.svg
    python tools/plot_rd.py rd.json --anchor anchors.json:kodak/VTM-9.1 --bpp 0 1.2 -o kodak.png

Each argument is FILE or FILE:NAME, see tools/rd_curves.py: what tools/eval_rd.py measured is drawn
with solid lines and filled marks, points out of tables with dashed lines and open marks. MS-SSIM
is in dB, -10 log10(1 - mean). With --anchor, the legend says each codec's BD-rate against it, and
the plot names the anchor and the source of its points. Curves of different images are labelled
with their images: they should not be compared.

Beside the plot, FILE.json holds the numbers that are in it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import bd_rate
from bd_rate import BDRate
from figures import new_figure, save
from PIL import Image
from rd_curves import METRICS, Curve, load_curve, load_curves

from cmamba_ref.atomic_write import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXES = {"psnr": "PSNR (RGB), dB", "ms-ssim": "MS-SSIM, dB"}
# In turn, so that many curves differ by more than their colour.
MARKS = "osD^vP*X"
NO_DITHER = Image.Dither.NONE


def draw(
    curves: Sequence[Curve],
    metric: str,
    anchor: Curve | None = None,
    bpp: tuple[float, float] | None = None,
) -> tuple[Figure, dict[str, object]]:
    """Return the plot, and the numbers in it.

    Args:
        bpp: the rates to show; None for all.

    Raises:
        CurveError: a curve does not have this metric.
    """
    figure = new_figure(7.2, 5.4)
    axes = figure.subplots()
    shown = []
    mixed = len({curve.images for curve in curves}) > 1
    for k, curve in enumerate(curves):
        points = curve.points(metric)
        label = curve.label + (f" on {curve.images or 'unnamed images'}" if mixed else "")
        found = None
        if anchor is not None and curve != anchor:
            found = bd_rate.compare(anchor, curve, metric)
            label += f" ({found.percent:+.1f} %)" if isinstance(found, BDRate) else " (no BD-rate)"
        axes.plot(
            *zip(*points, strict=True),
            f"{'-' if curve.is_measured else '--'}{MARKS[k % len(MARKS)]}",
            color=f"C{k % 10}",
            markersize=4.5,
            linewidth=1.6 if curve.is_measured else 1.1,
            fillstyle="full" if curve.is_measured else "none",
            label=label,
        )
        shown.append(
            {
                **curve.identity(),
                "bpp": [rate for rate, _ in points],
                "db": [quality for _, quality in points],
                "bd_rate_percent": found.percent if isinstance(found, BDRate) else None,
            }
        )
    if bpp is not None:  # and the qualities of the points that have these rates
        axes.set_xlim(*bpp)
        of_points = [point for curve in curves for point in curve.points(metric)]
        inside = [quality for rate, quality in of_points if bpp[0] <= rate <= bpp[1]]
        if inside:
            margin = 0.04 * (max(inside) - min(inside)) or 1
            axes.set_ylim(min(inside) - margin, max(inside) + margin)
    axes.set(xlabel="bits per pixel", ylabel=AXES[metric])
    axes.set_title("" if mixed else curves[0].dataset)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    if anchor is not None:
        text = f"in brackets: BD-rate against {anchor.label}, points from {anchor.source}"
        figure.supxlabel(text, fontsize=7)
    numbers = {
        "metric": metric,
        "anchor": anchor and {"label": anchor.label, "source": anchor.source},
        "curves": shown,
    }
    return figure, numbers


def load_with_anchor(specs: Sequence[str], anchor: str | None) -> tuple[list[Curve], Curve | None]:
    """Return all curves, and that of the anchor, which is among them."""
    curves = [curve for spec in specs for curve in load_curves(spec)]
    if anchor is None:
        return curves, None
    found = load_curve(anchor)
    return curves if found in curves else [*curves, found], found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("curves", nargs="+", metavar="curve", help="FILE:NAME, or FILE for all curves in it")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help=".png, .svg or .pdf")
    add("--metric", choices=METRICS, default="psnr", help="default: psnr")
    add("--anchor", help="FILE:NAME of the anchor of BD-rates; it is drawn too (default: none)")
    add("--bpp", type=float, nargs=2, metavar=("FROM", "TO"), help="show only these rates")
    args = parser.parse_args(argv)
    try:
        curves, anchor = load_with_anchor(args.curves, args.anchor)
        figure, numbers = draw(curves, args.metric, anchor, args.bpp)
        save(figure, args.output)
        if args.output.suffix == ".png":
            # Lines and letters need no more than 256 colours; the file is a third as large so.
            with Image.open(args.output) as image:
                few = image.convert("RGB").quantize(
                    method=Image.Quantize.FASTOCTREE, dither=NO_DITHER
                )
            few.save(args.output, optimize=True)
    except (ValueError, OSError) as error:  # of curves, and of matplotlib for an unknown suffix
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}; in a clone: python -m pip install '.[eval]'")
    text = json.dumps(numbers, indent=1) + "\n"
    write_atomically(args.output.with_name(args.output.name + ".json"), text.encode())
    against = f", BD-rates against {anchor.label} from {anchor.source}" if anchor else ""
    print(f"{args.output}: {len(curves)} curves by {args.metric}{against}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One page that shows what was measured: plots, tables, and pictures side by side.

    python tools/report.py rd.json -o report.html
    python tools/report.py rd.json --picture photo.png --quality 3 -o report.html
    python tools/report.py rd.json anchors.json:kodak/VTM-9.1 --anchor anchors.json:kodak/VTM-9.1 \\
        --picture a.png b.png --model runs/mine/model -o report.html

Each argument is FILE or FILE:NAME, see tools/rd_curves.py: what tools/eval_rd.py measured, or
points out of tables.  The page has their plots by PSNR and MS-SSIM, BD-rates against the --anchor,
every point in tables, and what it was all measured with.

Each --picture is encoded by the --model, and by the classical codecs at the quality whose file is
nearest in size to ours.  On the page a slider moves the boundary between any two of the results,
and a detail of all of them is magnified, at first the one that has most detail in the original.

The page is one file, that needs no network and no other file.  Pictures are in it as PNG, without
loss: whole where they fit into --megabytes, which they share equally, otherwise the largest part
around the detail that fits; the page says which.  Sizes, PSNR and MS-SSIM are always those of the
whole picture.

The exit status is 1 if a picture could not be coded, 2 for wrong arguments, 130 after Ctrl-C; the
page is written only when it is complete.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import bd_rate
import rd_curves
import rd_measure
from classical_codecs import CODECS
from embedded import data_uri, embed, most_detailed
from equal_size import RIVALS, versions_of
from figures import as_file
from plot_rd import AXES, draw
from provenance import of_run, versions
from rd_curves import METRICS, Curve
from report_page import EXTENT, Comparison, Plot, Rates, page
from tqdm import tqdm

from cmamba_ref import CMamba, CMambaError
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.errors import explain

# Those that have a part in what the page shows.
PACKAGES = ("cmamba-ref", "torch", "numpy", "pillow", "pytorch-msssim", "matplotlib", "scipy")
# The anchor of BD-rates unless another is named, where a file has it.
USUAL_ANCHOR = "jpeg420"


def plots_of(
    curves: Sequence[Curve], anchor: Curve | None, bpp: tuple[float, float] | None
) -> list[Plot]:
    """A plot by each metric, of the curves that have it; `bpp` as for `plot_rd.draw`."""
    plots = []
    for metric in METRICS:
        shown = [curve for curve in curves if metric in curve.qualities]
        if not shown:
            continue
        against = anchor if anchor in shown else None
        figure, _ = draw(shown, metric, anchor=against, bpp=bpp)
        labels = ", ".join(curve.label for curve in shown)
        plots.append(
            Plot(
                f"{AXES[metric]} over bits per pixel",
                data_uri(as_file(figure, "svg"), "image/svg+xml"),
                f"{AXES[metric]} over bits per pixel of {labels}; the numbers are in the tables",
            )
        )
    return plots


def rates_of(curves: Sequence[Curve], anchor: Curve) -> list[Rates]:
    """BD-rates of all other curves by each metric that the anchor and any of them have."""
    rates = []
    for metric in METRICS:
        others = [c for c in curves if c != anchor and metric in c.qualities]
        if others and metric in anchor.qualities:
            rates.append(Rates(metric, anchor, bd_rate.compare(anchor, others, metric)))
    return rates


def compare(
    path: Path,
    model: CMamba,
    quality: float | None,
    rivals: tuple[str, ...],
    most: int,
    begin: Callable[[str], None],
) -> Comparison:
    """A picture through all codecs, ready to be shown.

    Args:
        most: how many bytes of the page its versions may take together.
        begin: is told what comes next.
    """
    original = rd_measure.read_rgb(path)
    coded = versions_of(model, original, quality, rivals, begin)
    begin("embedding")
    place = most_detailed(original, EXTENT)
    window, uris = embed([original, *(version.picture for version in coded)], place, most)
    height, width = original.shape[:2]
    size = path.stat().st_size
    return Comparison(path.name, width, height, size, coded, window, uris, place)


def compare_all(
    paths: Sequence[Path],
    model: CMamba,
    quality: float | None,
    rivals: tuple[str, ...],
    most: int,
) -> list[Comparison]:
    """Every picture through all codecs, with a progress bar; `most` is for each."""
    comparisons = []
    form = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed} gone, {remaining} to go"
    total = len(paths) * (2 + len(rivals))
    with tqdm(total=total, bar_format=form, disable=None) as bar:
        for path in paths:

            def begin(what: str, name: str = path.name) -> None:
                bar.set_description_str(f"{name}: {what}")
                bar.update()

            comparisons.append(compare(path, model, quality, rivals, most, begin))
    return comparisons


def provenance_of(specs: Sequence[str], argv: list[str]) -> dict[str, dict[str, object]]:
    """What each file says of itself, and what this page was made with."""
    facts: dict[str, dict[str, object]] = {}
    for path in dict.fromkeys(rd_curves.split(spec)[0] for spec in specs):
        # BD-rates are in a table of their own.
        meta = rd_curves.load_meta(path)
        if kept := {key: value for key, value in meta.items() if not key.startswith("bd_rate")}:
            facts[str(path.name)] = kept
    facts["this page"] = {**of_run("report.py", argv), "versions": versions(*PACKAGES)}
    return facts


def parse(argv: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("curves", nargs="+", metavar="curve", help="FILE:NAME, or FILE for all curves in it")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the page")
    add(
        "--anchor",
        metavar="CURVE",
        help=f"FILE:NAME of the anchor of BD-rates (default: the first {USUAL_ANCHOR} there is)",
    )
    add("--bpp", type=float, nargs=2, metavar=("FROM", "TO"), help="plot only these rates")
    add("--picture", type=Path, nargs="+", default=[], metavar="FILE", help="pictures to compare")
    add("--model", default="tiny", help="name or directory of ours (default: tiny)")
    add("--quality", type=float, help="of ours (default: the model's)")
    add(
        "--codecs",
        nargs="*",
        choices=RIVALS,
        default=["jpeg420", "webp", "avif"],
        metavar="CODEC",
        help=f"to compare with, out of {' '.join(RIVALS)} (default: jpeg420 webp avif)",
    )
    add(
        "--megabytes",
        type=float,
        default=11,
        metavar="MB",
        help="that all pictures may take in the page together (default: 11)",
    )
    add("--title", default="CMamba: measured results", help="default: %(default)s")
    args = parser.parse_args(argv)
    if not args.output.parent.is_dir():
        parser.error(f"-o must lie in an existing directory, got {str(args.output)!r}")
    if not args.megabytes > 0:
        parser.error(f"--megabytes must be positive, got {args.megabytes:g}")
    return parser, args


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser, args = parse(argv)
    specs = [*args.curves, *([args.anchor] if args.anchor else [])]
    try:
        curves = [curve for spec in args.curves for curve in rd_curves.load_curves(spec)]
        if args.anchor:
            anchor = rd_curves.load_curve(args.anchor)
        else:
            anchor = next((curve for curve in curves if curve.name == USUAL_ANCHOR), None)
        if anchor is not None and anchor not in curves:
            curves.append(anchor)
        provenance = provenance_of(specs, argv)
        plots = plots_of(curves, anchor, args.bpp)
        rates = rates_of(curves, anchor) if anchor is not None else []
        for path in args.picture:
            rd_measure.read_rgb(path)
        model = rd_measure.load_model(args.model) if args.picture else None
        quality = model.check_quality(args.quality) if model is not None else None
    except (CMambaError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}; install the extra: pip install 'cmamba-ref[eval]'")
    if anchor is None:
        print(f"no BD-rates: no curve is named {USUAL_ANCHOR}; see --anchor", file=sys.stderr)
    rivals = tuple(key for key in args.codecs if CODECS[key].is_available())
    for key in args.codecs:
        if key not in rivals:
            print(f"{key} is left out: this Pillow cannot write it", file=sys.stderr)

    comparisons: list[Comparison] = []
    if model is not None:
        most = int(args.megabytes * 1e6 / len(args.picture))
        try:
            comparisons = compare_all(args.picture, model, quality, rivals, most)
        except KeyboardInterrupt:
            print("interrupted; no page was written", file=sys.stderr)
            return 130
        except Exception as error:
            if (reason := explain(error)) is None:
                raise
            print(f"{reason}; no page was written", file=sys.stderr)
            return 1
    text = page(args.title, plots, curves, rates, comparisons, provenance)
    write_atomically(args.output, text.encode())
    print(
        f"{args.output}: {len(curves)} curves, {len(comparisons)} pictures, "
        f"{args.output.stat().st_size / 1e6:.2f} MB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write one HTML page of results: plots, tables, and images side by side.

    python tools/report.py rd.json -o report.html
    python tools/report.py rd.json --image photo.png --quality 3 -o report.html
    python tools/report.py rd.json anchors.json:kodak/VTM-9.1 --anchor anchors.json:kodak/VTM-9.1 \\
        --image a.png b.png --model runs/mine/model -o report.html

Each argument is FILE or FILE:NAME, see tools/rd_curves.py. The page has plots by PSNR and MS-SSIM,
BD-rates against the --anchor, every point in tables, and provenance.

Each --image is encoded by the --model, and by classical codecs at the quality whose file is
nearest in size to ours. On the page a slider moves the boundary between any two of the results, and
a detail of all of them is magnified, at first the one with most detail in the original.

The page is one file that needs no network and no other file. Images are in it as PNG, without loss:
whole, or of large ones the part around the detail that is at most --side pixels wide and high.
Sizes, PSNR and MS-SSIM are those of the whole image. --crops draws that detail of the first image
after each codec, side by side.

The page is written only when it is complete. The exit status is 2 if it is not.
"""

from __future__ import annotations

import argparse
import base64
import functools
import io
import json
import math
import sys
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import bd_rate
import numpy as np
from classical_codecs import CODECS, ClassicalCodec
from figures import as_file
from markdown_table import signed
from PIL import Image, ImageDraw, ImageFont
from plot_rd import AXES, draw, load_with_anchor
from provenance import of_run, versions
from rd_curves import METRICS, Curve
from rd_measure import load_model, read_rgb
from tqdm import tqdm

import cmamba_ref
from cmamba_ref import CMamba
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.cli.demo import QUALITIES
from cmamba_ref.errors import explain
from cmamba_ref.metrics import MS_SSIM_MIN_SIDE, bits_per_pixel, ms_ssim, psnr

PACKAGES = (
    "cmamba-ref",
    "torch",
    "numpy",
    "pillow",
    "pytorch-msssim",
    "matplotlib",
    "scipy",
    "jinja2",
)
USUAL_ANCHOR = "jpeg420"
# The classical codecs that images are compared with; their settings are qualities from 1 to 100.
BASELINES = ("jpeg420", "webp", "avif")
# How many pixels wide the magnified detail is at first.
DETAIL = 96
# Of the figure of crops, in pixels: side of a crop, space between two, height of the caption.
CROP, GAP, CAPTION = 160, 8, 34


# ---------------------------------------------------------------- images


class Window(NamedTuple):
    """A rectangle of an image, in pixels."""

    left: int
    top: int
    width: int
    height: int

    def of(self, image: np.ndarray) -> np.ndarray:
        """Cut it out of an image `[H, W, ...]`."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


class Version(NamedTuple):
    """An image after one codec at one quality: uint8 `[H, W, 3]`, and bytes of the file."""

    name: str
    image: np.ndarray
    size: int


def nearest_file(codec: ClassicalCodec, original: np.ndarray, size: int) -> tuple[int, bytes]:
    """Return the quality whose file is nearest to `size` bytes, and that file.

    By bisection, as files grow with quality. Of two that are as near, the smaller.
    """
    encode = functools.cache(functools.partial(codec.encode, original))
    reaching = bisect_left(QUALITIES, size, key=lambda quality: len(encode(quality)))
    around = QUALITIES[max(reaching - 1, 0) : reaching + 1]
    quality = min(around, key=lambda quality: abs(len(encode(quality)) - size))
    return quality, encode(quality)


def versions_of(model: CMamba, original: np.ndarray, quality: float | None) -> list[Version]:
    """Code an image with our model, then with each classical codec at about the size of ours."""
    data = cmamba_ref.encode(original, model, quality)
    setting = "" if quality is None else f", quality {quality:g}"
    name = f"CMamba {model.config.name}{setting}"
    found = [Version(name, cmamba_ref.decode(data, model), len(data))]
    for codec in map(CODECS.__getitem__, BASELINES):
        if codec.is_available():
            chosen, file = nearest_file(codec, original, len(data))
            found.append(Version(f"{codec.name}, quality {chosen}", codec.decode(file), len(file)))
    return found


def window_around(image: np.ndarray, row: float, column: float, side: int) -> Window:
    """Return the window of at most `side` pixels with this middle, as far as the edges allow."""
    height, width = (min(side, length) for length in image.shape[:2])
    top = min(max(round(row - height / 2), 0), image.shape[0] - height)
    left = min(max(round(column - width / 2), 0), image.shape[1] - width)
    return Window(left, top, width, height)


def most_detailed(image: np.ndarray, side: int) -> Window:
    """Return the square whose neighbouring pixels differ most, of an image `[H, W, 3]`."""
    from scipy.ndimage import uniform_filter

    grey = image.astype(np.float64).mean(axis=-1)
    activity = sum(np.abs(difference) for difference in np.gradient(grey))
    means = uniform_filter(activity, side, mode="constant")
    row, column = np.unravel_index(means.argmax(), means.shape)
    return window_around(image, float(row), float(column), side)


def crops_side_by_side(original: np.ndarray, coded: Sequence[Version]) -> Image.Image:
    """Draw the detail of an image and its versions in a row, each with its name and size."""
    detail = most_detailed(original, CROP)
    panels = [Version("Original, as pixels", original, original.nbytes), *coded]
    figure = Image.new("RGB", ((CROP + GAP) * len(panels) - GAP, CROP + CAPTION), "white")
    pen, font = ImageDraw.Draw(figure), ImageFont.load_default(CAPTION * 0.38)
    for k, version in enumerate(panels):
        left = k * (CROP + GAP)
        figure.paste(Image.fromarray(detail.of(version.image)), (left, 0))
        note = f"{version.size:,} bytes"
        if k:
            note += f", {psnr(original, version.image):.2f} dB"
        name = version.name.partition(",")[0]
        pen.text((left, CROP + 2), f"{name}\n{note}", "black", font)
    return figure


def png(image: Image.Image) -> bytes:
    """Return an image as a PNG file."""
    image.save(buffer := io.BytesIO(), "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(data: bytes, kind: str) -> str:
    """Return a file inside an address."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


# ---------------------------------------------------------------- parts of the page


def plot(
    metric: str, curves: Sequence[Curve], anchor: Curve | None, bpp: tuple[float, float] | None
) -> tuple[str, str, str]:
    """Return title, curves and address of a plot; arguments as for `plot_rd.draw`."""
    figure, _ = draw(curves, metric, anchor if anchor in curves else None, bpp)
    labels = ", ".join(curve.label for curve in curves)
    uri = data_uri(as_file(figure, "svg"), "image/svg+xml")
    return f"{AXES[metric]} over bits per pixel", labels, uri


def points(curve: Curve) -> tuple[str, str, list[str], list[tuple[str, ...]]]:
    """Return label, caption, heading and rows of a table of a curve's points."""
    kind = "measured, means over the images" if curve.is_measured else "published points"
    on = f" on {curve.dataset}" if curve.dataset else ""
    return curve.label, f"{curve.label}{on}; {kind}, from {curve.source}", *curve.table()


def measures(version: Version, original: np.ndarray, ours: Version) -> str:
    """Return size, rate and quality of a version, of the whole image."""
    height, width = original.shape[:2]
    change = "" if version is ours else f" ({signed(100 * (version.size / ours.size - 1))})"
    decibels = psnr(original, version.image)
    parts = [
        f"{version.size:,} bytes{change}",
        f"{bits_per_pixel(version.size, width, height):.3f} bpp",
        "without loss" if math.isinf(decibels) else f"PSNR {decibels:.2f} dB",
    ]
    if min(height, width) >= MS_SSIM_MIN_SIDE:
        parts.append(f"MS-SSIM {ms_ssim(original, version.image):.4f}")
    return ", ".join(parts)


def comparison(
    path: Path, original: np.ndarray, coded: Sequence[Version], side: int
) -> dict[str, object]:
    """Return what the page shows of an image and its versions, ours first.

    Args:
        side: the largest side of the window that is embedded.
    """
    detail = most_detailed(original, DETAIL)
    middle = detail.top + detail.height / 2, detail.left + detail.width / 2
    window = window_around(original, *middle, side)
    size = f"{path.stat().st_size:,} bytes in its file"
    shown = [("Original", size, original)]
    shown += [(v.name, measures(v, original, coded[0]), v.image) for v in coded]
    return {
        "name": path.name,
        "width": original.shape[1],
        "height": original.shape[0],
        "window": window,
        "across": detail.left - window.left,
        "down": detail.top - window.top,
        "versions": [
            (name, note, data_uri(png(Image.fromarray(window.of(image))), "image/png"))
            for name, note, image in shown
        ],
    }


# ---------------------------------------------------------------- the command


def make(args: argparse.Namespace, argv: list[str]) -> str:
    """Return the page, and draw the crops."""
    curves, anchor = load_with_anchor(args.curves, args.anchor)
    if anchor is None:
        anchor = next((curve for curve in curves if curve.name == USUAL_ANCHOR), None)
    by_metric = {metric: [c for c in curves if c.has(metric)] for metric in METRICS}
    facts = {curve.file: curve.meta for curve in curves if curve.meta}
    facts["this page"] = {**of_run("report.py", argv), "versions": versions(*PACKAGES)}
    comparisons = []
    if args.image:
        originals = [read_rgb(path) for path in args.image]
        model = load_model(args.model)
        quality = model.check_quality(args.quality)
        for path, original in zip(tqdm(args.image, disable=None), originals, strict=True):
            coded = versions_of(model, original, quality)
            comparisons.append(comparison(path, original, coded, args.side))
            if args.crops and path == args.image[0]:
                write_atomically(args.crops, png(crops_side_by_side(original, coded)))
    # Here: it belongs to the extra `eval`, whose lack main() explains.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("report.html.jinja").render(
        plots=[plot(metric, them, anchor, args.bpp) for metric, them in by_metric.items() if them],
        bd_rate_columns=bd_rate.COLUMNS,
        bd_rates=[
            (
                bd_rate.caption(anchor, metric),
                bd_rate.rows(anchor, bd_rate.compare_all(anchor, them, metric)),
            )
            for metric, them in by_metric.items()
            if anchor in them
        ],
        curves=map(points, curves),
        comparisons=comparisons,
        # BD-rates are in a table of their own.
        provenance={
            name: json.dumps(
                {key: value for key, value in meta.items() if key != "bd_rates"}, indent=1
            )
            for name, meta in facts.items()
        },
    )


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("curves", nargs="+", metavar="curve", help="FILE:NAME, or FILE for all curves in it")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the page")
    usual = f"FILE:NAME of the anchor of BD-rates (default: the first {USUAL_ANCHOR} there is)"
    add("--anchor", metavar="CURVE", help=usual)
    add("--bpp", type=float, nargs=2, metavar=("FROM", "TO"), help="plot only these rates")
    add("--image", type=Path, nargs="+", default=[], metavar="FILE", help="images to compare")
    add("--model", default="tiny", help="name or directory of ours (default: tiny)")
    add("--quality", type=float, help="of ours (default: the model's)")
    add("--crops", type=Path, metavar="FILE", help="also draw a detail of the first image as PNG")
    embedded = "embed at most so many pixels across and down (default: %(default)s)"
    add("--side", type=int, default=1024, metavar="N", help=embedded)
    args = parser.parse_args(argv)
    if args.crops and not args.image:
        parser.error("--crops needs an image, see --image")
    if args.side < 1:
        parser.error(f"--side must be at least 1, got {args.side}")
    try:
        page = make(args, argv)
        write_atomically(args.output, page.encode())
    except ImportError as error:
        parser.error(f"{error}; in a clone: python -m pip install '.[eval]'")
    except Exception as error:
        if (reason := explain(error)) is None:
            raise
        parser.error(reason)
    print(f"{args.output}: {len(page) / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

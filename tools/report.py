"""Write one HTML page of results: plots, tables, and images side by side.

    python tools/report.py rd.json -o report.html
    python tools/report.py rd.json --picture photo.png --quality 3 -o report.html
    python tools/report.py rd.json anchors.json:kodak/VTM-9.1 --anchor anchors.json:kodak/VTM-9.1 \\
        --picture a.png b.png --model runs/mine/model -o report.html

Each argument is FILE or FILE:NAME, see tools/rd_curves.py. The page has plots by PSNR and MS-SSIM,
BD-rates against the --anchor, every point in tables, and provenance.

Each --picture is encoded by the --model, and by classical codecs at the quality whose file is
nearest in size to ours. On the page a slider moves the boundary between any two of the results, and
a detail of all of them is magnified, at first the one with most detail in the original.

The page is one file that needs no network and no other file. Images are in it as PNG, without loss:
whole where they fit into --megabytes, which they share equally, otherwise the largest part around
the detail that fits; the page says which. Sizes, PSNR and MS-SSIM are those of the whole image.
--crops draws that detail of the first image after each codec, side by side.

The exit status is 1 if an image could not be coded, 2 for wrong arguments, 130 after Ctrl-C; the
page is written only when it is complete.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import bd_rate
import numpy as np
import rd_curves
from bd_rate import BDRate
from classical_codecs import CODECS, ClassicalCodec
from figures import as_file
from PIL import Image, ImageDraw, ImageFont
from plot_rd import AXES, draw
from provenance import of_run, versions
from rd_curves import METRICS, Curve
from rd_measure import load_model, read_rgb
from tqdm import tqdm

import cmamba_ref
from cmamba_ref import CMamba, CMambaError
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.codec.images import write_png
from cmamba_ref.errors import explain
from cmamba_ref.metrics import MS_SSIM_MIN_SIDE, bits_per_pixel, ms_ssim, psnr

PACKAGES = ("cmamba-ref", "torch", "numpy", "pillow", "pytorch-msssim", "matplotlib", "scipy")
USUAL_ANCHOR = "jpeg420"
# The classical codecs whose settings are qualities from 1 to 100.
BASELINES = ("jpeg420", "jpeg444", "webp", "avif")
QUALITIES = range(1, 101)
COLUMNS = {
    "quality": ("quality", "g"),
    "bpp": ("bpp", ".4f"),
    "psnr": ("PSNR, dB", ".2f"),
    "ms-ssim": ("MS-SSIM", ".4f"),
    "encoding_time": ("encode, s", ".3f"),
    "decoding_time": ("decode, s", ".3f"),
}
# How many pixels wide the magnified details are, as the page offers it.
EXTENTS, EXTENT = (48, 96, 192), 96
# Of the figure of crops, in pixels: side of a crop, space between two, height of the caption.
CROP, GAP, CAPTION = 160, 8, 34
COMPARED = (
    "<h2>Images at about equal file size</h2><p>For each classical codec the quality was taken"
    " whose file is nearest in size to ours. Sizes are those of the files, headers included; PSNR"
    " (RGB) and MS-SSIM are those of the whole image in 8 bits. The images below are embedded"
    " without loss.</p>"
)
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src \
'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<h2>Rate and distortion</h2>
{body}
</main>
<script>
{script}</script>
</body>
</html>
"""
# The parts that only work by the script are hidden until it has set them up.
COMPARISON = """<section class="comparison" aria-labelledby="picture-{number}">
<h3 id="picture-{number}">{name}</h3>
<p>{width}x{height} pixels; {embedded}.</p>
<div data-needs-script hidden>
<div class="controls">
{selects}
</div>
<div class="view">
<div class="stage"></div>
<div class="controls">
<label>Boundary between left and right, drag here or on the image
<input type="range" min="0" max="100" value="50" data-boundary></label>
</div>
</div>
<p class="quiet">Below, the part in the frame of every version. Tap on the image to move it.</p>
<div class="controls">
<label>Frame, across <input type="range" min="0" max="{window.width}" value="{across}" data-across>
</label>
<label>Frame, down <input type="range" min="0" max="{window.height}" value="{down}" data-down>
</label>
<label>Side of the frame, pixels <select data-extent>{extents}</select></label>
</div>
</div>
<div class="versions">
{figures}
</div>
</section>"""


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
    files: dict[int, bytes] = {}
    low, high = QUALITIES[0], QUALITIES[-1]
    while low <= high:
        middle = (low + high) // 2
        files[middle] = codec.encode(original, middle)
        if len(files[middle]) < size:
            low = middle + 1
        else:
            high = middle - 1
    # The last file below the size and the first one above have both been made on the way.
    return min(files.items(), key=lambda item: (abs(len(item[1]) - size), item[0]))


def versions_of(
    model: CMamba, original: np.ndarray, quality: float | None, codecs: Sequence[str], bar: tqdm
) -> list[Version]:
    """Code an image with our model, then with each classical codec at about the size of ours."""
    data = cmamba_ref.encode(original, model, quality)
    setting = "" if quality is None else f", quality {quality:g}"
    name = f"CMamba {model.config.name}{setting}"
    found = [Version(name, cmamba_ref.decode(data, model), len(data))]
    for codec in map(CODECS.__getitem__, codecs):
        bar.update()
        chosen, file = nearest_file(codec, original, len(data))
        found.append(Version(f"{codec.name}, quality {chosen}", codec.decode(file), len(file)))
    return found


def most_detailed(image: np.ndarray, side: int) -> Window:
    """Return the square whose neighbouring pixels differ most, of an image `[H, W, 3]`."""
    grey = image.astype(np.float64).mean(axis=-1)
    activity = np.zeros_like(grey)
    activity[1:] += np.abs(np.diff(grey, axis=0))
    activity[:, 1:] += np.abs(np.diff(grey, axis=1))
    height, width = (min(side, length) for length in grey.shape)
    # The sum over any rectangle from the four corners of the running sums.
    sums = np.pad(activity, ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)
    rows = sums[height:] - sums[:-height]
    inside = rows[:, width:] - rows[:, :-width]
    top, left = np.unravel_index(inside.argmax(), inside.shape)
    return Window(int(left), int(top), width, height)


def embed(images: Sequence[np.ndarray], place: Window, most: int) -> tuple[Window, list[str]]:
    """Write images of one shape as data URIs of together at most `most` characters.

    Returns:
        The window that is embedded, the same for all: the whole where that fits, otherwise a part
        of the same proportions with `place` in its middle, as far as the edges allow. And the
        URIs. A window of one pixel is embedded whatever it takes.
    """
    height, width = images[0].shape[:2]
    part = 1.0
    while True:
        w, h = max(1, int(part * width)), max(1, int(part * height))
        left, top = place.left + (place.width - w) // 2, place.top + (place.height - h) // 2
        window = Window(min(max(left, 0), width - w), min(max(top, 0), height - h), w, h)
        uris = []
        for image in images:
            Image.fromarray(window.of(image)).save(buffer := io.BytesIO(), "PNG", optimize=True)
            uris.append(data_uri(buffer.getvalue(), "image/png"))
        length = sum(map(len, uris))
        if length <= most or (w, h) == (1, 1):
            return window, uris
        # Bytes go with the area; a little less, or a last per cent may take many turns.
        part *= min(0.95, math.sqrt(most / length))


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


def data_uri(data: bytes, kind: str) -> str:
    """Return a file inside an address."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


# ---------------------------------------------------------------- parts of the page


def text(value: object) -> str:
    """Write a JSON value as HTML text."""
    if isinstance(value, dict):
        return "; ".join(f"{text(key)}: {text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value)) or "none"
    return html.escape("none" if value is None else str(value))


def table(caption: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Write a table of HTML cells, which the keyboard reaches, to scroll where it is wide."""
    titles = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = ("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="table" tabindex="0" role="region" aria-label="{caption}"><table>\n'
        f"<caption>{caption}</caption>\n<thead><tr>{titles}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody>\n</table></div>"
    )


def percent(value: float, places: int) -> str:
    """Write a change with a minus that is as wide as the plus."""
    return f"{value:+.{places}f} %".replace("-", "−")


def plot(metric: str, curves: Sequence[Curve], anchor: Curve | None, bpp) -> str:
    """Draw the curves that have a metric; `bpp` as for `plot_rd.draw`."""
    shown = [curve for curve in curves if metric in curve.qualities]
    if not shown:
        return ""
    figure, _ = draw(shown, metric, anchor=anchor if anchor in shown else None, bpp=bpp)
    title = f"{AXES[metric]} over bits per pixel"
    of = text([curve.label for curve in shown])
    uri = data_uri(as_file(figure, "svg"), "image/svg+xml")
    alt = f"{title} of {of}; the numbers are in the tables"
    return f'<h3>{title}</h3>\n<img class="plot" src="{uri}" alt="{alt}">'


def rates(metric: str, curves: Sequence[Curve], anchor: Curve) -> str:
    """Tabulate codecs by rising BD-rate, then those that have none with the reason."""
    others = [c for c in curves if c != anchor and metric in c.qualities]
    if not others or metric not in anchor.qualities:
        return ""
    found, refused = [], []
    for test, outcome in bd_rate.compare(anchor, others, metric):
        same = test.pictures == anchor.pictures
        name = text(test.label + ("" if same else f" (on {test.dataset or 'what?'})"))
        if isinstance(outcome, BDRate):
            over = f"{outcome.low:.2f} to {outcome.high:.2f} dB"
            cells = [name, percent(outcome.percent, 2), over, text(test.source)]
            found.append((outcome.percent, cells))
        else:
            refused.append([name, "none", text(outcome), text(test.source)])
    caption = (
        f"BD-rate by {metric} against {text(anchor.label)} on "
        f"{text(anchor.dataset or 'images not named')}, points from {text(anchor.source)}; "
        "piecewise cubic, over the qualities that both codecs reach"
    )
    rows = [cells for _, cells in sorted(found)] + refused
    return table(caption, ("codec", "BD-rate", "over", "points from"), rows)


def points(curve: Curve, is_open: bool) -> str:
    """Tabulate the points of a curve, as they are in its file."""
    columns: dict[str, Sequence[float | None]] = {
        **curve.details,
        "bpp": curve.bpp,
        **curve.qualities,
    }
    shown = [key for key in COLUMNS if any(value is not None for value in columns.get(key, ()))]
    rows = [
        ["" if value is None else f"{value:{COLUMNS[key][1]}}" for key, value in zip(shown, row)]  # noqa: B905
        for row in zip(*(columns[key] for key in shown), strict=True)
    ]
    kind = "measured, means over the images" if curve.is_measured else "published points"
    on = f" on {curve.dataset}" if curve.dataset else ""
    caption = text(f"{curve.label}{on}; {kind}, from {curve.source}")
    body = table(caption, (COLUMNS[key][0] for key in shown), rows)
    opened = " open" if is_open else ""
    return f"<details{opened}><summary>{text(curve.label)}</summary>\n{body}\n</details>"


def measures(version: Version, original: np.ndarray, ours: Version) -> str:
    """Write size, rate and quality of a version, of the whole image."""
    height, width = original.shape[:2]
    change = ""
    if version is not ours:
        change = f" ({percent(100 * (version.size / ours.size - 1), 1)})"
    decibels = psnr(original, version.image)
    parts = [
        f"{version.size:,} bytes{change}, {bits_per_pixel(version.size, width, height):.3f} bpp",
        "without loss" if math.isinf(decibels) else f"PSNR {decibels:.2f} dB",
    ]
    if min(height, width) >= MS_SSIM_MIN_SIDE:
        parts.append(f"MS-SSIM {ms_ssim(original, version.image):.4f}")
    return "<br>".join(parts)


def comparison(
    path: Path, original: np.ndarray, number: int, coded: Sequence[Version], most: int
) -> str:
    """Put an image and its versions, ours first, under the slider; `most` as for `embed`."""
    detail = most_detailed(original, EXTENT)
    window, uris = embed([original, *(version.image for version in coded)], detail, most)
    height, width = original.shape[:2]
    embedded = "the whole image is embedded"
    if (window.width, window.height) != (width, height):
        embedded = (
            f"embedded are the {window.width}x{window.height} pixels from column {window.left}, "
            f"row {window.top}, so that the page stays small"
        )
    names = ["Original", *(text(version.name) for version in coded)]
    notes = [f"{path.stat().st_size:,} bytes in its file"]
    notes += [measures(version, original, coded[0]) for version in coded]
    selects = []
    for side, chosen in (("left", min(2, len(coded))), ("right", 1)):
        options = "".join(
            f'<option value="{k}"{" selected" if k == chosen else ""}>{name}</option>'
            for k, name in enumerate(names)
        )
        selects.append(f"<label>On the {side} <select data-side={side}>{options}</select></label>")
    return COMPARISON.format(
        number=number, name=text(path.name), width=width, height=height, embedded=embedded,
        selects="\n".join(selects), window=window,
        # A frame larger than the window is cut down by the script, and then begins at its edge.
        across=max(0, detail.left - window.left), down=max(0, detail.top - window.top),
        extents="".join(
            f"<option{' selected' if extent == EXTENT else ''}>{extent}</option>"
            for extent in EXTENTS
        ),
        figures="\n".join(
            f'<figure><img src="{uri}" width="{window.width}" height="{window.height}"'
            f' alt="{name}"><figcaption><strong>{name}</strong><br>{note}</figcaption></figure>'
            for name, uri, note in zip(names, uris, notes, strict=True)
        ),
    )  # fmt: skip


def provenance(specs: Sequence[str], argv: list[str]) -> str:
    """List what each file says of itself, and what this page was made with."""
    facts: dict[str, dict[str, object]] = {}
    for path in dict.fromkeys(rd_curves.split(spec)[0] for spec in specs):
        # BD-rates are in a table of their own.
        meta = rd_curves.load_meta(path)
        if kept := {key: value for key, value in meta.items() if not key.startswith("bd_rate")}:
            facts[path.name] = kept
    facts["this page"] = {**of_run("report.py", argv), "versions": versions(*PACKAGES)}
    parts = ["<h2>Provenance</h2>"]
    for name, of_file in facts.items():
        entries = "\n".join(
            f"<dt>{text(key.replace('_', ' '))}</dt><dd>{text(value)}</dd>"
            for key, value in of_file.items()
        )
        parts.append(
            f"<details><summary>{text(name)}</summary>\n<dl>\n{entries}\n</dl>\n</details>"
        )
    return "\n".join(parts)


# ---------------------------------------------------------------- the command


def parse(argv: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("curves", nargs="+", metavar="curve", help="FILE:NAME, or FILE for all curves in it")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the page")
    usual = f"FILE:NAME of the anchor of BD-rates (default: the first {USUAL_ANCHOR} there is)"
    add("--anchor", metavar="CURVE", help=usual)
    add("--bpp", type=float, nargs=2, metavar=("FROM", "TO"), help="plot only these rates")
    add("--picture", type=Path, nargs="+", default=[], metavar="FILE", help="images to compare")
    add("--model", default="tiny", help="name or directory of ours (default: tiny)")
    add("--quality", type=float, help="of ours (default: the model's)")
    few = ["jpeg420", "webp", "avif"]
    which = f"to compare with, of {' '.join(BASELINES)} (default: {' '.join(few)})"
    add("--codecs", nargs="*", choices=BASELINES, default=few, metavar="CODEC", help=which)
    budget = "that all images may take in the page together (default: 11)"
    add("--crops", type=Path, metavar="FILE", help="also draw a detail of the first image as PNG")
    add("--megabytes", type=float, default=11, metavar="MB", help=budget)
    add("--title", default="CMamba: measured results", help="default: %(default)s")
    args = parser.parse_args(argv)
    if not args.output.parent.is_dir():
        parser.error(f"-o must lie in an existing directory, got {str(args.output)!r}")
    if args.crops and not args.picture:
        parser.error("--crops needs an image, see --picture")
    if not args.megabytes > 0:
        parser.error(f"--megabytes must be positive, got {args.megabytes:g}")
    return parser, args


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser, args = parse(argv)
    specs = [*args.curves, *([args.anchor] if args.anchor else [])]
    try:
        curves, anchor = rd_curves.load_with_anchor(args.curves, args.anchor)
        if anchor is None:
            anchor = next((curve for curve in curves if curve.name == USUAL_ANCHOR), None)
        parts = [plot(metric, curves, anchor, args.bpp) for metric in METRICS]
        if anchor is not None:
            parts += [rates(metric, curves, anchor) for metric in METRICS]
        parts += [points(curve, is_open=k == 0) for k, curve in enumerate(curves)]
        originals = [read_rgb(path) for path in args.picture]
        model = load_model(args.model) if originals else None
        quality = None if model is None else model.check_quality(args.quality)
        last = provenance(specs, argv)
    except (CMambaError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}; in a clone: python -m pip install '.[eval]'")
    if anchor is None:
        print(f"no BD-rates: no curve is named {USUAL_ANCHOR}; see --anchor", file=sys.stderr)
    codecs = [key for key in args.codecs if CODECS[key].is_available()]
    for key in {*args.codecs} - {*codecs}:
        print(f"{key} is left out: this Pillow cannot write it", file=sys.stderr)
    if model is not None:
        most = int(args.megabytes * 1e6 / len(originals))
        form = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed} gone, {remaining} to go"
        total = len(originals) * (1 + len(codecs))
        parts.append(COMPARED)
        try:
            with tqdm(total=total, bar_format=form, disable=None) as bar:
                for k, (path, original) in enumerate(zip(args.picture, originals, strict=True)):
                    bar.set_description_str(path.name)
                    coded = versions_of(model, original, quality, codecs, bar)
                    parts.append(comparison(path, original, k, coded, most))
                    if args.crops and k == 0:
                        write_png(args.crops, np.asarray(crops_side_by_side(original, coded)))
                    bar.update()
        except KeyboardInterrupt:
            print("interrupted; no page was written", file=sys.stderr)
            return 130
        except Exception as error:
            if (reason := explain(error)) is None:
                raise
            print(f"{reason}; no page was written", file=sys.stderr)
            return 1
    style, script = (Path(__file__).with_suffix(s).read_text() for s in (".css", ".js"))
    made = PAGE.format(
        title=text(args.title),
        style=style,
        body="\n".join([*filter(None, parts), last]),
        script=script if originals else "",
    )
    write_atomically(args.output, made.encode())
    megabytes = args.output.stat().st_size / 1e6
    print(f"{args.output}: {len(curves)} curves, {len(originals)} images, {megabytes:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

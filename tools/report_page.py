"""The page of tools/report.py: HTML out of curves, BD-rates, plots and compared pictures.

Everything is inside the page, and its policy forbids the browser to load anything from elsewhere.
The style and the script are report_page.css and report_page.js beside this file.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bd_rate import BDRate
from embedded import Window
from equal_size import Version
from rd_curves import Curve, CurveError

POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)
COLUMNS = {
    "quality": "quality",
    "bpp": "bpp",
    "psnr": "PSNR, dB",
    "ms-ssim": "MS-SSIM",
    "encoding_time": "encode, s",
    "decoding_time": "decode, s",
}
# How many pixels wide the compared details are, as the page offers it.
EXTENTS = (48, 96, 192)
EXTENT = 96


@dataclass(frozen=True)
class Plot:
    """A drawing as a data URI, and what it shows in words."""

    title: str
    uri: str
    description: str


@dataclass(frozen=True)
class Rates:
    """BD-rates by one metric."""

    metric: str
    anchor: Curve
    outcomes: Sequence[tuple[Curve, BDRate | CurveError]]


@dataclass(frozen=True)
class Comparison:
    """A picture, and what codecs make of it at about one file size.

    Attributes:
        width, height: of the whole picture.
        size: bytes of the original's file.
        versions: ours first.
        window: what of each picture is embedded.
        uris: the original's and those of the versions.
        detail: what of the picture is magnified at first; inside the window.
    """

    name: str
    width: int
    height: int
    size: int
    versions: Sequence[Version]
    window: Window
    uris: Sequence[str]
    detail: Window


def page(
    title: str,
    plots: Sequence[Plot],
    curves: Sequence[Curve],
    rates: Sequence[Rates],
    comparisons: Sequence[Comparison],
    provenance: dict[str, dict[str, object]],
) -> str:
    """The whole document.

    Args:
        provenance: by what it is of, a file or this page.
    """
    here = Path(__file__)
    style = here.with_suffix(".css").read_text()
    script = here.with_suffix(".js").read_text() if comparisons else ""
    parts = [
        f"<h1>{_text(title)}</h1>",
        "<h2>Rate and distortion</h2>",
        *map(_plot, plots),
        *map(_rates, rates),
        *(_curve(curve, is_open=k == 0) for k, curve in enumerate(curves)),
    ]
    if comparisons:
        parts += ["<h2>Pictures at about equal file size</h2>", COMPARED]
        parts += [_comparison(comparison, k) for k, comparison in enumerate(comparisons)]
    parts.append("<h2>What it was measured with</h2>")
    parts += [_provenance(name, facts) for name, facts in provenance.items()]
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>
{script}</script>
</body>
</html>
"""


COMPARED = (
    "<p>For each classical codec the whole quality was taken whose file is nearest in size to ours."
    " Sizes are those of the files, headers included; PSNR (RGB) and MS-SSIM are those of the whole"
    " picture in 8 bits. The pictures below are embedded without loss.</p>"
)


def _text(value: object) -> str:
    return html.escape(str(value))


# ---------------------------------------------------------------- curves


def _plot(plot: Plot) -> str:
    image = f'<img class="plot" src="{plot.uri}" alt="{_text(plot.description)}">'
    return f"<h3>{_text(plot.title)}</h3>\n{image}"


def _table(caption: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; cells are HTML. It can be reached by keyboard, to be scrolled where it is wide."""
    titles = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = ("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="table" tabindex="0" role="region" aria-label="{caption}"><table>\n'
        f"<caption>{caption}</caption>\n<thead><tr>{titles}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody>\n</table></div>"
    )


def _rates(rates: Rates) -> str:
    """Codecs by rising BD-rate, then those that have none with the reason."""
    anchor = rates.anchor
    on = _text(anchor.dataset or "pictures not named")
    caption = (
        f"BD-rate by {rates.metric} against {_text(anchor.label)} on {on}, points from "
        f"{_text(anchor.source)}; piecewise cubic, over the qualities that both codecs reach"
    )
    found = [(test, o) for test, o in rates.outcomes if isinstance(o, BDRate)]
    rows = [
        [
            _named(test, anchor),
            f"{o.percent:+.2f} %".replace("-", "−"),
            f"{o.low:.2f} to {o.high:.2f} dB",
            _text(test.source),
        ]
        for test, o in sorted(found, key=lambda pair: pair[1].percent)
    ]
    rows += [
        [_named(test, anchor), "none", _text(o), _text(test.source)]
        for test, o in rates.outcomes
        if isinstance(o, CurveError)
    ]
    return _table(caption, ("codec", "BD-rate", "over", "points from"), rows)


def _named(test: Curve, anchor: Curve) -> str:
    other = "" if test.pictures == anchor.pictures else f" (on {test.dataset or 'what?'})"
    return _text(test.label + other)


def _curve(curve: Curve, *, is_open: bool) -> str:
    """The points of a curve, as they are in its file."""
    columns: dict[str, tuple[float | None, ...]] = {
        **curve.details,
        "bpp": curve.bpp,
        **curve.qualities,
    }
    shown = [key for key in COLUMNS if any(value is not None for value in columns.get(key, ()))]
    kind = "measured, means over the pictures" if curve.is_measured else "published points"
    on = f" on {curve.dataset}" if curve.dataset else ""
    table = _table(
        _text(f"{curve.label}{on}; {kind}, from {curve.source}"),
        (COLUMNS[key] for key in shown),
        ([_value(key, columns[key][k]) for key in shown] for k in range(len(curve.bpp))),
    )
    opened = " open" if is_open else ""
    return f"<details{opened}><summary>{_text(curve.label)}</summary>\n{table}\n</details>"


def _value(key: str, value: float | None) -> str:
    if value is None:
        return ""
    digits = {"quality": "g", "psnr": ".2f", "ms-ssim": ".4f", "bpp": ".4f"}.get(key, ".3f")
    return f"{value:{digits}}"


# ---------------------------------------------------------------- pictures


def _comparison(comparison: Comparison, number: int) -> str:
    """The parts that only work by the script are hidden until it has set them up."""
    c = comparison
    names = ["Original", *(version.name for version in c.versions)]
    within = c.window
    if (within.width, within.height) == (c.width, c.height):
        embedded = "the whole picture is embedded"
    else:
        embedded = (
            f"embedded are the {within.width}x{within.height} pixels from column {within.left}, "
            f"row {within.top}, so that the page stays small"
        )
    # On the left the first rival, as far as there is one.
    options = {"left": min(2, len(c.versions)), "right": 1}
    selects = "\n".join(_select(side, names, chosen) for side, chosen in options.items())
    notes = [f"{c.size:,} bytes in its file"] + [_measures(v, c.versions[0]) for v in c.versions]
    figures = "\n".join(
        f'<figure><img src="{uri}" width="{within.width}" height="{within.height}"'
        f' alt="{_text(name)}"><figcaption><strong>{_text(name)}</strong><br>{note}'
        "</figcaption></figure>"
        for name, uri, note in zip(names, c.uris, notes, strict=True)
    )
    extents = "".join(
        f"<option{' selected' if extent == EXTENT else ''}>{extent}</option>" for extent in EXTENTS
    )
    # A frame larger than the window is cut down by the script, and then begins at its edge.
    across, down = max(0, c.detail.left - within.left), max(0, c.detail.top - within.top)
    return f"""<section class="comparison" aria-labelledby="picture-{number}">
<h3 id="picture-{number}">{_text(c.name)}</h3>
<p>{c.width}x{c.height} pixels; {embedded}.</p>
<div data-needs-script hidden>
<div class="controls">
{selects}
</div>
<div class="view">
<div class="stage"></div>
<div class="controls">
<label>Boundary between left and right, drag here or on the picture
<input type="range" min="0" max="100" value="50" data-boundary></label>
</div>
</div>
<p class="quiet">Below, the part in the frame of every version. Tap on the picture to move it.</p>
<div class="controls">
<label>Frame, across <input type="range" min="0" max="{within.width}" value="{across}" data-across>
</label>
<label>Frame, down <input type="range" min="0" max="{within.height}" value="{down}" data-down>
</label>
<label>Side of the frame, pixels <select data-extent>{extents}</select></label>
</div>
</div>
<div class="versions">
{figures}
</div>
</section>"""


def _select(side: str, names: Sequence[str], chosen: int) -> str:
    options = "".join(
        f'<option value="{k}"{" selected" if k == chosen else ""}>{_text(name)}</option>'
        for k, name in enumerate(names)
    )
    return f"<label>On the {side} <select data-side={side}>{options}</select></label>"


def _measures(version: Version, ours: Version) -> str:
    against = ""
    if version is not ours:
        against = f" ({100 * (version.size / ours.size - 1):+.1f} %)".replace("-", "−")
    parts = [
        f"{version.size:,} bytes{against}, {version.bpp:.3f} bpp",
        "without loss" if math.isinf(version.psnr) else f"PSNR {version.psnr:.2f} dB",
    ]
    if version.ms_ssim is not None:
        parts.append(f"MS-SSIM {version.ms_ssim:.4f}")
    return "<br>".join(parts)


# ---------------------------------------------------------------- provenance


def _provenance(name: str, facts: dict[str, object]) -> str:
    entries = "\n".join(
        f"<dt>{_text(key.replace('_', ' '))}</dt><dd>{_text(_plain(value))}</dd>"
        for key, value in facts.items()
    )
    return f"<details><summary>{_text(name)}</summary>\n<dl>\n{entries}\n</dl>\n</details>"


def _plain(value: object) -> str:
    """A JSON value as words."""
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value) or "none"
    return "none" if value is None else str(value)

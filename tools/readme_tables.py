"""Renew what README.md, docs/benchmarks.md and the model card say of the bundled weights.

    python tools/readme_tables.py            # writes them
    python tools/readme_tables.py --check    # names those that are out of date; changes nothing

The text between `<!-- table: NAME -->` and `<!-- end -->` is replaced, from benchmarks/:

    kodak       each quality on Kodak, beside the rate of JPEG 4:2:0 at the same PSNR
    bd_rates    BD-rates of all that was measured there, and ours against each
    published   only the row of our measured model

Other tables are kept by hand, and tests compare them with their JSON. The exit status of --check is
1 if a table is out of date. `python tools/measure_all.py kodak --weights` runs this.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import bd_rate
import numpy as np
import rd_curves
from bd_rate import BDRate
from markdown_table import markdown_table
from provenance import in_words
from rd_curves import METRICS, Curve

from cmamba_ref import CMambaError
from cmamba_ref.atomic_write import write_atomically

ROOT = Path(__file__).resolve().parents[1]
# The tables that each page must have, once each.
PAGES = {
    "README.md": ["kodak"],
    "docs/benchmarks.md": ["bd_rates", "published"],
    "cmamba_ref/pretrained/tiny/README.md": ["kodak"],
}
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
OURS, JPEG, VTM = "cmamba", "jpeg420", "VTM-9.1"
NONE = "–"


def kodak(folder: Path, _: str) -> str:
    """The table of our qualities."""
    from scipy.interpolate import PchipInterpolator

    measured = json.loads((folder / "kodak_tiny.json").read_text())
    ours, jpeg = measured[OURS]["results"], measured[JPEG]["results"]
    # As for BD-rates: the logarithm of the rate over PSNR, by piecewise cubics.
    log_rate = PchipInterpolator(jpeg["psnr-rgb"], np.log(jpeg["bpp"]), extrapolate=False)
    rows = []
    for k, quality in enumerate(ours["quality"]):
        bpp, psnr = ours["bpp"][k], ours["psnr-rgb"][k]
        rival = float(np.exp(log_rate(psnr)))
        beside = (NONE, NONE)
        if not np.isnan(rival):
            beside = (f"{rival:.3f}", signed(100 * (bpp / rival - 1), 0))
        cells = f"{quality:g}", f"{bpp:.3f}", f"{psnr:.2f}", f"{ours['ms-ssim-rgb'][k]:.4f}"
        times = f"{ours['encoding_time'][k]:.2f} / {ours['decoding_time'][k]:.2f}"
        rows.append((*cells, *beside, times))
    heading = ("quality", "bpp", "PSNR, dB", "MS-SSIM", "JPEG 4:2:0 at this PSNR, bpp")
    table = markdown_table((*heading, "ours against it", "encode / decode, s"), rows, figures=6)
    return f"\n{table}\n\n{in_words(measured['meta'])}\n\n"


def bd_rates(folder: Path, _: str) -> str:
    """The table of BD-rates, the best codec by PSNR first."""
    curves = {c.name: c for c in rd_curves.load_curves(str(folder / "kodak_tiny.json"))}
    ours, anchor = curves[OURS], curves[JPEG]
    found = [
        (
            curve,
            [rate(anchor, curve, metric) for metric in METRICS],
            [None if curve is ours else rate(curve, ours, metric) for metric in METRICS],
        )
        for curve in curves.values()
    ]
    found.sort(key=lambda row: (row[0] is anchor, row[1][0] or 0))
    rows = [(curve.label, *map(signed, [*of, *against])) for curve, of, against in found]
    heading = ("", "BD-rate by PSNR", "by MS-SSIM", "ours against it by PSNR", "by MS-SSIM")
    return f"\n{markdown_table(heading, rows, figures=4)}\n\n"


def published(folder: Path, before: str) -> str:
    """The table of published codecs with our row renewed: BD-rate against VTM, and times."""
    file = "kodak_tiny.json"
    measured = json.loads((folder / file).read_text())
    curve = rd_curves.load_curve(f"{folder / file}:{OURS}")
    anchor = rd_curves.load_curve(f"{folder / 'published_kodak.json'}:{VTM}")
    times = [np.mean(measured[OURS]["results"][f"{d}ing_time"]) for d in ("encod", "decod")]
    took = "encoding {:.3f} s, decoding {:.3f} s".format(*times)
    lines = before.splitlines(keepends=True)
    for k, line in enumerate(lines):
        cells = line.split(" | ")
        if cells[:2] == ["| measured", curve.label]:
            cells[2] = signed(rate(anchor, curve, "psnr"))
            cells[6] = f"{took}, {measured['meta']['machine']}, mean over all points"
            lines[k] = " | ".join(cells)
    return "".join(lines)


TABLES = {"kodak": kodak, "bd_rates": bd_rates, "published": published}


def rate(anchor: Curve, test: Curve, metric: str) -> float | None:
    """Return the BD-rate of a curve in per cent; None where there is none."""
    if test is anchor:
        return 0.0
    ((_, outcome),) = bd_rate.compare(anchor, [test], metric)
    return outcome.percent if isinstance(outcome, BDRate) else None


def signed(percent: float | None, places: int = 1) -> str:
    """Write a change as the README does, with a minus that is as wide as the plus."""
    if percent is None:
        return NONE
    text = f"{percent:+.{places}f} %".replace("-", "−")
    return text[1:] if float(f"{percent:.{places}f}") == 0 else text


def filled(text: str, folder: Path) -> tuple[str, list[str]]:
    """Return a page with renewed tables, and the names of those that changed."""
    changed = []

    def fill(match: re.Match[str]) -> str:
        begin, name, before, end = match.groups()
        made = TABLES[name](folder, before) if name in TABLES else before
        if made != before:
            changed.append(name)
        return begin + made + end

    return BLOCK.sub(fill, text), changed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--check", action="store_true", help="change nothing; 1 if a table is out of date")
    add("--pages", type=Path, default=ROOT, metavar="DIR", help="another repository's pages")
    add("--results", type=Path, default=ROOT / "benchmarks", metavar="DIR", help="other results")
    args = parser.parse_args(argv)
    outdated = False
    for page, names in PAGES.items():
        try:
            before = (args.pages / page).read_text()
            text, changed = filled(before, args.results)
        except (CMambaError, OSError) as error:
            parser.error(f"{page}: {error}")
        except ImportError as error:
            parser.error(f"{error}; in a clone: python -m pip install '.[eval]'")
        found = sorted(match[2] for match in BLOCK.finditer(before) if match[2] in TABLES)
        if found != names:
            parser.error(f"{page}: must have the tables {names} once each, got {found}")
        outdated |= bool(changed)
        if changed and not args.check:
            write_atomically(args.pages / page, text.encode())
        state = "out of date, run python tools/readme_tables.py" if args.check else "renewed"
        print(f"{page}: {', '.join(changed) or 'no table'} {state}")
    return int(args.check and outdated)


if __name__ == "__main__":
    sys.exit(main())

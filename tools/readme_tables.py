"""Renew what README.md, docs/benchmarks.md and the model card say of the weights of `tiny`.

    python tools/readme_tables.py            # writes them
    python tools/readme_tables.py --check    # names those that are out of date; changes nothing

The text between `<!-- table: NAME -->` and `<!-- end -->` is replaced, from benchmarks/:

    kodak       each quality on Kodak, beside the rate of JPEG 4:2:0 at the same PSNR
    bd_rates    BD-rates of all that was measured there, and ours against each
    folders     BD-rates by PSNR there and on further folders of images
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
from bd_rate import BDRate
from markdown_table import markdown_table, signed
from provenance import in_words
from rd_curves import METRICS, Curve, load_curve, load_curves

from cmamba_ref import CMambaError
from cmamba_ref.atomic_write import write_atomically

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
PAGES = ("README.md", "docs/benchmarks.md", "cmamba_ref/pretrained/tiny/README.md")
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
OURS, JPEG, AVIF, VTM = "cmamba", "jpeg420", "avif", "VTM-9.1"
# Results on further folders of images, and what the folders are called.
FOLDERS = {"kodak_tiny": "Kodak", "cbsd68_tiny": "CBSD68", "curban100_tiny": "Urban100"}


def kodak(folder: Path, _: str) -> str:
    """Return the table of our qualities."""
    from scipy.interpolate import PchipInterpolator

    measured = json.loads((folder / "kodak_tiny.json").read_text())
    ours, jpeg = measured[OURS]["results"], measured[JPEG]["results"]
    # As for BD-rates: the logarithm of the rate over PSNR, by piecewise cubics.
    log_rate = PchipInterpolator(jpeg["psnr-rgb"], np.log(jpeg["bpp"]), extrapolate=False)
    keys = ("quality", "bpp", "psnr-rgb", "ms-ssim-rgb", "encoding_time", "decoding_time")
    rows = []
    for quality, bpp, psnr, ms_ssim, encoding, decoding in zip(
        *(ours[key] for key in keys), strict=True
    ):
        baseline = float(np.exp(log_rate(psnr)))
        beside = ("–", "–")  # JPEG does not reach this PSNR
        if not np.isnan(baseline):
            beside = (f"{baseline:.3f}", signed(100 * (bpp / baseline - 1), 0))
        cells = f"{quality:g}", f"{bpp:.3f}", f"{psnr:.2f}", f"{ms_ssim:.4f}"
        rows.append((*cells, *beside, f"{encoding:.2f} / {decoding:.2f}"))
    heading = ("quality", "bpp", "PSNR, dB", "MS-SSIM", "JPEG 4:2:0 at this PSNR, bpp")
    table = markdown_table((*heading, "ours against it", "encode / decode, s"), rows, figures=6)
    return f"\n{table}\n\n{in_words(measured['meta'])}\n\n"


def bd_rates(folder: Path, _: str) -> str:
    """Return the table of BD-rates, the best codec by PSNR first."""
    curves = {c.name: c for c in load_curves(str(folder / "kodak_tiny.json"))}
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


def folders(folder: Path, _: str) -> str:
    """Return the table of BD-rates by PSNR on every folder of images."""
    labels: dict[str, str] = {}  # in the order of the first folder
    rows, models = [], []
    for stem, name in FOLDERS.items():
        path = folder / f"{stem}.json"
        meta = json.loads(path.read_text())["meta"]
        models.append(meta["models"][OURS])
        if models[0] != models[-1]:
            raise CMambaError(f"{path.name} was not measured with the bundled weights; renew it")
        curves = {curve.name: curve for curve in load_curves(str(path))}
        anchor, ours = curves.pop(JPEG), curves[OURS]
        found = meta["bd_rates"]["psnr"]["codecs"]
        low, high = next(entry["interval_95"] for entry in found if entry["name"] == OURS)
        labels = labels or {curve.name: curve.label for curve in curves.values()}
        cells = [signed(rate(anchor, curves[codec], "psnr")) for codec in labels]
        against = signed(rate(curves[AVIF], ours, "psnr"))
        images = str(len(meta["images"]["names"]))
        rows.append((name, images, *cells, f"{signed(low)} to {signed(high)}", against))
    heading = ["", "images", *labels.values(), "interval of ours", f"ours against {labels[AVIF]}"]
    return f"\n{markdown_table(heading, rows, figures=len(heading) - 1)}\n\n"


def published(folder: Path, before: str) -> str:
    """Return the table of published codecs with our row renewed: BD-rate against VTM, and times."""
    curve = load_curve(f"{folder / 'kodak_tiny.json'}:{OURS}")
    anchor = load_curve(f"{folder / 'published_kodak.json'}:{VTM}")
    encoding, decoding = (np.mean(curve.results[f"{d}ing_time"]) for d in ("encod", "decod"))
    lines = before.splitlines(keepends=True)
    for k, line in enumerate(lines):
        cells = line.split(" | ")
        if cells[:2] == ["| measured", curve.label]:
            cells[2] = signed(rate(anchor, curve, "psnr"))
            cells[6] = (
                f"encoding {encoding:.3f} s, decoding {decoding:.3f} s, {curve.meta['machine']}, "
                "mean over all points"
            )
            lines[k] = " | ".join(cells)
    return "".join(lines)


TABLES = {"kodak": kodak, "bd_rates": bd_rates, "folders": folders, "published": published}


def rate(anchor: Curve, test: Curve, metric: str) -> float | None:
    """Return the BD-rate of a curve in per cent; None where there is none."""
    if test is anchor:
        return 0.0
    outcome = bd_rate.compare(anchor, test, metric)
    return outcome.percent if isinstance(outcome, BDRate) else None


def filled(text: str, folder: Path) -> str:
    """Return a page with its tables made from the results in a folder."""

    def fill(match: re.Match[str]) -> str:
        begin, name, before, end = match.groups()
        return begin + (TABLES[name](folder, before) if name in TABLES else before) + end

    return BLOCK.sub(fill, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--check", action="store_true", help="change nothing; 1 if a table is out of date")
    args = parser.parse_args(argv)
    outdated = False
    for page in PAGES:
        before = (ROOT / page).read_text()
        try:
            after = filled(before, BENCHMARKS)
        except (CMambaError, OSError) as error:
            parser.error(f"{page}: {error}")
        except ImportError as error:
            parser.error(f"{error}; in a clone: python -m pip install '.[eval]'")
        outdated |= after != before
        if not args.check:
            write_atomically(ROOT / page, after.encode())
        state = "out of date" if args.check else "renewed"
        print(f"{page}: {'as it was' if after == before else state}")
    return int(args.check and outdated)


if __name__ == "__main__":
    sys.exit(main())

"""The tables of measured results in README.md and the model card, made from benchmarks/.

    python tools/readme_tables.py            # writes them
    python tools/readme_tables.py --check    # says which are out of date; changes nothing

What stands between `<!-- table: NAME -->` and `<!-- end -->` is replaced.  The model card has the
table `kodak`, the README has all:

    kodak       each quality on Kodak, beside what JPEG 4:2:0 takes for the same PSNR
    bd_rates    BD-rates of all that was measured there, and ours against each
    scans       one scan on a CPU, ours and peers
    complexity  parameters, MACs by convention, time and memory of our models
    ablation    variants of the model, trained alike for a short time
    published   what was measured here, and what others publish, each with its anchor, its
                convention of MACs and its hardware

The exit status of --check is 1 if a table is out of date; a table that a page lacks, one that it
has twice and one of another name are errors.  Run tools/measure_all.py for newer results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ablate
import bd_rate
import complexity
import numpy as np
import rd_curves
from bd_rate import BDRate
from bench_cpu import scan_row
from markdown_table import markdown_table
from profile_scan import BOTH, FORWARD
from provenance import in_words
from published_costs import PUBLISHED_CODECS
from rd_curves import Curve

from cmamba_ref import CMambaError
from cmamba_ref.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)
OURS, JPEG, VTM = "cmamba", "jpeg420", "VTM-9.1"
SCANS = {
    "chunked": "`chunked`, eager PyTorch",
    "compiled": "`compiled`, on request",
    "mambapy": "mamba.py's parallel scan",
    "ref-style": "the scheme of `selective_scan_ref`",
}
NONE = "–"


class TableError(CMambaError, ValueError):
    """A table cannot be made, or has no place."""


@dataclass(frozen=True)
class Results:
    """The files that tables are made from.

    Attributes:
        folder: where they lie.
    """

    folder: Path

    def read(self, name: str) -> dict[str, Any]:
        """The JSON of a file.

        Raises:
            TableError: there is none.
        """
        try:
            return json.loads((self.folder / name).read_text())
        except (OSError, ValueError) as error:
            raise TableError(
                f"{name} must be a result in {self.folder.name}, got {error}; "
                "make it with tools/measure_all.py"
            ) from error

    @property
    def kodak(self) -> dict[str, Any]:
        return self.read("kodak_tiny.json")

    def curves(self, name: str) -> dict[str, Curve]:
        """The curves of a file, by name."""
        return {c.name: c for c in rd_curves.load_curves(str(self.folder / name))}


# ---------------------------------------------------------------- tables


def kodak(results: Results) -> str:
    from scipy.interpolate import PchipInterpolator

    measured = results.kodak
    ours, jpeg = measured[OURS]["results"], measured[JPEG]["results"]
    # As for BD-rates: the logarithm of the rate over PSNR, by piecewise cubics.
    log_rate = PchipInterpolator(jpeg["psnr-rgb"], np.log(jpeg["bpp"]), extrapolate=False)
    rows = []
    for k, quality in enumerate(ours["quality"]):
        bpp = ours["bpp"][k]
        rival = float(np.exp(log_rate(ours["psnr-rgb"][k])))
        rows.append(
            (
                f"{quality:g}",
                f"{bpp:.3f}",
                f"{ours['psnr-rgb'][k]:.2f}",
                f"{ours['ms-ssim-rgb'][k]:.4f}",
                NONE if np.isnan(rival) else f"{rival:.3f}",
                NONE if np.isnan(rival) else signed(100 * (bpp / rival - 1), 0),
                f"{ours['encoding_time'][k]:.2f} / {ours['decoding_time'][k]:.2f}",
            )
        )
    heading = ("quality", "bpp", "PSNR, dB", "MS-SSIM", "JPEG 4:2:0 at this PSNR, bpp")
    return _with_meta(
        markdown_table((*heading, "ours against it", "encode / decode, s"), rows, figures=6),
        measured["meta"],
    )


def bd_rates(results: Results) -> str:
    curves = results.curves("kodak_tiny.json")
    ours, anchor = curves[OURS], curves[JPEG]

    def rates_of(curve: Curve) -> list[float | None]:
        found = [rate(anchor, curve, metric) for metric in rd_curves.METRICS]
        return found + [rate(curve, ours, metric) for metric in rd_curves.METRICS]

    rates = {curve.name: rates_of(curve) for curve in curves.values() if curve != anchor}
    by_psnr = sorted(rates, key=lambda name: rates[name][0] or 0)
    rows = []
    for name in (*by_psnr, JPEG):
        if name == JPEG:
            of_codec = [0.0, 0.0, *rates[OURS][:2]]
        elif name == OURS:
            of_codec = [*rates[name][:2], None, None]
        else:
            of_codec = rates[name]
        rows.append((curves[name].label, *(signed(value) for value in of_codec)))
    heading = ("", "BD-rate by PSNR", "by MS-SSIM", "ours against it by PSNR", "by MS-SSIM")
    return markdown_table(heading, rows, figures=4)


def scans(results: Results) -> str:
    section = results.read("cpu.json")["sections"]["scan"]
    rows = []
    for name, label in SCANS.items():
        of_modes = [scan_row(section, mode, name) for mode in (FORWARD, BOTH)]
        if not all(of_modes):
            continue
        memory = " / ".join(f"{row['peak_mib']:,.0f}" for row in of_modes)
        rows.append((label, *(digits(row["median_ms"] / 1e3) for row in of_modes), memory))
    inputs = f"memory beyond {section['inputs_mib']:.0f} MiB of inputs, MiB"
    return _with_meta(
        markdown_table(("", "forward, s", "forward and backward, s", inputs), rows, figures=3),
        section["meta"],
    )


def complexity_table(results: Results) -> str:
    found = complexity.Findings.from_json(results.folder / "complexity.json")
    published = complexity.PUBLISHED
    derived = (millions(published["params"]), NONE, giga(published["macs"]), NONE)
    rows: list[tuple[str, ...]] = [("published, derived", *derived)]
    for name, costs in found.costs.items():
        total = costs["total"]
        macs = [giga(total.total(convention)) for convention in complexity.CONVENTIONS]
        rows.append((f"`{name}`", millions(total.params), *macs))
    heading = ["", "parameters", "scan left out", "4.5 MACs per scan element", "VMamba's count, 9"]
    lines = markdown_table(heading, rows, figures=4)
    if not found.runs:
        return lines
    measured = []
    for name, runs in found.runs.items():
        weights = "trained" if all(r.has_trained_weights for r in runs.values()) else "random"
        cells = [f"`{name}`, {weights} weights"]
        for run in (runs["encode"], runs["decode"]):
            cells.append(run.status if run.seconds is None else f"{digits(run.seconds)} s")
            cells.append(NONE if run.peak_mib is None else f"{run.peak_mib / 1024:.2f} GiB")
        measured.append(cells)
    heading = ("768x512 on a CPU", "encode", "peak of memory", "decode", "peak of memory")
    return lines + "\n\n" + _with_meta(markdown_table(heading, measured, figures=4), found.made)


def ablation(results: Results) -> str:
    found = results.read("ablation.json")
    return _with_meta(ablate.table(found["variants"]), found["meta"])


def published(results: Results) -> str:
    """Rows of what was measured here, then rows of what others publish."""
    points = results.curves("published_kodak.json")
    anchor = points.pop(VTM)
    measured = _measured_rows(results, anchor)
    stated = []
    for codec in PUBLISHED_CODECS:
        curve = points.pop(codec.curve, None)
        from_points = NONE if curve is None else signed(rate(anchor, curve, "psnr"))
        costs = (codec.params, codec.macs, codec.times or NONE)
        stated.append((codec.name, from_points, codec.bd_rate, *costs, codec.source))
    for curve in (*points.values(), anchor):
        from_points = signed(0.0 if curve == anchor else rate(anchor, curve, "psnr"))
        source = curve.source.split(",")[0]
        stated.append((curve.label, from_points, NONE, NONE, NONE, NONE, source))
    rows = [("measured", *row) for row in measured] + [("published", *row) for row in stated]
    heading = (
        "",
        "codec",
        f"BD-rate from points, anchor {VTM}",
        "BD-rate as stated, and its anchor",
        "parameters, M",
        "MACs, and their convention",
        "time, and on what",
        "source",
    )
    return markdown_table(heading, rows, figures=0)


def _measured_rows(results: Results, anchor: Curve) -> list[tuple[str, ...]]:
    """Our models, those with trained weights first, and the classical codecs."""
    file = "kodak_tiny.json"
    content, costs = (
        results.kodak,
        complexity.Findings.from_json(results.folder / "complexity.json"),
    )
    width, height = costs.size
    (checkpoint,) = content["meta"]["models"][OURS]
    rows = []
    for name, curve in results.curves(file).items():
        values = content[name]["results"]
        # Settings differ in it little, and no quality is the one that counts.
        times = [np.mean(values[f"{direction}ing_time"]) for direction in ("encod", "decod")]
        params = macs = NONE
        if name == OURS:
            params, macs = _cost_cells(costs.costs[checkpoint["name"]]["total"], width, height)
        rows.append(
            (
                curve.label,
                signed(rate(anchor, curve, "psnr")),
                NONE,
                params,
                macs,
                f"{_codec_times(*times)}, {content['meta']['machine']}, mean over all points",
                f"`benchmarks/{file}`",
            )
        )
    for name, of_model in costs.costs.items():
        if name == checkpoint["name"]:
            continue
        runs = costs.runs.get(name, {})
        seconds = [run.seconds for run in runs.values() if run.seconds is not None]
        times = NONE
        if len(seconds) == len(runs) > 0:
            times = f"{_codec_times(*seconds)}, {costs.made['machine']}, random weights"
        cells = _cost_cells(of_model["total"], width, height)
        label = f"CMamba {name}, untrained"
        rows.append((label, NONE, NONE, *cells, times, "`benchmarks/complexity.json`"))
    return rows


def _cost_cells(total: complexity.Cost, width: int, height: int) -> tuple[str, str]:
    macs = f"{total.total(complexity.OURS) / 1e9:.1f} G at {width}x{height}"
    return f"{total.params / 1e6:.2f}", f"{macs}, {complexity.OURS} per scan element"


def _codec_times(encoding: float, decoding: float) -> str:
    return f"encoding {digits(float(encoding))} s, decoding {digits(float(decoding))} s"


# ---------------------------------------------------------------- cells


def rate(anchor: Curve, test: Curve, metric: str) -> float | None:
    """The BD-rate of a curve in per cent; None where there is none."""
    ((_, outcome),) = bd_rate.compare(anchor, [test], metric)
    return outcome.percent if isinstance(outcome, BDRate) else None


def signed(percent: float | None, places: int = 1) -> str:
    """A change as the README writes it, with a minus that is as wide as the plus."""
    if percent is None:
        return NONE
    text = f"{percent:+.{places}f} %".replace("-", "−")
    return text[1:] if float(f"{percent:.{places}f}") == 0 else text


def digits(seconds: float) -> str:
    """Seconds to three digits, and no finer than a millisecond."""
    places = max(0, min(3, 2 - int(np.floor(np.log10(seconds))))) if seconds > 0 else 0
    return f"{seconds:.{places}f}"


def millions(count: float) -> str:
    return f"{count / 1e6:.2f} M"


def giga(count: float) -> str:
    return f"{count / 1e9:.1f} G"


def _with_meta(lines: str, meta: dict[str, Any]) -> str:
    """A table, and by what, when and on what it was measured."""
    return f"{lines}\n\n{in_words(meta)}"


TABLES: dict[str, Callable[[Results], str]] = {
    "kodak": kodak,
    "bd_rates": bd_rates,
    "scans": scans,
    "complexity": complexity_table,
    "ablation": ablation,
    "published": published,
}


# ---------------------------------------------------------------- the pages

# The tables of each, by its path in the repository.
PAGES = {"README.md": tuple(TABLES), "cmamba_ref/pretrained/tiny/README.md": ("kodak",)}


def filled(
    text: str, results: Results, tables: Sequence[str] = tuple(TABLES)
) -> tuple[str, list[str]]:
    """A page with new tables, and the names of those that changed.

    Raises:
        TableError: a result is missing, or the page has not exactly these tables.
    """
    names = [match[1] for match in BLOCK.finditer(text)]
    if sorted(names) != sorted(tables):
        raise TableError(
            f"the page must have each of the tables {', '.join(tables)} once, got "
            f"{', '.join(names) or 'none'}; put them between <!-- table: NAME --> and <!-- end -->"
        )
    changed = []

    def fill(match: re.Match[str]) -> str:
        name, before = match.groups()
        made = f"\n{TABLES[name](results)}\n\n"
        if made != before:
            changed.append(name)
        return f"<!-- table: {name} -->\n{made}<!-- end -->"

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
    for page, tables in PAGES.items():
        try:
            text, changed = filled((args.pages / page).read_text(), Results(args.results), tables)
        except (CMambaError, OSError) as error:
            parser.error(f"{page}: {error}")
        except ImportError as error:
            parser.error(f"{error}; install the extra: pip install 'cmamba-ref[eval]'")
        outdated |= bool(changed)
        if args.check:
            for name in changed:
                told = f"{page}: {name} is out of date; run python tools/readme_tables.py"
                print(told, file=sys.stderr)
            continue
        if changed:
            write_atomically(args.pages / page, text.encode())
        print(f"{page}: {', '.join(changed) or 'no table'} changed")
    return int(args.check and outdated)


if __name__ == "__main__":
    sys.exit(main())

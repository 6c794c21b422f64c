"""Whether symbols depend on anything: entropy parameters and files under many settings.

    python tools/determinism.py photos -o determinism.json

Every picture is encoded once. From its symbols the entropy parameters (from z_hat on, in float64)
are computed again under every combination of

    threads 1, 2    oneDNN on, off    layout contiguous, channels_last    batch 1, 4
    scans chunked, reference, triton    weights float32, bfloat16

and compared with those of the first one. Not one scale index may differ: a decoder loses the rest
of the stream with it. How far log-scales differ is what the margin of the format (docs/format.md)
has to cover. To keep this short, a combination gets every sixth picture (--every), each combination
beginning with another one, so that all pictures occur; `triton`, where it runs in the interpreter,
gets a small model of random weights and 64x64 pixels.

Then files: 16 pairs of a setting that encodes and one that decodes, each in a process of its own,
such that every two settings of either side meet in all their values (tools/covering.py). The
decoder compares the symbols with their check; pixels are compared with what the encoder's side
decodes. Each pair codes the central 192x128 pixels of four pictures.

With -o, what has been measured is kept beside the output as it comes (FILE.partial): after Ctrl-C
or a failure the same command goes on where it stopped. The exit status is 1 if symbols depend on a
setting, pixels of float32 weights differ by more than 1, or a measurement failed; 2 for wrong
arguments, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any, TypeVar

import determinism_work as work
from covering import covering_array
from determinism_work import BASELINE, QUALITIES, Comparison, Half, Picture, Setting
from partial_results import PartialResults
from provenance import of_run, versions
from rd_measure import picture_paths
from tqdm import tqdm

from cmamba_ref import CMamba, CMambaError
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.cli import process_pool
from cmamba_ref.entropy.gaussian import MARGIN

PACKAGES = ("cmamba-ref", "torch", "numpy", "triton")
SMALL_MODEL = Path(__file__).resolve().parents[1] / "tests" / "golden" / "model"
AXES: dict[str, tuple] = {
    "threads": (1, 2),
    "onednn": (True, False),
    "layout": tuple(work.LAYOUTS),
    "batch": (1, 4),
    "weights": tuple(work.WEIGHTS),
}
BACKENDS = ("chunked", "reference", "triton")
PAIRS = 16
PER_PAIR = 4
CROP_OF_PAIRS = (128, 192)
CROP_OF_TRITON = (64, 64)

Row = dict[str, Any]
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Study:
    """Pictures that are compared under all settings of some backends.

    Attributes:
        name: what results are kept under.
        every: so many pictures further is the next that a combination gets.
    """

    name: str
    model: str
    backends: tuple[str, ...]
    pictures: tuple[Picture, ...]
    every: int

    def comparisons(self) -> list[Comparison]:
        """One for every setting, those of one process one after the other."""
        combinations = [dict(zip(AXES, values, strict=True)) for values in product(*AXES.values())]
        comparisons = [
            Comparison(
                self.model, Setting(backend=b, **c), self.pictures[i % self.every :: self.every]
            )
            for b in self.backends
            for i, c in enumerate(combinations)
        ]
        return sorted(comparisons, key=lambda comparison: process_of(comparison.setting))


def process_of(setting: Setting) -> tuple[str, int]:
    """Settings for which this is equal can follow each other in one process."""
    return setting.backend, setting.threads


def in_fresh_process(
    function: Callable[[ItemT], ResultT],
    items: Sequence[ItemT],
    setting: Setting,
    report: Callable[[ItemT, ResultT], None] = lambda *_: None,
) -> None:
    """Do `function` on items in a process that was set up for `setting`.

    Raises:
        CMambaError: the process died.
    """

    def checked(item: ItemT, result: tuple[ResultT] | None) -> None:
        if result is None:
            raise CMambaError(f"the process died at work under {setting.label}; more memory?")
        report(item, *result)

    prepare = functools.partial(work.prepare, setting.threads, setting.backend)
    process_pool.spread(functools.partial(_boxed, function), items, 1, prepare, checked)


def _boxed(function: Callable[[ItemT], ResultT], item: ItemT) -> tuple[ResultT]:
    """A result that is never None, which is how the pool reports a process that died."""
    return (function(item),)


# ---------------------------------------------------------------- what to measure


def find_studies(
    paths: Sequence[Path],
    model: str,
    small_model: str,
    backends: Sequence[str],
    every: int,
    kept: Path,
) -> list[Study]:
    """The pictures in full with `model`, and for triton crops of a few with `small_model`."""
    every = min(every, len(paths))
    eager = tuple(b for b in backends if b != "triton")
    studies = []
    if eager:
        pictures = [_picture(path, i, None, kept / f"{i}.npz") for i, path in enumerate(paths)]
        studies.append(Study("pictures", model, eager, tuple(pictures), every))
    if "triton" in backends:
        crops = [
            _picture(path, i, CROP_OF_TRITON, kept / f"small{i}.npz")
            for i, path in enumerate(paths[:every])
        ]
        studies.append(Study("small", small_model, ("triton",), tuple(crops), every))
    return studies


def _picture(path: Path, i: int, crop: tuple[int, int] | None, kept: Path) -> Picture:
    return Picture(path, crop, QUALITIES[i % len(QUALITIES)], kept)


def find_pairs(
    paths: Sequence[Path], model: str, backends: Sequence[str], count: int, kept: Path
) -> list[Half]:
    """The encoding halves; `other` is the setting that decodes. Pictures are taken in turn."""
    side = {**AXES, "backend": tuple(b for b in backends if b != "triton")}
    factors = {f"{name} {axis}": side[axis] for name in ("encoder", "decoder") for axis in side}
    halves = []
    for i, row in enumerate(covering_array(factors, count)):
        encoder, decoder = (
            Setting(**{axis: row[f"{name} {axis}"] for axis in side})
            for name in ("encoder", "decoder")
        )
        taken = [paths[(PER_PAIR * i + k) % len(paths)] for k in range(PER_PAIR)]
        quality = QUALITIES[i % len(QUALITIES)]
        pictures = tuple(Picture(path, CROP_OF_PAIRS, quality, kept) for path in taken)
        halves.append(Half(model, encoder, decoder, pictures, kept))
    return halves


# ---------------------------------------------------------------- measuring


def measure_study(study: Study, kept: PartialResults, bar: tqdm) -> None:
    """Compare every setting that is not kept yet."""
    waiting = [c for c in study.comparisons() if _key(study, c.setting) not in kept.results]
    bar.update(len(study.comparisons()) - len(waiting))
    if not waiting:
        return
    bar.set_description_str(f"{study.name}: encoding")
    every = Comparison(study.model, BASELINE, study.pictures)
    in_fresh_process(work.keep_baseline, [every], BASELINE)

    def report(comparison: Comparison, result: Row) -> None:
        nonlocal start
        seconds = time.perf_counter() - start
        kept.add(_key(study, comparison.setting), {**result, "seconds": round(seconds, 1)})
        start = time.perf_counter()
        bar.update()

    for _, group in groupby(waiting, key=lambda comparison: process_of(comparison.setting)):
        together = list(group)
        setting = together[0].setting
        bar.set_description_str(f"{study.name}: {setting.backend}, {setting.threads} threads")
        start = time.perf_counter()
        in_fresh_process(work.compare, together, setting, report)


def _key(study: Study, setting: Setting) -> str:
    return f"{study.name}: {setting.label}"


def measure_pairs(halves: Sequence[Half], kept: PartialResults, bar: tqdm) -> None:
    """Encode and decode every pair that is not kept yet."""
    for i, half in enumerate(halves):
        if f"pair {i}" not in kept.results:
            bar.set_description_str(f"pair {i + 1} of {len(halves)}")
            kept.add(f"pair {i}", _measure_pair(half))
        bar.update()


def _measure_pair(half: Half) -> Row:
    found: Row = {}
    with tempfile.TemporaryDirectory() as folder:
        writer = replace(half, folder=Path(folder))
        reader = replace(writer, setting=half.other, other=half.setting)
        in_fresh_process(
            work.write_half, [writer], writer.setting, lambda _, size: found.update(bytes=size)
        )
        in_fresh_process(work.read_half, [reader], reader.setting, lambda _, row: found.update(row))
    return found


# ---------------------------------------------------------------- the report

LARGEST = ("ln_scale_absolute", "ln_scale_relative", "mean_absolute", "mean_relative")


def report_of_study(study: Study, results: dict[str, Row]) -> Row:
    """All settings of a study, and for each backend the sums and the largest differences."""
    rows = [{**asdict(c.setting), **results[_key(study, c.setting)]} for c in study.comparisons()]
    return {
        "model": Path(study.model).name,
        "settings": len(rows),
        **_summed(rows),
        "backends": {b: _summed([r for r in rows if r["backend"] == b]) for b in study.backends},
        "rows": rows,
    }


def _summed(rows: Sequence[Row]) -> Row:
    sums = {key: sum(row[key] for row in rows) for key in ("indexes", "differing_indexes")}
    return {**sums, **{key: max(row[key] for row in rows) for key in LARGEST}}


def report_of_pairs(halves: Sequence[Half], results: dict[str, Row]) -> Row:
    """All pairs, and sums; pixels apart by the type of weights that they are decoded with."""
    rows = [
        {
            "encoder": asdict(half.setting),
            "decoder": asdict(half.other),
            "quality": half.pictures[0].quality,
            "pictures": [picture.path.name for picture in half.pictures],
            **results[f"pair {i}"],
        }
        for i, half in enumerate(halves)
    ]
    counts = ("values", "differing_values")
    by_weights = {}
    for weights in work.WEIGHTS:
        mine = [row for row in rows if row["decoder"]["weights"] == weights]
        sums = {key: sum(row[key] for row in mine) for key in counts}
        largest = max((row["largest_difference"] for row in mine), default=0)
        share = sums["differing_values"] / sums["values"] if sums["values"] else 0.0
        by_weights[weights] = {**sums, "share": share, "largest_difference": largest}
    totals = {
        key: sum(row[key] for row in rows) for key in ("files", "files_with_other_symbols", "bytes")
    }
    return {"pairs": len(rows), **totals, "pixels": by_weights, "rows": rows}


def is_kept(report: Row) -> bool:
    """Whether all that is promised held: equal indexes and symbols, pixels within 1."""
    studies = [report[name] for name in ("pictures", "small") if name in report]
    pairs = report.get("pairs")
    return (
        all(s["differing_indexes"] == 0 and s["ln_scale_absolute"] < MARGIN for s in studies)
        and (pairs is None or pairs["files_with_other_symbols"] == 0)
        and (pairs is None or pairs["pixels"]["float32"]["largest_difference"] <= 1)
    )


def summary(report: Row) -> str:
    """The result in a few lines."""
    lines = []
    for name in ("pictures", "small"):
        for backend, found in report.get(name, {}).get("backends", {}).items():
            lines.append(
                f"{backend}: {found['differing_indexes']} of {found['indexes']} indexes differ; "
                f"ln scale by at most {found['ln_scale_absolute']:.1e} "
                f"(relative {found['ln_scale_relative']:.1e}), "
                f"means by {found['mean_absolute']:.1e}; the margin is {MARGIN:.0e}"
            )
    if pairs := report.get("pairs"):
        lines.append(
            f"pairs: {pairs['files_with_other_symbols']} of {pairs['files']} files have other "
            "symbols"
        )
        for weights, found in pairs["pixels"].items():
            lines.append(
                f"pixels decoded with {weights}: {100 * found['share']:.4f} % differ, "
                f"by at most {found['largest_difference']}"
            )
    return "\n".join(lines)


# ---------------------------------------------------------------- the command


def parse(argv: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="pictures, for instance the Kodak set")
    parser.add_argument("-o", dest="output", type=Path, help="the JSON to write (default: none)")
    parser.add_argument("--model", default="tiny", help="name or directory (default: tiny)")
    parser.add_argument(
        "--small-model",
        default=str(SMALL_MODEL),
        help="for triton in the interpreter (default: the one of the golden files)",
    )
    parser.add_argument("--limit", type=int, help="only the first so many pictures")
    parser.add_argument(
        "--backends", nargs="+", choices=BACKENDS, default=BACKENDS, help="default: all"
    )
    parser.add_argument(
        "--pairs", type=int, default=PAIRS, help=f"of encoder and decoder (default: {PAIRS})"
    )
    parser.add_argument(
        "--every",
        type=int,
        default=6,
        help="a combination gets one picture of so many, all with 1 (default: 6)",
    )
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run kept")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser, args = parse(argv)
    provenance = {**of_run("determinism.py", argv), "versions": versions(*PACKAGES)}
    conditions = {key: provenance[key] for key in provenance if key not in ("command", "date")}
    # Threads that wait for others by spinning take the core from those they wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory() as folder:
        try:
            paths = picture_paths(args.folder, args.limit)
            pictures = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
            models = {
                name: {"source": Path(name).name, "id": CMamba.from_pretrained(name).model_id.hex()}
                for name in (args.model, args.small_model)
            }
            conditions |= {"pictures": pictures, "models": list(models.values())}
            conditions["every"] = args.every
            studies = find_studies(
                paths, args.model, args.small_model, args.backends, args.every, Path(folder)
            )
            halves = []
            if args.pairs:
                halves = find_pairs(paths, args.model, args.backends, args.pairs, Path(folder))
            kept = PartialResults(args.output, conditions, fresh=args.fresh)
        except (CMambaError, OSError) as error:
            parser.error(str(error))
        total = sum(len(study.comparisons()) for study in studies) + len(halves)
        try:
            with tqdm(total=total, dynamic_ncols=True) as bar:
                for study in studies:
                    measure_study(study, kept, bar)
                measure_pairs(halves, kept, bar)
        except KeyboardInterrupt:
            print("interrupted; with -o the same command goes on from there", file=sys.stderr)
            return 130
        except CMambaError as error:
            print(error, file=sys.stderr)
            return 1
    report: Row = {study.name: report_of_study(study, kept.results) for study in studies}
    if halves:
        report["pairs"] = report_of_pairs(halves, kept.results)
    print(summary(report))
    report["meta"] = {
        **provenance,
        "models": list(models.values()),
        "pictures": {"folder": args.folder.resolve().name, "names": list(pictures)},
        "margin": MARGIN,
        "baseline": asdict(BASELINE),
        "relative": f"of values of at least {work.LEAST_FOR_RELATIVE} in magnitude",
        "reduced": {
            "pictures": f"every {args.every}th per combination, beginning with each in turn",
            "triton": f"small model, {CROP_OF_TRITON} pixels of one picture per combination",
            "pairs": f"{CROP_OF_PAIRS} pixels of {PER_PAIR} pictures each",
        },
        "all_promises_kept": is_kept(report),
    }
    if args.output:
        write_atomically(args.output, (json.dumps(report, indent=1) + "\n").encode())
        kept.discard()
    return 0 if report["meta"]["all_promises_kept"] else 1


if __name__ == "__main__":
    sys.exit(main())

"""Benchmark scans and codec on a CPU: time, memory, share of each stage, growth with size.

    python tools/bench_cpu.py --json benchmarks/cpu.json --markdown benchmarks/cpu.md
    python tools/bench_cpu.py --only large --json benchmarks/cpu.json --markdown benchmarks/cpu.md
    python tools/bench_cpu.py --only --json benchmarks/cpu.json --markdown benchmarks/cpu.md

Sections, in this order; all but `large` unless `--only` names some:

    scan     one scan of four directions, ours and baselines in the same run; baselines take 15 GB
             of memory, and one of them wants `pip install -c constraints.txt mambapy`
    growth   scans against the number of positions and of states
    codec    encode and decode, by model, size of the image and stage
    startup  `cmamba encode` and `cmamba decode` as whole processes, and imports alone
    large    an image of 24 megapixels; the exit status is 1 if it takes too much time or memory

A section replaces its predecessor in the JSON and leaves the others; the table is made from the
JSON, and `--only` without a name does nothing else.  Every image is encoded and decoded in a
process of its own, whose peak memory is counted.  Images are the bundled image, continued by
mirroring.  `small` has no trained weights; with random ones, of a fixed seed, the networks take
the same time, and the coder more, as the files are larger.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import profile_scan
import torch
from markdown_table import markdown_table
from profile_scan import BOTH, FORWARD, Case, Settings, Shape, UnavailableError, as_text
from provenance import of_run, versions
from resident import peak_bytes, resident_bytes
from stage_clock import time_by_stage
from tqdm import tqdm

import cmamba_ref
from cmamba_ref import CMamba, CMambaError
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.bundled import pretrained_names
from cmamba_ref.cli.demo import DEMO_IMAGE
from cmamba_ref.codec import images, memory, output
from cmamba_ref.model import MULTIPLE

Section = dict[str, Any]  # what JSON holds
Size = tuple[int, int]  # width and height

BACKEND, BASELINES = "chunked", ("ref-style", "mambapy")
# Baselines hold so many tensors of an fp32 number per element of the scan, forward and backward.
# Without the memory, the system would end this process and perhaps others.
BASELINE_TENSORS = 14
ENCODE, DECODE = DIRECTIONS = ("encode", "decode")
# For 24 megapixels.
LIMITS = {"seconds": 600, "gib": 8}


SETTINGS = Settings(torch.device("cpu"), "fp32", (FORWARD, BOTH), repeats=5, seconds=5)
SCAN = Shape(1, 128, 192, 192, 16, 6)
# (what varies, its size, the shape)
GROWTH = [
    *(("positions", side**2, Shape(1, side, side, 64, 16, 4)) for side in (64, 128, 256, 448, 632)),
    *(("states", n, Shape(1, 128, 128, 64, n, 4)) for n in (1, 2, 4, 8, 16, 32)),
]
MODELS, SIZES = ("tiny", "small"), ((256, 256), (768, 512), (2048, 1365))


# ---------------------------------------------------------------- scans


def measure_scan(shape: Shape, settings: Settings) -> Section:
    """Measure ours and the baselines on one shape; those that are wrong are not timed."""
    candidates, left_out = [profile_scan.find_candidate(BACKEND, settings)], {}
    needed, available = 4 * shape.elts * BASELINE_TENSORS, memory.available() or math.inf
    for name in BASELINES:
        try:
            if available < needed:
                sizes = f"{needed / 2**30:.0f} GiB of memory, and {available / 2**30:.0f} GiB"
                raise UnavailableError(f"it takes about {sizes} are available")
            candidates.append(profile_scan.find_candidate(name, settings))
        except UnavailableError as error:
            left_out[name] = str(error)
    rows = list(profile_scan.profile_cases([Case("scan", shape)], candidates, settings, None))
    return {"shape": str(shape), "rows": rows, "left_out": left_out}


def measure_growth(sizes: Sequence[tuple[str, int, Shape]], settings: Settings) -> Section:
    """Measure the backend `chunked` against the number of positions, and of states."""
    ours = [profile_scan.find_candidate(BACKEND, settings)]
    rows = [
        {"varied": varied, "size": size, **row}
        for varied, size, shape in sizes
        for row in profile_scan.profile_cases([Case(varied, shape)], ours, settings, None)
    ]
    points = [
        (f"{row['varied']}, {row['mode']}", row["size"], row["median_ms"])
        for row in rows
        if row["status"] == "ok"
    ]
    return {"backend": BACKEND, "rows": rows, "exponents": exponents_of(points)}


def exponents_of(points: Sequence[tuple[str, float, float]]) -> dict[str, float]:
    """Return the e of time = c size^e of each series, by least squares on logarithms.

    Args:
        points: series, size and time; a series with a single size has no exponent.
    """
    found = {}
    for series in dict.fromkeys(name for name, _, _ in points):
        sizes, times = np.log([(size, time) for name, size, time in points if name == series]).T
        if len(set(sizes)) > 1:
            found[series] = float(np.polyfit(sizes, times, 1)[0])
    return found


# ---------------------------------------------------------------- the codec


def demo_image(width: int, height: int) -> np.ndarray:
    """Return the bundled image, mirrored at its edges or cut: uint8 `[H, W, 3]`."""
    image = images.read_image(DEMO_IMAGE)
    below, right = max(0, height - image.shape[0]), max(0, width - image.shape[1])
    return np.pad(image, ((0, below), (0, right), (0, 0)), "symmetric")[:height, :width]


def code_image(
    source: str, size: Size, direction: str, data: bytes, settings: Settings, threads: int
) -> tuple[Section, bytes]:
    """Encode an image, or decode its file; return the figures and the file.

    Args:
        source: the model, a name or directory.
        data: the file to decode.
        settings: repeats count after the first run; with 0 that is the one that counts.
    """
    torch.set_num_threads(threads)
    model = CMamba.from_pretrained(source)
    if direction == ENCODE:
        call = functools.partial(cmamba_ref.encode, demo_image(*size), model)
    else:
        call = functools.partial(cmamba_ref.decode, data, model)
    loaded, peak_before = resident_bytes(), peak_bytes()

    # Only the first run is that of a user, who starts a process per image: its memory counts.
    result, first = time_by_stage(model, call, memory=True)
    later = []
    while not settings.enough([timing.total for timing in later]):
        later.append(time_by_stage(model, call)[1])
    timings = sorted(later or [first], key=lambda timing: timing.total)

    # All figures are those of the median run: medians of each stage would not add up to a run.
    middle = timings[(len(timings) - 1) // 2]
    stages = {}
    for stage, seconds in middle.stages.items():
        peak = first.peaks.get(stage)
        beyond = None if peak is None or loaded is None else (peak - loaded) / 2**20
        stages[stage] = {"seconds": seconds, "share": seconds / middle.total, "peak_mib": beyond}
    peak = max(filter(None, (peak_before, *first.peaks.values())), default=None)
    data = result if isinstance(result, bytes) else data
    section = {
        "bpp": 8 * len(data) / math.prod(size),
        "repeats": len(timings),
        "median_s": middle.total,
        "first_s": first.total,
        "scans_s": middle.scans,
        "stages": stages,
        "loaded_mib": None if loaded is None else loaded / 2**20,
        "peak_mib": None if peak is None else peak / 2**20,
    }
    return section, data


def in_fresh_process(call: Callable, *arguments: Any) -> Any:
    """Return the result of a call in a new interpreter, with nothing else in its memory.

    Raises:
        BrokenProcessPool: the process died.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(call, *arguments).result()


def model_source(name: str, folder: Path) -> str:
    """Return where a model is: a bundled one by name, another made with random weights."""
    if name in pretrained_names():
        return name
    torch.manual_seed(0)
    model = CMamba(name).eval()
    model.update()
    model.save_pretrained(folder / name)
    return str(folder / name)


def measure_codec(sizes: Sequence[Size], models: Sequence[str], settings: Settings) -> Section:
    """Encode and decode with each model, for each size, each in a process of its own.

    A run that fails has no figures, and its status says why.
    """
    runs, points = [], []
    cases = [(name, size) for name in models for size in sizes]
    with (
        tempfile.TemporaryDirectory() as scratch,
        tqdm(total=2 * len(cases), desc="codec", disable=None) as progress,
    ):
        sources = {name: model_source(name, Path(scratch)) for name in models}
        for name, size in cases:
            data = b""
            for direction in DIRECTIONS:
                run = {"model": name, "width": size[0], "height": size[1], "direction": direction}
                runs.append(run)
                progress.update()
                if direction == DECODE and not data:
                    run["status"] = "not run: there is no file"
                    continue
                job = (sources[name], size, direction, data, settings, torch.get_num_threads())
                try:
                    figures, data = in_fresh_process(code_image, *job)
                except (BrokenProcessPool, CMambaError) as error:
                    run["status"] = f"failed: {error}"
                    continue
                run |= {"status": "ok", **figures}
                padded = math.prod(-(-side // MULTIPLE) * MULTIPLE for side in size)
                points.append((f"{name}, {direction}", padded, run["median_s"]))
    return {"runs": runs, "exponents": exponents_of(points)}


def measure_large(size: Size, settings: Settings) -> Section:
    """One large image with `small`, once."""
    section = measure_codec([size], ["small"], replace(settings, repeats=0))
    for run in section["runs"]:
        if run["status"] == "ok" and run["first_s"] > LIMITS["seconds"]:
            run["status"] = f"failed: more than {LIMITS['seconds']} s"
        elif run["status"] == "ok" and (run["peak_mib"] or 0) > 1024 * LIMITS["gib"]:
            run["status"] = f"failed: more than {LIMITS['gib']} GiB"
    return {**section, "limits": LIMITS}


# ---------------------------------------------------------------- whole commands

# A user's process before the first image is read.
ALONE = {
    "interpreter": "pass",
    "imports": "from cmamba_ref import CMamba, decode, encode; from cmamba_ref.codec import images",
}


def measure_startup(size: Size, repeats: int) -> Section:
    """Measure `cmamba` as a user runs it, from the first to the last moment of its process."""
    with tempfile.TemporaryDirectory() as scratch:
        image, encoded, decoded = (
            str(Path(scratch) / name) for name in ("photo.png", "photo.cmb", "back.png")
        )
        output.write_png(image, demo_image(*size))
        commands: dict[str, Sequence[str]] = {name: ("-c", code) for name, code in ALONE.items()}
        for direction, source, target in ((ENCODE, image, encoded), (DECODE, encoded, decoded)):
            commands[direction] = ("-m", "cmamba_ref", direction, source, "-o", target, "--force")
        walls = {name: wall_seconds(command, repeats) for name, command in commands.items()}
    begun, ready = (median(walls[name]) for name in ALONE)
    results: Section = {"width": size[0], "height": size[1]}
    for direction in DIRECTIONS:
        wall = median(walls[direction])
        results[direction] = {
            "repeats": repeats,
            "wall_s": wall,
            "wall_max_s": max(walls[direction]),
            "split_s": {"interpreter": begun, "imports": ready - begun, "coding": wall - ready},
        }
    return results


def wall_seconds(arguments: Sequence[str], repeats: int) -> list[float]:
    """Return the seconds of Python processes, after one that brings the files into memory.

    Raises:
        CalledProcessError: one failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    times = []
    for _ in range(1 + repeats):
        start = time.monotonic()
        command = [sys.executable, *arguments]
        subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        times.append(time.monotonic() - start)
    return times[1:]


# ---------------------------------------------------------------- the table


def to_markdown(sections: Section) -> str:
    """Return all figures as one table, below what they were measured with."""
    lines, rows = ["# Time and memory on a CPU", ""], []
    for name in (name for name in SECTIONS if name in sections):
        section, meta = sections[name], sections[name]["meta"]
        used = ", ".join(f"{package} {version}" for package, version in meta["versions"].items())
        lines.append(
            f"- `{name}`: `{meta['command']}`, commit {meta['commit']}, {meta['date']}, "
            f"{meta['machine']}, {meta['threads']} threads, {meta['system']}; {used}."
        )
        for series, value in section.get("exponents", {}).items():
            lines.append(f"  - Exponent of the time, {series}: {value:.3f}.")
        for baseline, reason in section.get("left_out", {}).items():
            lines.append(f"  - `{baseline}` is left out: {reason}.")
        for case, seconds, cost, mib in figures_of(section):
            rows.append((name, case, as_text(seconds), cost, "-" if mib is None else f"{mib:.0f}"))
    heading = ("section", "case", "s", "cost or share", "MiB")
    return "\n".join(lines) + f"\n\n{NOTE}\n\n{markdown_table(heading, rows, figures=3)}\n"


NOTE = """\
Times are medians. Memory of scans is the peak beyond what the process held before the call, results
included; that of the codec is the peak of the process with torch and the weights; that of a stage,
while it was at work, is beyond what was loaded. The first run of a process also sets up torch and
the float64 copies of the entropy path. Scans are part of the stages."""


def figures_of(section: Section) -> Iterator[tuple[str, float | None, str, float | None]]:
    """Yield case, seconds, cost or share, and MiB of scans, of coded images, of whole commands."""
    for row in section.get("rows", ()):
        case = f"{row['backend']} {row['shape']}, {row['mode']}"
        if row["status"] == "ok":
            cost = f"{as_text(row['ns_per_elt'])} ns/elt"
            yield case, row["median_ms"] / 1e3, cost, row["peak_mib"]
        else:
            yield f"{case}: {row['status']}", None, row["reason"], None
    for run in section.get("runs", ()):
        case = f"{run['model']} {run['width']}x{run['height']} {run['direction']}"
        if "median_s" not in run:
            yield f"{case}: {run['status']}", None, "", None
            continue
        total = run["median_s"]
        cost = f"{as_text(1e6 * total / (run['width'] * run['height']))} µs/pixel"
        yield case, total, f"{cost}, {run['bpp']:.2f} bpp", run["peak_mib"]
        yield f"{case}: first run; MiB before it", run["first_s"], "", run["loaded_mib"]
        yield f"{case}: scans", run["scans_s"], f"{run['scans_s'] / total:.1%}", None
        for stage, figures in run["stages"].items():
            share = f"{figures['share']:.1%}"
            yield f"{case}: {stage}", figures["seconds"], share, figures["peak_mib"]
    for direction in (direction for direction in DIRECTIONS if direction in section):
        case, figures = f"cmamba {direction}", section[direction]
        yield case, figures["wall_s"], f"at most {as_text(figures['wall_max_s'])} s", None
        for part, seconds in figures["split_s"].items():
            yield f"{case}: {part}", seconds, f"{seconds / figures['wall_s']:.1%}", None


def failures(section: Section) -> list[str]:
    """Return a line for each row and run that was wrong, or took more than it may."""
    measured = [*section.get("rows", ()), *section.get("runs", ())]
    return [
        ", ".join(str(row[key]) for key in FAILURE if key in row)
        for row in measured
        if row["status"].startswith(("failed", "not run"))
    ]


FAILURE = ("backend", "mode", "model", "width", "height", "direction", "status", "reason")


# ---------------------------------------------------------------- the command

SECTIONS: dict[str, Callable[[], Section]] = {
    "scan": lambda: measure_scan(SCAN, SETTINGS),
    "growth": lambda: measure_growth(GROWTH, SETTINGS),
    "codec": lambda: measure_codec(SIZES, MODELS, SETTINGS),
    "startup": lambda: measure_startup((768, 512), SETTINGS.repeats),
    "large": lambda: measure_large((6000, 4000), SETTINGS),
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    sections_to_measure = f"of {', '.join(SECTIONS)}; none to write the table again"
    usual = [name for name in SECTIONS if name != "large"]
    add("--only", nargs="*", choices=SECTIONS, default=usual, help=sections_to_measure)
    add("--json", type=profile_scan.output, help="results, which are kept where not renewed")
    add("--markdown", type=profile_scan.output, help="write the table here")
    args = parser.parse_args(argv)
    sections = {}
    if args.json and args.json.exists():
        try:
            sections = json.loads(args.json.read_text())["sections"]
        except (ValueError, KeyError, TypeError) as error:
            parser.error(f"--json must be a file that this command wrote, or none yet: {error}")

    failed = []
    for name in (name for name in SECTIONS if name in args.only):
        section = SECTIONS[name]()
        failed += failures(section)
        meta = {
            **of_run("bench_cpu.py", argv),
            "system": f"{platform.system()} {platform.release()}",
            "versions": versions(*profile_scan.MEASURED_WITH),
        }
        sections[name] = {"meta": meta, **section}
        if args.json:  # after each section: what was measured is kept, whatever ends the run
            report = {"sections": sections}
            write_atomically(args.json, (json.dumps(report, indent=1) + "\n").encode())
    text = to_markdown(sections)
    if args.markdown:
        write_atomically(args.markdown, text.encode())
    print(text)
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

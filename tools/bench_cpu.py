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
process of its own, whose peak memory is counted.  Images are the bundled photograph, continued by
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
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import profile_scan
import torch
from markdown_table import markdown_table
from profile_scan import BOTH, FORWARD, Case, Settings, Shape, UnavailableError, as_text
from provenance import of_run, versions
from resident import available_bytes, peak_bytes, resident_bytes
from stage_clock import Timing, time_by_stage
from tqdm import tqdm

import cmamba_ref
from cmamba_ref import CMamba
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.cli.demo import PHOTOGRAPH
from cmamba_ref.codec import images
from cmamba_ref.model import MULTIPLE
from cmamba_ref.weights import pretrained_names

Section = dict[str, Any]  # what JSON holds

BACKEND, BASELINES = "chunked", ("ref-style", "mambapy")
MODES = (FORWARD, BOTH)
# Baselines hold so many tensors of an fp32 number per element of the scan, forward and backward.
# Without the memory, the system would end this process and perhaps others.
BASELINE_TENSORS = 14
ENCODE, DECODE = DIRECTIONS = ("encode", "decode")


@dataclass(frozen=True)
class Plan:
    """Shapes and sizes to measure.

    Attributes:
        scan: the shape on which baselines are compared.
        lengths, states: shapes that differ in one size.
        sizes: width and height, of the section `codec`.
        startup, large: width and height.
        models: configurations; one without trained weights gets random ones.
    """

    scan: Shape
    lengths: tuple[Shape, ...]
    states: tuple[Shape, ...]
    sizes: tuple[tuple[int, int], ...]
    startup: tuple[int, int]
    large: tuple[int, int]
    models: tuple[str, ...] = ("tiny", "small")


FULL = Plan(
    scan=Shape(1, 128, 192, 192, 16, 6),
    lengths=tuple(Shape(1, side, side, 64, 16, 4) for side in (64, 128, 256, 448, 632)),
    states=tuple(Shape(1, 128, 128, 64, n, 4) for n in (1, 2, 4, 8, 16, 32)),
    sizes=((256, 256), (768, 512), (2048, 1365)),
    startup=(768, 512),
    large=(6000, 4000),
)
# Whether everything runs; the figures mean nothing.
QUICK = Plan(
    scan=Shape(1, 6, 8, 4, 2, 1),
    lengths=tuple(Shape(1, side, side, 4, 2, 1) for side in (4, 8)),
    states=tuple(Shape(1, 6, 6, 4, n, 1) for n in (1, 2)),
    sizes=((64, 64), (128, 64)),
    startup=(64, 64),
    large=(128, 128),
    models=("tiny",),
)


# ---------------------------------------------------------------- scans


def measure_scan(shape: Shape, settings: Settings) -> Section:
    """Measure ours and the baselines on one shape; those that are wrong are not timed."""
    candidates, left_out = [profile_scan.find_candidate(BACKEND, settings)], {}
    for name in BASELINES:
        try:
            check_memory(4 * shape.elts * BASELINE_TENSORS)
            candidates.append(profile_scan.find_candidate(name, settings))
        except UnavailableError as error:
            left_out[name] = str(error)
    case = Case("scan", shape)
    rows = list(profile_scan.profile_cases([case], candidates, settings, None))
    arguments = profile_scan.draw_arguments(shape, settings).values()
    return {
        "shape": str(shape),
        "positions": shape.height * shape.width,
        "inputs_mib": sum(x.nbytes for x in arguments) / 2**20,
        "rows": rows,
        "left_out": left_out,
    }


def check_memory(needed: int) -> None:
    """Raise UnavailableError if fewer bytes are available."""
    available = available_bytes()
    if available is not None and available < needed:
        raise UnavailableError(
            f"it takes about {needed / 2**30:.0f} GiB of memory, and {available / 2**30:.0f} GiB "
            "are available"
        )


def measure_growth(plan: Plan, settings: Settings) -> Section:
    """Measure the backend `chunked` against the number of positions, and of states."""
    ours = [profile_scan.find_candidate(BACKEND, settings)]
    rows, points = [], []
    for varied, shapes in (("positions", plan.lengths), ("states", plan.states)):
        for shape in shapes:
            size = shape.height * shape.width if varied == "positions" else shape.states
            for row in profile_scan.profile_cases([Case(varied, shape)], ours, settings, None):
                rows.append({"varied": varied, "size": size, **row})
                if row["status"] == "ok":
                    points.append((f"{varied}, {row['mode']}", size, row["median_ms"]))
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


def as_mib(size: int | None) -> float | None:
    return None if size is None else size / 2**20


# ---------------------------------------------------------------- the codec


def photograph(width: int, height: int) -> np.ndarray:
    """Return the bundled photograph, mirrored at its edges or cut: uint8 `[H, W, 3]`."""
    image = images.read_image(PHOTOGRAPH)
    below, right = max(0, height - image.shape[0]), max(0, width - image.shape[1])
    return np.pad(image, ((0, below), (0, right), (0, 0)), "symmetric")[:height, :width]


@dataclass(frozen=True)
class Limits:
    """Upper limits of a run."""

    seconds: float
    gib: float


# For 24 megapixels.
LARGE_LIMITS = Limits(seconds=600, gib=8)
# A run that exceeds its limits by so much ends itself: the figure no longer matters, and the
# machine may be at the end of its memory.
STOP_AT = 1.5


@dataclass(frozen=True)
class Job:
    """One image to be encoded, or decoded, in a process of its own.

    Attributes:
        model: a name or directory, as `CMamba.from_pretrained` takes it.
        data: the file to be decoded.
        repeats: runs after the first, at most; 0 where the first one is what counts.
        seconds: of measured time after which `MIN_REPEATS` runs are enough.
    """

    model: str
    width: int
    height: int
    direction: str
    data: bytes
    threads: int
    repeats: int
    seconds: float
    limits: Limits | None = None


def code_image(job: Job) -> tuple[Section, bytes]:
    """Do a job; return its figures, and the encoded image."""
    if job.limits:
        threading.Thread(target=end_beyond, args=(job.limits,), daemon=True).start()
    torch.set_num_threads(job.threads)
    model = CMamba.from_pretrained(job.model)
    if job.direction == ENCODE:
        call = functools.partial(cmamba_ref.encode, photograph(job.width, job.height), model)
    else:
        call = functools.partial(cmamba_ref.decode, job.data, model)
    loaded, peak_before = resident_bytes(), peak_bytes()

    # Only the first run is that of a user, who starts a process per image: its memory counts.
    result, first = time_by_stage(model, call, memory=True)
    later: list[Timing] = []
    settings = Settings(torch.device("cpu"), "fp32", MODES, job.repeats, job.seconds)
    while not settings.enough([timing.total for timing in later]) and job.repeats:
        later.append(time_by_stage(model, call)[1])
    timings = later or [first]

    total = median(timing.total for timing in timings)
    stages = {}
    for stage in first.stages:
        seconds = median(timing.stages.get(stage, 0.0) for timing in timings)
        beyond = None
        if stage in first.peaks and loaded is not None:
            beyond = as_mib(first.peaks[stage] - loaded)
        stages[stage] = {"seconds": seconds, "share": seconds / total, "peak_mib": beyond}
    data = result if isinstance(result, bytes) else job.data
    section = {
        "model": model.config.name,
        "width": job.width,
        "height": job.height,
        "direction": job.direction,
        "status": "ok",
        "bpp": 8 * len(data) / (job.width * job.height),
        "repeats": len(timings),
        "median_s": total,
        "first_s": first.total,
        "scans_s": median(timing.scans for timing in timings),
        "stages": stages,
        "loaded_mib": as_mib(loaded),
        "peak_mib": as_mib(max(filter(None, (peak_before, *first.peaks.values())), default=None)),
    }
    return section, data


def end_beyond(limits: Limits) -> None:
    """Watch this process and end it where it takes far more than it may."""
    start = time.monotonic()
    while True:
        time.sleep(0.05)
        gib = (resident_bytes() or 0) / 2**30
        seconds = time.monotonic() - start
        if gib > STOP_AT * limits.gib or seconds > STOP_AT * limits.seconds:
            print(f"stopped at {gib:.1f} GiB after {seconds:.0f} s", file=sys.stderr, flush=True)
            os._exit(1)


def in_fresh_process(call: Callable, *arguments: Any) -> Any:
    """Return the result of a call in a new interpreter, with nothing else in its memory.

    Raises:
        BrokenProcessPool: the process died.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(call, *arguments).result()


def model_sources(names: tuple[str, ...], folder: Path) -> dict[str, str]:
    """Return where each model is: bundled ones by name, others made with random weights."""
    sources = {}
    for name in names:
        sources[name] = name
        if name not in pretrained_names():
            torch.manual_seed(0)
            model = CMamba(name).eval()
            model.update()
            sources[name] = str(folder / name)
            model.save_pretrained(sources[name])
    return sources


def measure_codec(
    sizes: tuple[tuple[int, int], ...],
    models: tuple[str, ...],
    settings: Settings,
    limits: Limits | None = None,
) -> Section:
    """Encode and decode with each model, for each size.

    Args:
        limits: given for images so large that they are coded only once.
    """
    runs = []
    cases = [(name, size) for name in models for size in sizes]
    with (
        tempfile.TemporaryDirectory() as scratch,
        tqdm(total=2 * len(cases), desc="codec", disable=None) as progress,
    ):
        sources = model_sources(models, Path(scratch))
        for name, (width, height) in cases:
            data = b""
            for direction in DIRECTIONS:
                repeats = 0 if limits else settings.repeats
                how = (torch.get_num_threads(), repeats, settings.seconds, limits)
                job = Job(sources[name], width, height, direction, data, *how)
                section, data = run_job(name, job)
                runs.append(section)
                progress.update()
    points = [
        (f"{run['model']}, {run['direction']}", padded_pixels(run), run["median_s"])
        for run in runs
        if run["status"] == "ok"
    ]
    return {"runs": runs, "exponents": exponents_of(points)}


def run_job(name: str, job: Job) -> tuple[Section, bytes]:
    """Do a job in a process of its own; if that dies, the status says so."""
    size = {"width": job.width, "height": job.height}
    nothing = {"model": name, **size, "direction": job.direction}
    if job.direction == DECODE and not job.data:
        return {**nothing, "status": "not run: there is no file"}, b""
    try:
        return in_fresh_process(code_image, job)
    except BrokenProcessPool:
        return {**nothing, "status": "failed: the process ended, out of memory or time"}, b""


def padded_pixels(run: Section) -> int:
    """Return the pixels that are coded."""
    return math.prod(-(-run[side] // MULTIPLE) * MULTIPLE for side in ("width", "height"))


def measure_large(size: tuple[int, int], settings: Settings, limits: Limits) -> Section:
    """One large image with `small`, once."""
    section = measure_codec((size,), ("small",), settings, limits)
    for run in section["runs"]:
        if run["status"] == "ok" and run["first_s"] > limits.seconds:
            run["status"] = f"failed: more than {limits.seconds:g} s"
        elif run["status"] == "ok" and (run["peak_mib"] or 0) > 1024 * limits.gib:
            run["status"] = f"failed: more than {limits.gib:g} GiB"
    return {**section, "limits": asdict(limits)}


# ---------------------------------------------------------------- whole commands

# A user's process before the first image is read.
ALONE = {
    "interpreter": "pass",
    "imports": "from cmamba_ref import CMamba, decode, encode; from cmamba_ref.codec import images",
}


def measure_startup(size: tuple[int, int], repeats: int) -> Section:
    """Measure `cmamba` as a user runs it, from the first to the last moment of its process."""
    with tempfile.TemporaryDirectory() as scratch:
        image, encoded, decoded = (
            str(Path(scratch) / name) for name in ("photo.png", "photo.cmb", "back.png")
        )
        images.write_png(image, photograph(*size))
        commands: dict[str, Sequence[str]] = {name: ("-c", code) for name, code in ALONE.items()}
        for direction, source, target in ((ENCODE, image, encoded), (DECODE, encoded, decoded)):
            commands[direction] = ("-m", "cmamba_ref", direction, source, "-o", target, "--force")
        walls = {name: wall_seconds(command, repeats) for name, command in commands.items()}
    begun, ready, *ended = (median(times) for times in walls.values())
    results: Section = {"width": size[0], "height": size[1]}
    for direction, wall in zip(DIRECTIONS, ended, strict=True):
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
    sections = {name: sections[name] for name in SECTIONS if name in sections}
    lines = ["# Time and memory on a CPU", ""]
    for name, section in sections.items():
        meta = section["meta"]
        used = ", ".join(f"{package} {version}" for package, version in meta["versions"].items())
        lines.append(
            f"- `{name}`: `{meta['command']}`, commit {meta['commit']}, {meta['date']}, "
            f"{meta['machine']}, {meta['threads']} threads, {meta['system']}; {used}."
            + (" **Tiny sizes: these figures mean nothing.**" if meta["quick"] else "")
        )
        for what, value in section.get("exponents", {}).items():
            lines.append(f"  - Exponent of the time, {what}: {value:.3f}.")
        for what, why in section.get("left_out", {}).items():
            lines.append(f"  - `{what}` is left out: {why}.")
    rows = [
        (name, case, as_text(seconds), cost, "-" if mib is None else f"{mib:.0f}")
        for name, section in sections.items()
        for case, seconds, cost, mib in FIGURES[name](section)
    ]
    heading = ("section", "case", "s", "cost or share", "MiB")
    return "\n".join(lines) + f"\n\n{NOTE}\n\n{markdown_table(heading, rows, figures=3)}\n"


NOTE = """\
Times are medians. Memory of scans is the peak beyond what the process held before the call, results
included; that of the codec is the peak of the process with torch and the weights; that of a stage,
while it was at work, is beyond what was loaded. The first run of a process also sets up torch and
the float64 copies of the entropy path. Scans are part of the stages."""

# Case, seconds, cost or share, MiB.
Figures = Iterator[tuple[str, float | None, str, float | None]]


def scan_figures(section: Section) -> Figures:
    """Yield the figures of the sections `scan` and `growth`."""
    for row in section["rows"]:
        case = f"{row['backend']} {row['shape']}, {row['mode']}"
        if row["status"] == "ok":
            cost = f"{as_text(row['ns_per_elt'])} ns/elt"
            yield case, row["median_ms"] / 1e3, cost, row["peak_mib"]
        else:
            yield f"{case}: {row['status']}", None, row["reason"], None


def codec_figures(section: Section) -> Figures:
    """Yield the figures of the sections `codec` and `large`."""
    for run in section["runs"]:
        case = f"{run['model']} {run['width']}x{run['height']} {run['direction']}"
        if "median_s" not in run:
            yield f"{case}: {run['status']}", None, "", None
            continue
        cost = f"{as_text(1e6 * run['median_s'] / (run['width'] * run['height']))} µs/pixel"
        yield case, run["median_s"], f"{cost}, {run['bpp']:.2f} bpp", run["peak_mib"]
        yield f"{case}: first run; MiB before it", run["first_s"], "", run["loaded_mib"]
        yield f"{case}: scans", run["scans_s"], f"{run['scans_s'] / run['median_s']:.1%}", None
        for stage, figures in run["stages"].items():
            share = f"{figures['share']:.1%}"
            yield f"{case}: {stage}", figures["seconds"], share, figures["peak_mib"]


def startup_figures(section: Section) -> Figures:
    for direction in DIRECTIONS:
        case, figures = f"cmamba {direction}", section[direction]
        yield case, figures["wall_s"], f"at most {as_text(figures['wall_max_s'])} s", None
        for part, seconds in figures["split_s"].items():
            yield f"{case}: {part}", seconds, f"{seconds / figures['wall_s']:.1%}", None


FIGURES: dict[str, Callable[[Section], Figures]] = {
    "scan": scan_figures,
    "growth": scan_figures,
    "codec": codec_figures,
    "startup": startup_figures,
    "large": codec_figures,
}


def failures(sections: Section) -> list[str]:
    """Return what was wrong, or took more than it may, in one line each."""
    lines = [
        f"{name}: {row['backend']}, {row['mode']}: {row['reason']}"
        for name in ("scan", "growth")
        for row in sections.get(name, {}).get("rows", ())
        if row["status"] == "failed"
    ]
    for name in ("codec", "large"):
        lines += [
            f"{name}: {run['model']}, {run['width']}x{run['height']}, {run['direction']}: "
            f"{run['status']}"
            for run in sections.get(name, {}).get("runs", ())
            if run["status"] != "ok"
        ]
    return lines


def image_size(text: str) -> tuple[int, int]:
    """Read a size written as WIDTHxHEIGHT, for argparse."""
    try:
        width, height = map(profile_scan.count, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT, got {text!r}") from None
    return width, height


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--only",
        nargs="*",
        choices=SECTIONS,
        metavar="SECTION",
        help=f"of {', '.join(SECTIONS)}; none to write the table again",
    )
    add("--json", type=profile_scan.output, help="results, which are kept where not renewed")
    add("--markdown", type=profile_scan.output, help="write the table here")
    add("--threads", type=profile_scan.count, help="torch threads (default: torch's choice)")
    add("--repeats", type=profile_scan.count, default=5, help="of each, at most (default: 5)")
    add(
        "--seconds",
        type=profile_scan.positive,
        default=5.0,
        help=f"after which {profile_scan.MIN_REPEATS} repeats are enough (default: 5)",
    )
    add("--large-size", type=image_size, metavar="WxH", help="default: 6000x4000")
    add("--quick", action="store_true", help="tiny sizes, to see whether everything runs")
    return parser


SECTIONS: dict[str, Callable[[Plan, Settings], Section]] = {
    "scan": lambda plan, settings: measure_scan(plan.scan, settings),
    "growth": measure_growth,
    "codec": lambda plan, settings: measure_codec(plan.sizes, plan.models, settings),
    "startup": lambda plan, settings: measure_startup(plan.startup, settings.repeats),
    "large": lambda plan, settings: measure_large(plan.large, settings, LARGE_LIMITS),
}


def read_sections(path: Path | None) -> Section:
    """Return the sections of an earlier run; none where there is no such file."""
    if path is None or not path.exists():
        return {}
    return json.loads(path.read_text())["sections"]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    plan = QUICK if args.quick else FULL
    if args.large_size:
        plan = replace(plan, large=args.large_size)
    settings = Settings(torch.device("cpu"), "fp32", MODES, args.repeats, args.seconds)
    asked = [name for name in SECTIONS if name != "large"] if args.only is None else args.only
    try:
        sections = read_sections(args.json)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"--json must be a file that this command wrote, or none yet: {error}")

    for name in (name for name in SECTIONS if name in asked):
        try:
            section = SECTIONS[name](plan, settings)
        except KeyboardInterrupt:
            kept = f"the sections before it are in {args.json}" if args.json else "nothing is kept"
            print(f"interrupted in {name}; {kept}", file=sys.stderr)
            return 130
        meta = {
            **of_run("bench_cpu.py", argv),
            "system": f"{platform.system()} {platform.release()}",
            "versions": versions(*profile_scan.MEASURED_WITH),
            "quick": args.quick,
        }
        sections[name] = {"meta": meta, **section}
        if args.json:  # after each section: what was measured is kept, whatever ends the run
            report = {"sections": sections}
            write_atomically(args.json, (json.dumps(report, indent=1) + "\n").encode())
    text = to_markdown(sections)
    if args.markdown:
        write_atomically(args.markdown, text.encode())
    print(text)
    failed = failures({name: sections[name] for name in asked})
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

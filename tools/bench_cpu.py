"""What scans and codec cost on a CPU: time, memory, share of each stage, growth with size.

    python tools/bench_cpu.py --json benchmarks/cpu.json --markdown benchmarks/cpu.md
    python tools/bench_cpu.py --only large --json benchmarks/cpu.json --markdown benchmarks/cpu.md
    python tools/bench_cpu.py --only --json benchmarks/cpu.json --markdown benchmarks/cpu.md

Sections, in this order; all but `large` unless `--only` names some:

    scan     one scan of four directions, ours and peers in the same run, beside the limit of a
             hand-written loop; peers take 15 GB of memory, and one of them wants
             `pip install -c constraints.txt mambapy`
    growth   scans against the number of positions and of states
    codec    encode and decode, by model, size of the picture and stage
    startup  `cmamba encode` and `cmamba decode` as whole processes, and what they spend where
    large    a photograph of 24 megapixels; the exit status is 1 if it takes too much time or memory

A section replaces its predecessor in the JSON and leaves the others; the page is made from the
JSON, and `--only` without a name does nothing else.  Every picture is encoded and decoded in a
process of its own, whose peak memory is counted.  Pictures are the photograph that ships, continued
by mirroring.  `small` has no trained weights; with random ones, of a fixed seed, the networks take
the same time, and the coder more, as the files are larger.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import profile_scan
import torch
from cpu_page import goals, to_markdown
from profile_scan import (
    BOTH,
    FORWARD,
    MIN_REPEATS,
    Case,
    Measurement,
    Settings,
    Shape,
    UnavailableError,
)
from provenance import of_run
from resident import available_bytes, peak_bytes, resident_bytes
from stage_clock import Timing, time_by_stage
from tqdm import tqdm

import cmamba_ref
from cmamba_ref import CMamba
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.cli.demo import PHOTOGRAPH
from cmamba_ref.codec import images
from cmamba_ref.model import MULTIPLE
from cmamba_ref.ops.dispatch import BACKENDS
from cmamba_ref.weights import pretrained_names

Section = dict[str, Any]  # what JSON holds

TOOLS = Path(__file__).parent
# Of a scan; those that are not there are reported with the reason.
OURS, PEERS = ("chunked",), ("ref-style", "mambapy")
MODES = (FORWARD, BOTH)
# Peers hold so many tensors of an fp32 number per element of the scan, forward and backward.
# Without the memory, the system would end this process and perhaps others.
PEER_TENSORS = 14
MIN_POINTS = 2  # of a fitted exponent
ENCODE, DECODE = DIRECTIONS = ("encode", "decode")


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        scan: the shape on which peers are compared.
        lengths, states: shapes that differ in one size.
        pictures: width and height, of the section `codec`.
        startup, large: width and height.
        models: configurations; one without trained weights gets random ones.
    """

    scan: Shape
    lengths: tuple[Shape, ...]
    states: tuple[Shape, ...]
    pictures: tuple[tuple[int, int], ...]
    startup: tuple[int, int]
    large: tuple[int, int]
    models: tuple[str, ...] = ("tiny", "small")


FULL = Plan(
    scan=Shape(1, 128, 192, 192, 16, 6),
    lengths=tuple(Shape(1, side, side, 64, 16, 4) for side in (64, 128, 256, 448, 632)),
    states=tuple(Shape(1, 128, 128, 64, n, 4) for n in (1, 2, 4, 8, 16, 32)),
    pictures=((256, 256), (768, 512), (2048, 1365)),
    startup=(768, 512),
    large=(6000, 4000),
)
# Whether everything runs; the figures mean nothing.
QUICK = Plan(
    scan=Shape(1, 6, 8, 4, 2, 1),
    lengths=tuple(Shape(1, side, side, 4, 2, 1) for side in (4, 8)),
    states=tuple(Shape(1, 6, 6, 4, n, 1) for n in (1, 2)),
    pictures=((64, 64), (128, 64)),
    startup=(64, 64),
    large=(128, 128),
    models=("tiny",),
)


# ---------------------------------------------------------------- scans


def measure_scan(shape: Shape, settings: Settings) -> Section:
    """Our backends and the peers on one shape; those that are wrong are not timed."""
    candidates, left_out = [], {}
    for name in (*OURS, *PEERS):
        try:
            if name not in (*BACKENDS, *profile_scan.PEERS):
                raise UnavailableError("this version has no such backend")
            if name in PEERS:
                check_memory(4 * shape.elts * PEER_TENSORS)
            candidates.append(profile_scan.find_candidate(name, settings))
        except UnavailableError as error:
            left_out[name] = str(error)
    outcomes = profile_scan.pass_gate(candidates, shape, settings)
    rows = []
    meter = profile_scan.meter_for(settings.device)
    for mode in tqdm(MODES, desc="scan", disable=None):
        results = profile_scan.measure_sound(candidates, outcomes, shape, mode, settings, meter)
        case = Case("scan", shape)
        rows += [
            asdict(profile_scan.to_row(case, c, mode, results[c.name], settings, gpu=None))
            for c in candidates
        ]
    arguments = profile_scan.draw_arguments(shape, settings).values()
    return {
        "shape": str(shape),
        "positions": shape.height * shape.width,
        "inputs_mib": sum(x.nbytes for x in arguments) / 2**20,
        "rows": rows,
        "left_out": left_out,
    }


def check_memory(needed: int) -> None:
    """Raise UnavailableError where so many bytes are not to be had."""
    available = available_bytes()
    if available is not None and available < needed:
        raise UnavailableError(
            f"it takes about {needed / 2**30:.0f} GiB of memory, and {available / 2**30:.0f} GiB "
            "are available"
        )


def in_rounds(
    calls: list[Callable[[], object]], settings: Settings, progress: tqdm
) -> list[Measurement]:
    """A measurement of each call; they take turns, so that a drift of the machine hits all."""
    meter = profile_scan.meter_for(settings.device)
    measurements = []
    for call in calls:
        call()  # a warm-up
        measurements.append(Measurement(peak_bytes=meter.peak_bytes(call)))
        progress.update()
    while any(not settings.enough(m.times) for m in measurements):
        for call, measurement in zip(calls, measurements, strict=True):
            if not settings.enough(measurement.times):
                measurement.times.append(meter.seconds(call))
    return measurements


def measure_growth(plan: Plan, settings: Settings) -> Section:
    """The backend `chunked` against the number of positions, and of states."""
    scan = functools.partial(cmamba_ref.selective_scan_2d, backend="chunked")
    series = {"positions": plan.lengths, "states": plan.states}
    rows, exponents = [], {}
    total = len(MODES) * sum(map(len, series.values()))
    with tqdm(total=total, desc="growth", disable=None) as progress:
        for varied, shapes in series.items():
            for mode in MODES:
                calls = []
                for shape in shapes:
                    arguments = profile_scan.draw_arguments(shape, settings)
                    grad_y = profile_scan.draw_gradient(arguments["x"])
                    calls.append(profile_scan.prepare(scan, arguments, grad_y, mode))
                points = []
                measurements = in_rounds(calls, settings, progress)
                for shape, measurement in zip(shapes, measurements, strict=True):
                    median = float(np.median(measurement.times))
                    size = shape.height * shape.width if varied == "positions" else shape.states
                    points.append((size, median))
                    rows.append(
                        {
                            "varied": varied,
                            "size": size,
                            "shape": str(shape),
                            "mode": mode,
                            "repeats": len(measurement.times),
                            "median_s": median,
                            "ns_per_elt": median * 1e9 / shape.elts,
                            "extra_mib": as_mib(measurement.peak_bytes),
                        }
                    )
                exponents[f"{varied}, {mode}"] = exponent(points)
    return {"backend": "chunked", "rows": rows, "exponents": exponents}


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The e of time = c size^e, by least squares on logarithms; None for a single size."""
    sizes, seconds = np.log(np.array(points)).T
    if len(set(sizes)) < MIN_POINTS:
        return None
    return float(np.polyfit(sizes, seconds, 1)[0])


def as_mib(size: int | None) -> float | None:
    return None if size is None else size / 2**20


# ---------------------------------------------------------------- the codec


def photograph(width: int, height: int) -> np.ndarray:
    """The photograph that ships, continued by mirroring at its edges, or cut: uint8 `[H, W, 3]`."""
    picture = images.read_image(PHOTOGRAPH)
    below, right = max(0, height - picture.shape[0]), max(0, width - picture.shape[1])
    return np.pad(picture, ((0, below), (0, right), (0, 0)), "symmetric")[:height, :width]


@dataclass(frozen=True)
class Limits:
    """What a run may take."""

    seconds: float
    gib: float


# For 24 megapixels.
LARGE_LIMITS = Limits(seconds=600, gib=8)
# A run that exceeds its limits by so much ends itself: the figure no longer matters, and the
# machine may be at the end of its memory.
STOP_AT = 1.5


@dataclass(frozen=True)
class Job:
    """One picture to be encoded, or decoded, in a process of its own.

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


def code_picture(job: Job) -> tuple[Section, bytes]:
    """Do a job: its figures, and the encoded picture."""
    if job.limits:
        threading.Thread(target=end_beyond, args=(job.limits,), daemon=True).start()
    torch.set_num_threads(job.threads)
    model = CMamba.from_pretrained(job.model)
    if job.direction == ENCODE:
        call = functools.partial(cmamba_ref.encode, photograph(job.width, job.height), model)
    else:
        call = functools.partial(cmamba_ref.decode, job.data, model)
    loaded, peak_before = resident_bytes(), peak_bytes()

    # Only the first run is that of a user, who starts a process per picture: its memory counts.
    result, first = time_by_stage(model, call, memory=True)
    later: list[Timing] = []
    settings = Settings(torch.device("cpu"), "fp32", MODES, job.repeats, job.seconds)
    while not settings.enough([timing.total for timing in later]) and job.repeats:
        later.append(time_by_stage(model, call)[1])
    timings = later or [first]

    total = float(np.median([timing.total for timing in timings]))
    stages = {}
    for stage in first.stages:
        seconds = float(np.median([timing.stages.get(stage, 0.0) for timing in timings]))
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
        "scans_s": float(np.median([timing.scans for timing in timings])),
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
    """The result of a call in a new interpreter, which has nothing in memory that is not its own.

    Raises:
        BrokenProcessPool: the process died.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(call, *arguments).result()


def model_sources(names: tuple[str, ...], folder: Path) -> dict[str, str]:
    """Where each model is: those that ship by name, the others made with random weights."""
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
    pictures: tuple[tuple[int, int], ...],
    models: tuple[str, ...],
    settings: Settings,
    limits: Limits | None = None,
) -> Section:
    """Encode and decode with each model, for each size.

    Args:
        limits: given for pictures so large that they are coded only once.
    """
    runs = []
    cases = [(name, size) for name in models for size in pictures]
    with (
        tempfile.TemporaryDirectory() as scratch,
        tqdm(total=2 * len(cases), desc="codec", disable=None) as progress,
    ):
        sources = model_sources(models, Path(scratch))
        for name, (width, height) in cases:
            data = b""
            for direction in DIRECTIONS:
                job = Job(
                    sources[name],
                    width,
                    height,
                    direction,
                    data,
                    torch.get_num_threads(),
                    0 if limits else settings.repeats,
                    settings.seconds,
                    limits,
                )
                section, data = run_job(name, job)
                runs.append(section)
                progress.update()
    exponents = {}
    for name in models:
        for direction in DIRECTIONS:
            points = [
                (padded_pixels(run["width"], run["height"]), run["median_s"])
                for run in runs
                if (run["model"], run["direction"], run["status"]) == (name, direction, "ok")
            ]
            if len(points) >= MIN_POINTS:
                exponents[f"{name}, {direction}"] = exponent(points)
    return {"runs": runs, "exponents": exponents}


def run_job(name: str, job: Job) -> tuple[Section, bytes]:
    """Do a job in a process of its own; what becomes of it is a result, whatever it is."""
    nothing = {
        "model": name,
        "width": job.width,
        "height": job.height,
        "direction": job.direction,
    }
    if job.direction == DECODE and not job.data:
        return {**nothing, "status": "not run: there is no file"}, b""
    try:
        return in_fresh_process(code_picture, job)
    except BrokenProcessPool:
        return {**nothing, "status": "failed: the process ended, for want of memory or time"}, b""


def padded_pixels(width: int, height: int) -> int:
    """Pixels that are coded."""
    return -(-width // MULTIPLE) * -(-height // MULTIPLE) * MULTIPLE**2


def measure_large(size: tuple[int, int], settings: Settings, limits: Limits) -> Section:
    """One large picture with `small`, once."""
    section = measure_codec((size,), ("small",), settings, limits)
    for run in section["runs"]:
        if run["status"] == "ok" and run["first_s"] > limits.seconds:
            run["status"] = f"failed: more than {limits.seconds:g} s"
        elif run["status"] == "ok" and (run["peak_mib"] or 0) > 1024 * limits.gib:
            run["status"] = f"failed: more than {limits.gib:g} GiB"
    return {**section, "limits": asdict(limits)}


# ---------------------------------------------------------------- whole commands


def measure_startup(size: tuple[int, int], repeats: int) -> Section:
    """`cmamba` as a user runs it, from the first to the last moment of its process."""
    results: Section = {"width": size[0], "height": size[1]}
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with tempfile.TemporaryDirectory() as scratch:
        picture, encoded, decoded = (
            str(Path(scratch) / name) for name in ("photo.png", "photo.cmb", "back.png")
        )
        images.write_png(picture, photograph(*size))
        commands = {
            ENCODE: ["encode", picture, "-o", encoded, "--force"],
            DECODE: ["decode", encoded, "-o", decoded, "--force"],
        }
        for direction, command in commands.items():
            plain = [sys.executable, "-m", "cmamba_ref", *command]
            timed = [sys.executable, str(TOOLS / "timed_cli.py"), *command]
            run_command(plain, environment)  # the files come into memory
            walls, splits = [], []
            for _ in tqdm(range(repeats), desc=f"cmamba {direction}", disable=None):
                start = time.monotonic()
                run_command(plain, environment)
                walls.append(time.monotonic() - start)
                splits.append(split_command(timed, environment))
            results[direction] = {
                "repeats": repeats,
                "wall_s": float(np.median(walls)),
                "wall_max_s": max(walls),
                "split_s": {
                    part: float(np.median([split[part] for split in splits])) for part in splits[0]
                },
            }
    return results


def run_command(command: list[str], environment: dict[str, str]) -> str:
    """The stdout of a command.

    Raises:
        CalledProcessError: it failed.
    """
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


# What begins at a moment that `timed_cli.py` notes, where its name does not say it.
PARTS = {
    "begun": "interpreter",
    "started": "imports",
    "imported": "arguments",
    "done": "ending",
}


def split_command(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Seconds of each part of a command run by `timed_cli.py`; together they are all it takes."""
    begun = time.monotonic()
    output = run_command(command, environment)
    ended = time.monotonic()
    moments: dict[str, float] = {
        "begun": begun,
        **json.loads(output.splitlines()[-1]),
        "ended": ended,
    }
    names, times = list(moments), list(moments.values())
    return {
        PARTS.get(name, name): later - earlier
        for name, earlier, later in zip(names, times, times[1:], strict=False)
    }


# ---------------------------------------------------------------- command line


def provenance(command: list[str], quick: bool) -> Section:
    """What a section was measured with."""
    versions = profile_scan.provenance(
        "bench_cpu.py", Settings(torch.device("cpu"), "fp32", MODES, 1, 1), command
    )["versions"]
    return {
        **of_run("bench_cpu.py", command),
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions,
        "quick": quick,
    }


def failures(sections: Section) -> list[str]:
    """What was wrong, or took more than it may, in one line each."""
    rows = sections.get("scan", {}).get("rows", ())
    lines = [
        f"scan: {row['backend']}, {row['mode']}: {row['reason']}"
        for row in rows
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


def picture_size(text: str) -> tuple[int, int]:
    """A size written as WIDTHxHEIGHT, for argparse."""
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
        help=f"of {', '.join(SECTIONS)}; none to write the page again",
    )
    add("--json", type=profile_scan.output, help="results, which are kept where not renewed")
    add("--markdown", type=profile_scan.output, help="write the page here")
    add("--threads", type=profile_scan.count, help="torch threads (default: torch's choice)")
    add("--repeats", type=profile_scan.count, default=5, help="of each, at most (default: 5)")
    add(
        "--seconds",
        type=profile_scan.positive,
        default=5.0,
        help=f"measured time after which {MIN_REPEATS} repeats are enough (default: 5)",
    )
    add("--large-size", type=picture_size, metavar="WxH", help="default: 6000x4000")
    add("--quick", action="store_true", help="tiny sizes, to see whether everything runs")
    return parser


SECTIONS: dict[str, Callable[[Plan, Settings], Section]] = {
    "scan": lambda plan, settings: measure_scan(plan.scan, settings),
    "growth": measure_growth,
    "codec": lambda plan, settings: measure_codec(plan.pictures, plan.models, settings),
    "startup": lambda plan, settings: measure_startup(plan.startup, settings.repeats),
    "large": lambda plan, settings: measure_large(plan.large, settings, LARGE_LIMITS),
}


def read_sections(path: Path | None) -> Section:
    """The sections of an earlier run; none where there is no such file."""
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
        sections[name] = {"meta": provenance(argv, args.quick), **section}
        if args.json:  # after each section: what was measured is kept, whatever ends the run
            report = {"sections": sections}
            write_atomically(args.json, (json.dumps(report, indent=1) + "\n").encode())
    if args.markdown:
        write_atomically(args.markdown, to_markdown(sections).encode())
    for goal in goals(sections):
        print(goal.line())
    failed = failures({name: sections[name] for name in asked})
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

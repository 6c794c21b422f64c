"""How good the fixed rules of the Triton kernels are: other constants, measured beside them.

    python tools/tune_scan.py
    python tools/tune_scan.py --shape 1x128x128x192x16x6 --mode both --json tune.json

The kernels follow fixed rules (kernels/tiling.py) with a few constants in them. On each shape and
in each mode, this command changes one constant at a time, then all together to the best of each.
What would run the same kernels with the same sizes is left out.

The fixed rules pass the gate of profile_scan.py; every alternative is then held against them on
the shape itself, in output and gradients. What fails is reported and not timed, and the exit status
is 1. Everything takes turns with the fixed rules, one repeat each, as in profile_scan.py.

A constant is changed only while an alternative runs, in this process. Nothing is kept: what a scan
does never depends on a measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from profile_scan import (
    FORWARD,
    OK,
    Candidate,
    Case,
    Measurement,
    Meter,
    Outcome,
    Settings,
    UnavailableError,
    add_measuring_options,
    as_text,
    cases_of,
    check,
    device_name,
    draw_arguments,
    evaluate,
    find_candidate,
    measure_sound,
    meter_for,
    outcome_of,
    pass_gate,
    provenance,
    settings_of,
)
from torch import Tensor
from tqdm import tqdm

from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.testing import worst

# Constant: module of the kernels that reads it, and values to try.
CONSTANTS: dict[str, tuple[str, tuple[int, ...]]] = {
    "PROGRAMS": ("tiling", (512, 1024, 2048, 4096, 8192)),
    "FORWARD_REGISTERS": ("tiling", (64, 128, 192)),
    "BACKWARD_TILE": ("tiling", (256, 512, 1024)),
    "RECOMPUTE_STEPS": ("launch", (2, 4, 8)),
}
FIXED, TOGETHER = "fixed rules", "best of each"
# Other chunks and blocks add in another order. A sum over all positions of a large map has been
# rounded so often that this many eps of its type, relative to the largest magnitude, are allowed.
ALLOWED_EPS = 1000

NOTES = (
    "chunk, chunks: positions of a chunk of the sequence, and their number; block: channels of a "
    "program, and of one of the gradients' kernel in the modes that have a backward",
    "ms, IQR: median and interquartile range of single calls",
    "MiB: peak of memory beyond what was allocated before the timed part; measured on CUDA only",
    "ratio: median over that of the fixed rules, both from the same round of turns",
    "within: the median of the fixed rules over the least; the least of many is somewhat flattered "
    "by chance, so that the true distance is rather smaller",
    f"checked: max|alternative - fixed| <= {ALLOWED_EPS} eps max|fixed| for output and gradients, "
    "eps of fp64 or fp32, in which the scan computes, plus 2 eps of the result's type",
)


# ---------------------------------------------------------------- constants

Constants = dict[str, int]  # a value for each of CONSTANTS


def module(name: str) -> ModuleType:
    """A module of the kernels; not imported above because it may need triton."""
    return importlib.import_module(f"cmamba_ref.kernels.{name}")


def current_constants() -> Constants:
    """The constants as the kernels read them now; outside `patched` those of the fixed rules."""
    return {name: getattr(module(reader), name) for name, (reader, _) in CONSTANTS.items()}


@contextlib.contextmanager
def patched(constants: Constants) -> Iterator[None]:
    """Within the `with` block, the kernels' launch code reads these constants."""

    def write(values: Constants) -> None:
        for name, value in values.items():
            setattr(module(CONSTANTS[name][0]), name, value)

    before = current_constants()
    write(constants)
    try:
        yield
    finally:
        write(before)


# ---------------------------------------------------------------- trials


@dataclass(frozen=True)
class Job:
    """A shape in a mode, and how it is measured.

    Attributes:
        fixed: the kernels under the fixed rules.
    """

    fixed: Candidate
    case: Case
    mode: str
    settings: Settings
    meter: Meter

    @property
    def gradients(self) -> bool:
        return self.mode != FORWARD

    @property
    def compute_type(self) -> torch.dtype:
        return torch.promote_types(self.settings.dtype, torch.float32)


class Sizes(NamedTuple):
    """All that the constants decide about a call: those with the same sizes are the same."""

    chunk_length: int
    chunks: int
    block: int
    backward_block: int | None  # None in a forward
    piece: int | None  # likewise


def sizes_of(constants: Constants, job: Job) -> Sizes:
    shape = job.case.shape
    length = shape.height * shape.width
    with patched(constants):
        plan = module("tiling").plan(
            shape.batch, length, shape.channels, 1, shape.states, shape.rank, job.compute_type
        )
    return Sizes(
        min(plan.chunk_length, length),
        plan.chunks,
        plan.block,
        plan.backward_block if job.gradients else None,
        constants["RECOMPUTE_STEPS"] if job.gradients else None,
    )


def one_at_a_time(job: Job) -> dict[str, Constants]:
    """Constants to try, by name: the fixed ones, then with one changed where that has an effect."""
    fixed = current_constants()
    changed = {
        f"{name} {value}": fixed | {name: value}
        for name, (_, values) in CONSTANTS.items()
        for value in values
    }
    trials: dict[str, Constants] = {}
    seen: set[Sizes] = set()
    for name, constants in {FIXED: fixed, **changed}.items():
        sizes = sizes_of(constants, job)
        if sizes not in seen:
            seen.add(sizes)
            trials[name] = constants
    return trials


@dataclass(frozen=True)
class Row:
    """One trial on one shape in one mode; `NOTES` defines the figures.

    Attributes:
        trial: what is changed.
        sizes: fields of `Sizes`.
        status, reason: as in profile_scan.py; there are figures only with "ok".
    """

    label: str
    shape: str
    dtype: str
    mode: str
    trial: str
    constants: Constants
    sizes: dict[str, int | None]
    status: str
    reason: str = ""
    repeats: int = 0
    median_ms: float | None = None
    iqr_ms: float | None = None
    peak_mib: float | None = None
    ratio: float | None = None


def to_row(
    name: str, constants: Constants, result: Measurement, fixed: Measurement, job: Job
) -> Row:
    """A measurement as a row, compared with that of the fixed rules."""
    row = Row(
        label=job.case.label,
        shape=str(job.case.shape),
        dtype=job.settings.dtype_name,
        mode=job.mode,
        trial=name,
        constants=constants,
        sizes=sizes_of(constants, job)._asdict(),
        **asdict(result.outcome),
    )
    if result.outcome != OK:
        return row
    low, median, high = (float(q) for q in np.percentile(result.times, (25, 50, 75)))
    return replace(
        row,
        repeats=len(result.times),
        median_ms=median * 1e3,
        iqr_ms=(high - low) * 1e3,
        peak_mib=None if result.peak_bytes is None else result.peak_bytes / 2**20,
        ratio=median / float(np.median(fixed.times)) if fixed.outcome == OK else None,
    )


def compare(alternatives: list[Candidate], job: Job) -> dict[str, Outcome]:
    """Which alternatives agree with the fixed rules, by the rule at the end of `NOTES`."""
    try:
        arguments = draw_arguments(job.case.shape, job.settings)
        expected = evaluate(job.fixed.scan, arguments, job.gradients)
    except RuntimeError as error:  # too much for this machine, say
        return {candidate.name: outcome_of(error) for candidate in (job.fixed, *alternatives)}

    def wrong(results: dict[str, Tensor]) -> str:
        for name, result in results.items():
            eps = ALLOWED_EPS * torch.finfo(job.compute_type).eps
            eps += 2 * torch.finfo(result.dtype).eps
            error, bound = worst(result - expected[name]), eps * worst(expected[name])
            if not error <= bound:  # so that NaN fails
                return f"{name}: error {error:.3g} above the bound {bound:.3g}"
        return ""

    outcomes = {
        candidate.name: check(candidate, arguments, job.gradients, wrong)
        for candidate in alternatives
    }
    return {job.fixed.name: OK, **outcomes}


def try_out(trials: dict[str, Constants], job: Job) -> list[Row]:
    """A row for each trial; the fixed rules have to be among them."""
    alternatives = [
        replace(job.fixed, name=name, within=functools.partial(patched, constants))
        for name, constants in trials.items()
        if name != FIXED
    ]
    results = measure_sound(
        [job.fixed, *alternatives],
        compare(alternatives, job),
        job.case.shape,
        job.mode,
        job.settings,
        job.meter,
    )
    return [
        to_row(name, constants, results[name], results[FIXED], job)
        for name, constants in trials.items()
    ]


def best_of_each(rows: list[Row]) -> Constants:
    """Each constant from the fastest of these rows that changes no other."""
    fixed = current_constants()

    def best(name: str) -> int:
        comparable = [
            (row.ratio, row.constants[name])
            for row in rows
            if row.ratio is not None and row.constants == fixed | {name: row.constants[name]}
        ]
        return min(comparable, default=(1, fixed[name]))[1]

    return {name: best(name) for name in CONSTANTS}


def tune(job: Job, gate: Outcome) -> Iterator[list[Row]]:
    """Rows, as results come in.

    Args:
        gate: what came of the fixed rules at the gate; if they failed, nothing is tried.
    """
    fixed = current_constants()
    if gate != OK:
        failed = Measurement(outcome=gate)
        yield [to_row(FIXED, fixed, failed, failed, job)]
        return
    trials = one_at_a_time(job)
    rows = try_out(trials, job)
    yield rows
    best = best_of_each(rows)
    if sizes_of(best, job) not in {sizes_of(constants, job) for constants in trials.values()}:
        yield try_out({FIXED: fixed, TOGETHER: best}, job)[1:]


def verdict(rows: list[Row]) -> str:
    """How far the fixed rules are from the best of these rows, in one line."""
    ratios = [(row.ratio, row.trial) for row in rows if row.ratio is not None]
    if not ratios:
        return "the fixed rules were not measured"
    ratio, trial = min(ratios)
    return f"the fixed rules are within {100 * (1 / ratio - 1):.1f} % of the best ({trial})"


# ---------------------------------------------------------------- table

TRIAL_WIDTH = max(len(name) for name in (FIXED, TOGETHER, *CONSTANTS)) + 7
WIDTHS = {name: len(name) + 2 for name in CONSTANTS}
SIZES = {"chunk_length": "chunk", "chunks": "chunks", "block": "block", "backward_block": "in bwd"}
FIGURES = {"median_ms": "ms", "iqr_ms": "IQR", "peak_mib": "MiB", "ratio": "ratio"}


HEADING = (
    f"{'trial':<{TRIAL_WIDTH}}"
    + "".join(f"{name:>{width}}" for name, width in WIDTHS.items())
    + "".join(f"{name:>8}" for name in SIZES.values())
    + "".join(f"{name:>10}" for name in FIGURES.values())
)


def table_line(row: Row) -> str:
    """A row as text, aligned with `HEADING`; "-" where a value has no effect."""
    constants: dict[str, int | None] = {**row.constants}
    if row.mode == FORWARD:
        constants |= {"BACKWARD_TILE": None, "RECOMPUTE_STEPS": None}
    line = (
        f"{row.trial:<{TRIAL_WIDTH}}"
        + "".join(f"{as_text(constants[name]):>{width}}" for name, width in WIDTHS.items())
        + "".join(f"{as_text(row.sizes[name]):>8}" for name in SIZES)
    )
    if row.status != "ok":
        return f"{line}  {row.status}{': ' if row.reason else ''}{row.reason}"
    return line + "".join(f"{as_text(getattr(row, name)):>10}" for name in FIGURES)


# ---------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_measuring_options(parser)
    return parser


def tune_cases(cases: list[Case], fixed: Candidate, settings: Settings, rows: list[Row]) -> None:
    """Try everything, print it, and append to `rows` as results come in."""
    meter = meter_for(settings.device)
    gate: dict[tuple[int, int, int], Outcome] = {}
    with tqdm(total=len(cases) * len(settings.modes), disable=None) as progress:
        say = functools.partial(tqdm.write, file=sys.stdout)
        for case in cases:
            shape = case.shape
            kind = (shape.channels, shape.states, shape.rank)
            if kind not in gate:
                gate[kind] = pass_gate([fixed], shape, settings)[FIXED]
            for mode in settings.modes:
                say(f"\n{case.label}: {shape}, {mode}\n{HEADING}")
                first = len(rows)
                for new in tune(Job(fixed, case, mode, settings, meter), gate[kind]):
                    rows.extend(new)
                    say("\n".join(map(table_line, new)))
                say(verdict(rows[first:]))
                progress.update()


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    settings = settings_of(args)
    try:
        fixed = replace(find_candidate("triton", settings), name=FIXED)
    except UnavailableError as error:
        parser.error(f"the kernels cannot run: {error}")

    print(f"{device_name(settings.device)}, {args.dtype}; shapes are BxHxWxDxNxR")
    if settings.device.type == "cpu":
        print("the kernels run in triton's interpreter: these times say nothing about a GPU")
    rows: list[Row] = []
    interrupted = False
    constants = current_constants()
    try:
        tune_cases(cases_of(args), fixed, settings, rows)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted", file=sys.stderr)
    finally:  # what was measured is kept, whatever ended it
        if args.json:
            meta = provenance("tune_scan.py", settings, argv)
            meta |= {"fixed_rules": constants, "notes": NOTES}
            report = {"meta": meta, "results": [asdict(row) for row in rows]}
            write_atomically(args.json, (json.dumps(report, indent=1) + "\n").encode())
    print()
    for note in NOTES:
        print(textwrap.fill(note, 100, subsequent_indent="    "))
    if interrupted:
        return 130
    return 1 if any(row.status == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

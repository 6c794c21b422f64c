"""Tune the Triton kernels: measure other constants beside the fixed rules.

    python tools/tune_scan.py
    python tools/tune_scan.py --shape 1x128x128x192x16x6 --mode both --json tune.json

The kernels follow fixed rules (kernels/tiling.py) with a few constants in them.  On each shape and
in each mode this command changes one constant at a time, then all together to the best of each.
Trials that would run the same kernels with the same sizes are left out.

The fixed rules pass the check of profile_scan.py; every alternative is then held against them on
the shape itself, in output and gradients.  A trial that fails is reported and not timed, and the
exit status is 1.  Timing is interleaved round-robin, as in profile_scan.py.

A constant is changed only while an alternative runs, in this process.  Nothing is kept: the result
of a scan never depends on a measurement.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from profile_scan import (
    FORWARD,
    OK,
    Candidate,
    Case,
    Measurement,
    Meter,
    Outcome,
    Row,
    Settings,
    UnavailableError,
    as_text,
    cases_of,
    check_correctness,
    collect,
    device_name,
    draw_arguments,
    find_candidate,
    measure,
    measuring_parser,
    meter_for,
    outcome_of,
    settings_of,
    why_not,
)

from cmamba_ref import testing
from cmamba_ref.kernels import tiling  # pyright: ignore[reportMissingImports]

# Values to try, of the constants of `tiling.Constants`.
VALUES: dict[str, tuple[int, ...]] = {
    "programs": (512, 1024, 2048, 4096, 8192),
    "min_chunk": (16, 32, 64),
    "forward_registers": (64, 128, 192),
    "backward_tile": (256, 512, 1024),
    "recompute_steps": (2, 4, 8),
    "backward_registers": (128, 168, 255),
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
    backward_block: int | None  # None in a forward, as what follows
    backward_registers: int | None
    recompute_steps: int | None


def sizes_of(constants: tiling.Constants, job: Job) -> Sizes:
    shape = job.case.shape
    length = shape.height * shape.width
    with tiling.using(constants):
        plan = tiling.plan(
            shape.batch, length, shape.channels, 1, shape.states, shape.rank, job.compute_type
        )
    of_backward = (plan.backward_block, constants.backward_registers, constants.recompute_steps)
    of_backward = of_backward if job.gradients else (None, None, None)
    return Sizes(min(plan.chunk_length, length), plan.chunks, plan.block, *of_backward)


def one_at_a_time(job: Job) -> dict[str, tiling.Constants]:
    """Return constants to try: the fixed ones, then with one changed where that has an effect."""
    fixed = tiling.constants()
    trials, seen = {FIXED: fixed}, {sizes_of(fixed, job)}
    for name, values in VALUES.items():
        for value in values:
            constants = fixed._replace(**{name: value})
            sizes = sizes_of(constants, job)
            if sizes not in seen:
                trials[f"{name} {value}"] = constants
            seen.add(sizes)
    return trials


def compare(
    alternatives: list[Candidate], arguments: testing.Arguments, job: Job
) -> dict[str, Outcome]:
    """Return which alternatives agree with the fixed rules, by the rule at the end of `NOTES`."""
    expected = testing.evaluate(arguments, job.fixed.scan, gradients=job.gradients)
    outcomes = {FIXED: OK}
    for candidate in alternatives:
        outcomes[candidate.name] = OK
        try:
            with candidate.within():
                found = testing.evaluate(arguments, candidate.scan, gradients=job.gradients)
            for name, result in found.items():
                eps = ALLOWED_EPS * torch.finfo(job.compute_type).eps
                eps += 2 * torch.finfo(result.dtype).eps
                error = testing.worst(result - expected[name])
                margin = testing.Margin(name, error, eps * testing.worst(expected[name]))
                assert margin.is_kept, f"{name}: error {error:.3g} above {margin.bound:.3g}"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the candidate's
            outcomes[candidate.name] = outcome_of(error)
    return outcomes


def try_out(trials: dict[str, tiling.Constants], job: Job) -> list[Row]:
    """Return a row for each trial; the fixed rules have to be the first."""
    candidates = [
        replace(job.fixed, name=name, within=functools.partial(tiling.using, constants))
        for name, constants in trials.items()
    ]
    arguments = draw_arguments(job.case.shape, job.settings)
    outcomes = compare(candidates[1:], arguments, job)
    results = measure(candidates, outcomes, arguments, job.mode, job.settings, job.meter)
    rows = [
        to_row(result, constants, job)
        for result, constants in zip(results, trials.values(), strict=True)
    ]
    fixed = rows[0]["median_ms"]
    for row in rows:
        if fixed and row["median_ms"]:
            row["ratio"] = row["median_ms"] / fixed
    return rows


FIGURES = {"median_ms": "ms", "iqr_ms": "IQR", "peak_mib": "MiB", "ratio": "ratio"}


def to_row(result: Measurement, constants: tiling.Constants, job: Job) -> Row:
    return {
        "label": job.case.label,
        "shape": str(job.case.shape),
        "dtype": job.settings.dtype_name,
        "mode": job.mode,
        "trial": result.candidate.name,
        "constants": constants._asdict(),
        "sizes": sizes_of(constants, job)._asdict(),
        **result.figures(),
        "ratio": None,
    }


def best_of_each(trials: dict[str, tiling.Constants], rows: list[Row]) -> tiling.Constants:
    """Return each constant from the fastest of the trials that change no other."""
    best = tiling.constants()
    for name in VALUES:
        ratios = [
            (row["ratio"], trials[row["trial"]])
            for row in rows
            if row["ratio"] and row["trial"].startswith((FIXED, name))
        ]
        if ratios:
            best = best._replace(**{name: getattr(min(ratios)[1], name)})
    return best


def tune(job: Job, check: Outcome) -> Iterator[Row]:
    """Yield rows, as results come in.

    Args:
        check: result of checking the fixed rules; if they failed, nothing is tried.
    """
    if check != OK:
        yield to_row(Measurement(job.fixed, check), tiling.constants(), job)
        return
    trials = one_at_a_time(job)
    rows = try_out(trials, job)
    yield from rows
    best = best_of_each(trials, rows)
    if sizes_of(best, job) not in {sizes_of(constants, job) for constants in trials.values()}:
        yield from try_out({FIXED: tiling.constants(), TOGETHER: best}, job)[1:]


def verdict(rows: list[Row]) -> str:
    """Say how far the fixed rules are from the best of these rows, in one line."""
    measured = [row for row in rows if row["ratio"]]
    if not measured:
        return "the fixed rules were not measured"
    best = min(measured, key=lambda row: row["ratio"])
    others = best["constants"].items() - tiling.constants()._asdict().items()
    changed = ", ".join(f"{name} {value}" for name, value in sorted(others)) or FIXED
    return (
        f"the fixed rules are within {100 * (1 / best['ratio'] - 1):.1f} % of the best ({changed})"
    )


TRIAL_WIDTH = max(len(name) for name in (FIXED, TOGETHER, *VALUES)) + 7
SIZES = {
    "chunk_length": "chunk",
    "chunks": "chunks",
    "block": "block",
    "backward_block": "in bwd",
    "backward_registers": "regs",
    "recompute_steps": "steps",
}
HEADING = (
    f"{'trial':<{TRIAL_WIDTH}}"
    + "".join(f"{name:>8}" for name in SIZES.values())
    + "".join(f"{name:>10}" for name in FIGURES.values())
)


def table_line(row: Row) -> str:
    """Format a row, aligned with `HEADING`; "-" where a size has no effect."""
    line = f"{row['trial']:<{TRIAL_WIDTH}}"
    line += "".join(f"{as_text(row['sizes'][name]):>8}" for name in SIZES)
    return line + (why_not(row) or "".join(f"{as_text(row[name]):>10}" for name in FIGURES))


def tune_cases(cases: list[Case], fixed: Candidate, settings: Settings) -> Iterator[Row]:
    """Try everything and print it; yields rows as results come in."""
    meter = meter_for(settings.device)
    for case in cases:
        check = check_correctness(fixed, case.shape, settings)
        for mode in settings.modes:
            print(f"\n{case.label}: {case.shape}, {mode}\n{HEADING}", flush=True)
            rows = []
            for row in tune(Job(fixed, case, mode, settings, meter), check):
                print(table_line(row), flush=True)
                rows.append(row)
                yield row
            print(verdict(rows), flush=True)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = measuring_parser(__doc__)
    args = parser.parse_args(argv)
    settings = settings_of(args)
    try:
        fixed = replace(find_candidate("triton", settings), name=FIXED)
    except UnavailableError as error:
        parser.error(f"the kernels cannot run: {error}")
    print(f"{device_name(settings.device)}, {args.dtype}; shapes are BxHxWxDxNxR")
    if settings.device.type == "cpu":
        print("the kernels run in triton's interpreter: these times say nothing about a GPU")
    rows = tune_cases(cases_of(args), fixed, settings)
    rules = tiling.constants()._asdict()
    return collect(rows, "tune_scan.py", args, argv, NOTES, fixed_rules=rules)


if __name__ == "__main__":
    sys.exit(main())

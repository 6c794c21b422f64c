"""Damages files and weights at random, for as long as you like, and looks at what becomes of them.

    python tools/fuzz.py --minutes 60 --seed 1 -o fuzz.json

Every damaged input has to end in a sound result or in an error that the documentation names, in
bounded time and memory.  What does not is a finding: the input and the traceback go into the folder
of `--findings`, and the exit status is 1.  `tools/fuzz_targets.py` says what is attacked,
`tests/hostile_helpers.py` how, and `tools/fuzz_worker.py` within which limits.

An input that reaches lines of the package that its target had not reached, or a new reason, is kept
and damaged further.  Trials are a function of the seed alone, up to where the time ends.

A file that exists is added to: it lists its runs and sums them up, and refuses a seed it has.
Linux only, for the limits on memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import provenance
from fuzz_targets import TARGETS, scratch
from fuzz_worker import (
    DEADLINE,
    MEMORY_LIMIT,
    SECONDS_LIMIT,
    Trial,
    Worker,
    executable_lines,
    set_up,
    sources,
)

from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.errors import InvalidArgumentError

SAVE_EVERY = 60.0
# Kept inputs are small; more than this per target would only make each one rarer.
MOST_KEPT = 1000
# Larger inputs are no examples for `--examples`.
MOST_EXAMPLE_BYTES = 300


class Run:
    """One run: what it tried and what came of it.

    Args:
        seed: of all that is drawn.
        findings: folder for inputs that showed a defect; made when there is one.
    """

    def __init__(self, seed: int, findings: Path) -> None:
        self.outcomes: dict[str, Counter[str]] = {name: Counter() for name in TARGETS}
        self.seconds = dict.fromkeys(TARGETS, 0.0)
        self.slowest: dict[str, Any] = {"seconds": 0.0}
        self.largest: dict[str, Any] = {"bytes": 0}
        self.findings: list[dict[str, str]] = []
        self.examples: dict[str, dict[str, bytes]] = {name: {} for name in TARGETS}
        self.worker = Worker()
        self._folder = findings
        self._rng = np.random.default_rng(seed)
        self._names = [name for name, target in TARGETS.items() for _ in range(target.share)]
        self._seeds = {name: target.seeds() for name, target in TARGETS.items()}
        self._kept: dict[str, list[bytes]] = {name: [] for name in TARGETS}

    def sound_inputs(self) -> None:
        """Try every input undamaged first: it must be taken."""
        for name, seeds in self._seeds.items():
            for data in seeds:
                self._note(name, data, self.worker.run(name, data))

    def step(self) -> None:
        """Draw a target, damage an input and try it."""
        rng = self._rng
        name = self._names[rng.integers(len(self._names))]
        seeds, kept = self._seeds[name], self._kept[name]
        chosen = kept if kept and rng.integers(2) else seeds
        data = chosen[rng.integers(len(chosen))]
        changed = TARGETS[name].damaged(data, [*seeds, *kept[-20:]], rng)
        self._note(name, changed, self.worker.run(name, changed))

    def _note(self, name: str, data: bytes, trial: Trial) -> None:
        is_new = trial.outcome not in self.outcomes[name]
        self.outcomes[name][trial.outcome] += 1
        self.seconds[name] += trial.seconds
        if (is_new or trial.lines) and not trial.finding:
            self._kept[name] = [*self._kept[name], data][-MOST_KEPT:]
        smallest = self.examples[name].get(trial.outcome)
        if len(data) <= MOST_EXAMPLE_BYTES and (smallest is None or len(data) < len(smallest)):
            self.examples[name][trial.outcome] = data
        if trial.seconds > self.slowest["seconds"]:
            self.slowest = {
                "seconds": round(trial.seconds, 3), "target": name, "outcome": trial.outcome,
            }  # fmt: skip
        if trial.memory > self.largest["bytes"]:
            self.largest = {"bytes": trial.memory, "target": name, "outcome": trial.outcome}
        if trial.finding:
            self._keep_finding(name, data, trial)

    def _keep_finding(self, name: str, data: bytes, trial: Trial) -> None:
        """Save input and reason; of one kind a few are enough."""
        known = sum(f["target"] == name and f["outcome"] == trial.outcome for f in self.findings)
        digest = hashlib.sha256(data).hexdigest()[:16]
        self.findings.append({"target": name, "outcome": trial.outcome, "sha256": digest})
        if known < 5:
            self._folder.mkdir(parents=True, exist_ok=True)
            stem = self._folder / f"{name.replace(' ', '-')}-{digest}"
            stem.with_suffix(".bin").write_bytes(data)
            stem.with_suffix(".txt").write_text(trial.finding)
            print(f"finding: {stem}.bin: {trial.outcome}", file=sys.stderr)

    def as_json(self) -> dict[str, Any]:
        """Counts of this run."""
        reached = {
            name: sorted(
                {line for lines in self.worker.seen.values() for n, line in lines if n == name}
            )
            for name in executable_lines()
        }
        return {
            "outcomes": {n: dict(counts.most_common()) for n, counts in self.outcomes.items()},
            "processor_seconds": {name: round(s, 1) for name, s in self.seconds.items()},
            "slowest": self.slowest,
            "largest": self.largest,
            "findings": self.findings,
            "sources": sources(),
            "lines": reached,
        }


def summed_up(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """All runs together; lines only of those with the sources of now."""
    # An earlier run may lack a target that is new.
    outcomes = {name: [run["outcomes"].get(name, {}) for run in runs] for name in TARGETS}
    trials = {name: sum(sum(of_run.values()) for of_run in outcomes[name]) for name in TARGETS}
    reasons = {name: len(set().union(*outcomes[name])) for name in TARGETS}
    of_now = [run["lines"] for run in runs if run["sources"] == sources()]
    lines = {
        name: f"{len(possible & set().union(*(r[name] for r in of_now)))} of {len(possible)}"
        for name, possible in executable_lines().items()
    }
    return {
        "minutes": round(sum(r["minutes"] for r in runs), 1),
        "processor_minutes": round(sum(sum(r["processor_seconds"].values()) for r in runs) / 60, 1),
        "trials": sum(trials.values()),
        "trials_by_target": trials,
        "distinct_outcomes_by_target": reasons,
        "findings": sum(len(r["findings"]) for r in runs),
        "slowest": max((r["slowest"] for r in runs), key=lambda s: s["seconds"]),
        "largest": max((r["largest"] for r in runs), key=lambda s: s["bytes"]),
        "lines_reached": lines,
    }


def _earlier(output: Path | None, seed: int) -> list[dict[str, Any]]:
    """The runs that the output holds already."""
    if output is None or not output.exists():
        return []
    runs = json.loads(output.read_text())["runs"]
    if seed in [run["seed"] for run in runs]:
        raise InvalidArgumentError(
            f"`--seed` must be one that {output} has no run of, got {seed}; give another one"
        )
    return runs


def replay(paths: list[Path]) -> int:
    """Try inputs that a run has saved, and say what comes of them now; 1 if it is a finding."""
    worker, is_wrong = Worker(), False
    by_stem = {name.replace(" ", "-"): name for name in TARGETS}
    for path in paths:
        trial = worker.run(by_stem[path.stem.rpartition("-")[0]], path.read_bytes())
        is_wrong |= bool(trial.finding)
        print(f"{path}: {trial.outcome}, {trial.seconds:.2f} s, {trial.memory >> 20} MiB")
        print(trial.finding)
    worker.stop()
    return int(is_wrong)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=5.0, help="how long; default: %(default)s")
    add("--trials", type=int, help="end after so many trials, if that comes first")
    add("--seed", type=int, default=0, help="of all that is drawn; default: %(default)s")
    add("-o", "--output", type=Path, help="JSON to write or to add to; saved every minute")
    add(
        "--findings", type=Path, default=Path("runs/fuzz"),
        help="folder for inputs that show a defect; default: %(default)s",
    )  # fmt: skip
    add(
        "--replay",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="try findings again, and nothing else",
    )
    add("--examples", type=Path, help="JSON to write, the smallest input of each outcome")
    arguments = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(arguments)
    if args.replay:
        set_up()
        scratch()
        return replay(args.replay)
    try:
        earlier = _earlier(args.output, args.seed)
    except InvalidArgumentError as error:
        parser.error(str(error))
    set_up()
    scratch()  # here, so that this process removes it
    run = Run(args.seed, args.findings)
    meta = provenance.of_run("fuzz.py", arguments)
    meta["versions"] = provenance.versions("torch", "numpy", "safetensors", "pillow")
    start = saved = time.monotonic()

    def result() -> dict[str, Any]:
        minutes = round((time.monotonic() - start) / 60, 2)
        this = {"seed": args.seed, "minutes": minutes, "meta": meta, **run.as_json()}
        limits = {
            "bytes": MEMORY_LIMIT,
            "processor_seconds": SECONDS_LIMIT,
            "wall_clock_seconds": DEADLINE,
        }
        return {
            "limits": limits,
            "total": summed_up([*earlier, this]),
            "runs": [*earlier, this],
        }

    def save() -> None:
        if args.output is not None:
            write_atomically(args.output, (json.dumps(result()) + "\n").encode())

    trials = 0
    try:
        run.sound_inputs()
        while (now := time.monotonic()) - start < 60 * args.minutes and trials != args.trials:
            run.step()
            trials += 1
            if now - saved > SAVE_EVERY:
                saved = now
                save()
    except KeyboardInterrupt:
        print("interrupted; what was done is kept", file=sys.stderr)
    run.worker.stop()
    save()
    if args.examples is not None:
        examples = [
            json.dumps([name, outcome, data.hex()])
            for name, by_outcome in run.examples.items()
            for outcome, data in sorted(by_outcome.items())
        ]
        write_atomically(args.examples, ("[\n" + ",\n".join(examples) + "\n]\n").encode())
    total = {key: value for key, value in result()["total"].items() if key != "lines_reached"}
    print(json.dumps(total, indent=2))
    return 1 if run.findings else 0


if __name__ == "__main__":
    sys.exit(main())

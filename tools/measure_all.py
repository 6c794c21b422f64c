"""Every number and figure in benchmarks/ that needs neither training nor a GPU, by one command.

    pip install -c constraints.txt -e ".[eval,bench]"
    python tools/measure_all.py kodak
    python tools/measure_all.py kodak --only plots report
    python tools/measure_all.py kodak --only rd plots --limit 3 --into trial
    python tools/measure_all.py kodak --weights

`kodak` is a folder with the 24 Kodak images.  --weights renews what new weights make false: `rd`,
with the other codecs' results as they are, `plots`, `report` and `tables`.  By hand remain the
recipe and the id in the model card, and docs/models.md.
The stages, in this order; all but `tables` and
`large` unless --only names some:

    rd          size, PSNR, MS-SSIM, times: the weights that ship and the codecs of Pillow
    fine        size and PSNR at every tenth of a quality, and whether both rise at every step
    plots       rate-distortion plots of what `rd` measured, and one beside published points
    complexity  parameters, MACs by convention, time and memory of `base`, `small` and `tiny`
    analyze     what the model does inside, over the pictures
    report      one page of results, with the photograph that ships
    cpu         scans, codec and whole commands on a CPU; with peers, which take 15 GB of memory
    training    how fast `tiny` trains with each scan backend
    large       a photograph of 24 megapixels
    tables      the tables in README.md and in the model card, from the results

Each stage runs other tools of this folder, each in a process of its own, and prints the command.
A stage that is named runs: its results replace those that there are, file by file, each when it is
complete.  Ctrl-C or SIGTERM ends the stage at work and prints the command for what is left; `rd`,
`fine` and `analyze` then go on where they stopped, unless --fresh.  A stage that fails is named and
does not stop the others, but for those that need its results.  The exit status is 1 if one failed,
2 for wrong arguments, 130 after Ctrl-C or SIGTERM.

The Kodak images may not be passed on, so no result shows one: where a result shows a picture, it is
the photograph that ships, whose licence allows it.

Minutes that are printed beforehand are estimates for two cores of an AMD EPYC (Zen 5).  Times are
among what is measured: let the machine do nothing else.  Afterwards, the
stage `tables` puts the new numbers into the README.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from cmamba_ref.cli.batch import core_count
from cmamba_ref.cli.demo import PHOTOGRAPH

TOOLS = Path(__file__).resolve().parent
BENCHMARKS = TOOLS.parent / "benchmarks"
PUBLISHED = BENCHMARKS / "published_kodak.json"
# The anchor of published points, and those drawn; the others in there are for tables.
VTM = "VTM-9.1"
# Rates that all curves have, so that the plots show where they differ.
RATES = ("0", "1.6")
# After Ctrl-C a tool has so long to end by itself.
PATIENCE_SECONDS = 15
INTERRUPTED = 130

# A tool of this folder and its arguments.
Command = tuple[str, ...]


@dataclass(frozen=True)
class Inputs:
    """What all stages work on.

    Attributes:
        pictures: the folder of pictures.
        limit: only the first so many; None for all.
        model: name or directory of the model.
        into: the folder of results.
        fresh: begin anew what was interrupted.
        reuse: take the other codecs' results from where they are.
    """

    pictures: Path
    limit: int | None
    model: str
    into: Path
    fresh: bool
    reuse: bool = False

    def of_pictures(self, *more: str) -> Command:
        """Arguments of the tools that go through the pictures, and keep what they have done."""
        limit = () if self.limit is None else ("--limit", str(self.limit))
        return (str(self.pictures), *limit, *(("--fresh",) if self.fresh else ()), *more)

    def result(self, name: str) -> str:
        """The path of a result; {model} in its name stands for the model's."""
        return str(self.into / name.format(model=Path(self.model).name))

    @property
    def rd(self) -> str:
        """What the stage `rd` writes, and others read."""
        return self.result("kodak_{model}.json")


@dataclass(frozen=True)
class Stage:
    """A part of the work.

    Attributes:
        commands: what it runs, one after the other.
        minutes: about how long it takes, see above.
        needs: the stage whose results it reads.
        unasked: whether it runs where no stage is named.
    """

    commands: Callable[[Inputs], list[Command]]
    minutes: float
    needs: str | None = None
    unasked: bool = True


def rd(inputs: Inputs) -> list[Command]:
    # One process with all cores, whose times are those of a user.
    reused = ("--reuse", inputs.rd) if inputs.reuse else ()
    return [("eval_rd.py", *inputs.of_pictures("--model", inputs.model, *reused, "-o", inputs.rd))]


def fine(inputs: Inputs) -> list[Command]:
    sweep = ("--qualities", "1:8:0.1", "--codecs", "--brief", "--jobs", str(core_count()))
    output = inputs.result("kodak_{model}_fine.json")
    return [("eval_rd.py", *inputs.of_pictures("--model", inputs.model, *sweep, "-o", output))]


def plots(inputs: Inputs) -> list[Command]:
    anchor = ("--anchor", f"{inputs.rd}:jpeg420")
    drawn = [
        ("kodak_psnr.png", inputs.rd, *anchor, "--bpp", *RATES),
        ("kodak_ms_ssim.png", inputs.rd, *anchor, "--bpp", *RATES, "--metric", "ms-ssim"),
        (
            "kodak_published.png",
            f"{inputs.rd}:cmamba",
            f"{inputs.rd}:jpeg420",
            str(PUBLISHED),
            "--anchor",
            f"{PUBLISHED}:{VTM}",
            "--bpp",
            *RATES,
        ),
    ]
    return [("plot_rd.py", *arguments, "-o", inputs.result(name)) for name, *arguments in drawn]


def complexity(inputs: Inputs) -> list[Command]:
    found, page = inputs.result("complexity.json"), inputs.result("complexity.md")
    return [
        ("complexity.py", "--time", "--json", "-o", found),
        ("complexity.py", "--read", found, "--markdown", "-o", page),
    ]


def analyze(inputs: Inputs) -> list[Command]:
    # The means are over the pictures; the one that is shown is another.
    shown = ("--picture", str(PHOTOGRAPH))
    arguments = ("--model", inputs.model, *shown, "-o", inputs.result("analysis"))
    return [("analyze.py", *inputs.of_pictures(*arguments))]


def report(inputs: Inputs) -> list[Command]:
    shown = ("--picture", str(PHOTOGRAPH), "--model", inputs.model, "--megabytes", "2.4")
    return [("report.py", inputs.rd, *shown, "--bpp", *RATES, "-o", inputs.result("report.html"))]


def tables(inputs: Inputs) -> list[Command]:
    return [("readme_tables.py", "--results", str(inputs.into))]


def cpu(inputs: Inputs) -> list[Command]:
    return [("bench_cpu.py", *_of_cpu(inputs))]


def training(inputs: Inputs) -> list[Command]:
    written = ("--json", inputs.result("training.json"), "--markdown", inputs.result("training.md"))
    return [("bench_training.py", *written)]


def large(inputs: Inputs) -> list[Command]:
    return [("bench_cpu.py", "--only", "large", *_of_cpu(inputs))]


def _of_cpu(inputs: Inputs) -> Command:
    return ("--json", inputs.result("cpu.json"), "--markdown", inputs.result("cpu.md"))


# What new weights make false, but for times and what is inside.
WEIGHTS = ("rd", "plots", "report", "tables")
STAGES = {
    "rd": Stage(rd, minutes=12),
    "fine": Stage(fine, minutes=12),
    "plots": Stage(plots, minutes=0.1, needs="rd"),
    "complexity": Stage(complexity, minutes=1),
    "analyze": Stage(analyze, minutes=0.3),
    "report": Stage(report, minutes=0.2, needs="rd"),
    "cpu": Stage(cpu, minutes=14),
    "training": Stage(training, minutes=4),
    "large": Stage(large, minutes=10, unasked=False),
    "tables": Stage(tables, minutes=0.1, needs="rd", unasked=False),
}


# ---------------------------------------------------------------- running


def run(command: Command) -> int:
    """The exit status of a tool in a process of its own.

    Ctrl-C reaches every process of a terminal, so the tool ends by itself and tidies up; SIGTERM
    reaches only this one, and the tool is told.  A tool that does not end is made to.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the tool has ended.
    """
    tool, *arguments = command
    process = subprocess.Popen([sys.executable, str(TOOLS / tool), *arguments])
    try:
        status = process.wait()
    except KeyboardInterrupt as interrupt:
        if isinstance(interrupt, TerminatedError):
            process.send_signal(signal.SIGINT)
        _end(process)
        raise
    if status in (INTERRUPTED, -signal.SIGINT):  # only the tool was interrupted
        raise KeyboardInterrupt
    return status


class TerminatedError(KeyboardInterrupt):
    """SIGTERM."""


@contextmanager
def terminable() -> Iterator[None]:
    """In here SIGTERM raises a TerminatedError."""

    def stop(*_: object) -> NoReturn:
        raise TerminatedError

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen) -> None:
    for make_it_end in (lambda: None, process.terminate, process.kill):
        make_it_end()
        try:
            process.wait(PATIENCE_SECONDS)
            return
        except subprocess.TimeoutExpired:
            continue


def run_stage(stage: Stage, inputs: Inputs) -> str:
    """Run the commands of a stage; returns why it failed, "" if it did not."""
    for command in stage.commands(inputs):
        print(f"$ python tools/{shlex.join(command)}", flush=True)
        if (status := run(command)) != 0:
            return f"{command[0]} ended with exit status {status}"
    return ""


def run_all(names: Sequence[str], inputs: Inputs) -> dict[str, str]:
    """Run stages; returns what failed and why.

    Raises:
        StoppedError: Ctrl-C or SIGTERM.
    """
    failed: dict[str, str] = {}
    for k, name in enumerate(names):
        stage = STAGES[name]
        to_go = sum(STAGES[other].minutes for other in names[k:])
        print(
            f"\n[{k + 1}/{len(names)}] {name}: about {minutes(stage.minutes)}, all that is left "
            f"about {minutes(to_go)}",
            flush=True,
        )
        if stage.needs in failed:
            failed[name] = f"not run, as it needs {stage.needs}"
        else:
            begun = time.monotonic()
            try:
                failure = run_stage(stage, inputs)
            except KeyboardInterrupt:
                raise StoppedError(names[k:], failed) from None
            passed = f"after {minutes((time.monotonic() - begun) / 60)}"
            if failure:
                failed[name] = failure
            print(f"[{k + 1}/{len(names)}] {name}: {failure or 'done'}, {passed}", flush=True)
    return failed


class StoppedError(Exception):
    """Ctrl-C or SIGTERM.

    Attributes:
        left: the stages that are not complete.
        failed: those that failed before, and why.
    """

    def __init__(self, left: Sequence[str], failed: dict[str, str]) -> None:
        super().__init__("interrupted")
        self.left, self.failed = left, failed


def minutes(value: float) -> str:
    """Minutes as text, as exact as one can wait for them."""
    return f"{60 * value:.0f} s" if value < 1 else f"{value:.0f} min"


# ---------------------------------------------------------------- the command


def parse(argv: list[str]) -> tuple[list[str], Inputs]:
    """The stages to run and what they work on."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("pictures", type=Path, metavar="KODAK", help="folder with the 24 Kodak images")
    add(
        "--only",
        nargs="+",
        choices=STAGES,
        metavar="STAGE",
        help=f"of {', '.join(STAGES)} (default: all but tables and large)",
    )
    add("--weights", action="store_true", help="renew what new weights make false")
    add("--fresh", action="store_true", help="forget what an earlier run left unfinished")
    add("--into", type=Path, metavar="DIR", help="put results here (default: benchmarks)")
    add("--model", default="tiny", help="other weights: name or directory; needs --into")
    add("--limit", type=int, metavar="N", help="only the first N pictures; needs --into")
    args = parser.parse_args(argv)
    if args.weights and (args.only or args.into):
        parser.error("--weights must stand without --only and --into")
    if not args.pictures.is_dir():
        parser.error(f"KODAK must be a folder of pictures, got {str(args.pictures)!r}")
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit must be at least 1, got {args.limit}")
    if args.into is None:
        if args.model != "tiny" or args.limit is not None:
            parser.error(
                "benchmarks holds results of all images and the weights that ship; "
                "with --model or --limit say --into another folder"
            )
        args.into = BENCHMARKS
    elif "tables" in (args.only or ()):
        parser.error("the stage tables fills the repository's pages from benchmarks: no --into")
    try:
        args.into.mkdir(exist_ok=True)
    except OSError as error:
        parser.error(f"--into must be a folder in an existing one: {error}")
    only = WEIGHTS if args.weights else args.only
    names = [n for n, s in STAGES.items() if (n in only if only else s.unasked)]
    inputs = Inputs(args.pictures, args.limit, args.model, args.into, args.fresh, args.weights)
    return names, inputs


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    names, inputs = parse(argv)
    stopped = None
    try:
        with terminable():
            failed = run_all(names, inputs)
    except StoppedError as stop:
        stopped, failed = stop, stop.failed
    for name, why in failed.items():
        print(f"{name} failed: {why}", file=sys.stderr)
    if stopped is not None:
        rest = "--weights" if inputs.reuse else f"--only {' '.join(stopped.left)}"
        print(f"interrupted; for what is left say {rest}", file=sys.stderr)
        return INTERRUPTED
    print(f"\n{len(names) - len(failed)} of {len(names)} stages are done, in {inputs.into}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

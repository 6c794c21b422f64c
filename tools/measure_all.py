"""Renew every result in benchmarks/ that needs neither training nor a GPU.

    pip install -c constraints.txt -e ".[eval,bench]"
    python tools/measure_all.py kodak
    python tools/measure_all.py kodak --only plots report
    python tools/measure_all.py kodak --only rd plots --limit 3 --into trial
    python tools/measure_all.py kodak --weights

`kodak` is a folder with the 24 Kodak images. --weights renews what new weights make false: `rd`,
with the other codecs' results as they are, `plots`, `report` and `tables`. By hand remain the
recipe and the id in the model card, and docs/models.md.
The stages, in this order; all but `large` and `tables` unless --only names some:

    rd          size, PSNR, MS-SSIM, times: the bundled weights and the codecs of Pillow
    fine        size and PSNR at every tenth of a quality, and whether both rise at every step
    plots       rate-distortion plots of `rd`, and one beside published points
    complexity  parameters, MACs by convention, time and memory of `base`, `small` and `tiny`
    analyze     model analysis: spectra, correlation, fusion weights, bits, receptive field
    report      one page of results, with the bundled photograph
    cpu         scans, codec and whole commands on a CPU; with peers, which take 15 GB of memory
    training    training throughput of `tiny` with each scan backend
    large       an image of 24 megapixels
    tables      our rows in README.md and in the model card, from the results

Each stage runs other tools of this folder, each in a process of its own, and prints the command. A
stage that fails is named, and only stages that need its results are skipped. Ctrl-C or SIGTERM ends
the running tool and prints the options for the rest; `rd`, `fine` and `analyze` then resume, unless
--fresh. The exit status is 1 if a stage failed, 2 for wrong arguments, 130 after Ctrl-C or SIGTERM.

The Kodak images may not be passed on, so results show the bundled photograph. Printed minutes are
estimates for two cores of an AMD EPYC (Zen 5); let the machine do nothing else.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cmamba_ref.cli.batch import core_count
from cmamba_ref.cli.demo import PHOTOGRAPH

TOOLS = Path(__file__).resolve().parent
BENCHMARKS = TOOLS.parent / "benchmarks"
PUBLISHED = BENCHMARKS / "published_kodak.json"
# After Ctrl-C a tool has so long to end by itself.
TERMINATE_TIMEOUT_S = 15
INTERRUPTED = 130
# About how many minutes each stage takes.
STAGES = {
    "rd": 12, "fine": 12, "plots": 0.1, "complexity": 1, "analyze": 0.3, "report": 0.2, "cpu": 14,
    "training": 4, "large": 10, "tables": 0.1,
}  # fmt: skip
NEED_RD = ("plots", "report", "tables")
UNASKED = [name for name in STAGES if name not in ("large", "tables")]
WEIGHTS = ["rd", "plots", "report", "tables"]


@dataclass(frozen=True)
class Inputs:
    """What all stages work on.

    Attributes:
        pictures: the folder of images.
        limit: only the first so many; None for all.
        model: name or directory of the model.
        into: the folder of results.
        fresh: discard unfinished results.
        reuse: take the other codecs' results from where they are.
    """

    pictures: Path
    limit: int | None
    model: str
    into: Path
    fresh: bool = False
    reuse: bool = False

    def commands(self, stage: str) -> list[list[str]]:
        """Return the tools of this folder that a stage runs, with their arguments."""
        name = Path(self.model).name
        at = {key: str(self.into / file) for key, file in (
            ("rd", f"kodak_{name}.json"), ("fine", f"kodak_{name}_fine.json"),
            ("costs", "complexity.json"), ("html", "report.html"), ("crops", "crops.png"),
            ("folder", "analysis"),
        )}  # fmt: skip
        limit = [] if self.limit is None else ["--limit", str(self.limit)]
        folder = [str(self.pictures), *limit, *(["--fresh"] if self.fresh else [])]
        model, rates = ["--model", self.model], ["--bpp", "0", "1.6"]  # rates of all curves
        shown = ["--picture", str(PHOTOGRAPH)]
        reuse = ["--reuse", at["rd"]] if self.reuse else []
        sweep = ["--qualities", "1:8:0.1", "--codecs", "--brief", "--jobs", str(core_count())]
        ours, jpeg, vtm = f"{at['rd']}:cmamba", f"{at['rd']}:jpeg420", f"{PUBLISHED}:VTM-9.1"
        plot = [
            ["kodak_psnr.png", at["rd"], "--anchor", jpeg, *rates],
            ["kodak_ms_ssim.png", at["rd"], "--anchor", jpeg, *rates, "--metric", "ms-ssim"],
            ["kodak_published.png", ours, jpeg, str(PUBLISHED), "--anchor", vtm, *rates],
        ]

        def written(stem: str) -> list[str]:
            files = [str(self.into / f"{stem}.{suffix}") for suffix in ("json", "md")]
            return ["--json", files[0], "--markdown", files[1]]

        return {
            # One process with all cores, whose times are those of a user.
            "rd": [["eval_rd.py", *folder, *model, *reuse, "-o", at["rd"]]],
            "fine": [["eval_rd.py", *folder, *model, *sweep, "-o", at["fine"]]],
            "plots": [["plot_rd.py", *arguments, "-o", str(self.into / file)]
                      for file, *arguments in plot],
            "complexity": [
                ["complexity.py", "--time", "--json", "-o", at["costs"]],
                ["complexity.py", "--read", at["costs"], "--markdown", "-o",
                 str(self.into / "complexity.md")],
            ],
            # The means are over the folder; the image that is shown is another.
            "analyze": [["analyze.py", *folder, *model, *shown, "-o", at["folder"]]],
            "report": [["report.py", at["rd"], *shown, *model, "--quality", "2", *rates,
                        "--megabytes", "2.4", "-o", at["html"], "--crops", at["crops"]]],
            "cpu": [["bench_cpu.py", *written("cpu")]],
            "training": [["bench_training.py", *written("training")]],
            "large": [["bench_cpu.py", "--only", "large", *written("cpu")]],
            "tables": [["readme_tables.py", "--results", str(self.into)]],
        }[stage]  # fmt: skip


def run(command: Sequence[str]) -> int:
    """Return the exit status of a tool in a process of its own.

    Ctrl-C reaches every process of a terminal, SIGTERM only this one; the tool is told, and made to
    end if it does not.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the tool has ended.
    """
    tool, *arguments = command
    process = subprocess.Popen([sys.executable, str(TOOLS / tool), *arguments])
    try:
        status = process.wait()
    except KeyboardInterrupt as interrupt:
        told = signal.SIGINT if interrupt.args == (signal.SIGTERM,) else None
        for step in (told, signal.SIGTERM, signal.SIGKILL):
            if step is not None:
                process.send_signal(step)
            try:
                process.wait(TERMINATE_TIMEOUT_S)
                break
            except subprocess.TimeoutExpired:
                continue
        raise
    if status in (INTERRUPTED, -signal.SIGINT):  # only the tool was interrupted
        raise KeyboardInterrupt
    return status


def run_stage(name: str, inputs: Inputs) -> str:
    """Run the commands of a stage; return why it failed, "" if it did not."""
    for command in inputs.commands(name):
        print(f"$ python tools/{shlex.join(command)}", flush=True)
        if (status := run(command)) != 0:
            return f"{command[0]} ended with exit status {status}"
    return ""


def run_all(names: Sequence[str], inputs: Inputs) -> tuple[dict[str, str], Sequence[str]]:
    """Run stages; return what failed and why, and after an interrupt what is left."""
    failed: dict[str, str] = {}
    for k, name in enumerate(names):
        place, left = f"[{k + 1}/{len(names)}] {name}", sum(STAGES[n] for n in names[k:])
        print(
            f"\n{place}: about {minutes(STAGES[name])}, all that is left about {minutes(left)}",
            flush=True,
        )
        if name in NEED_RD and "rd" in failed:
            failed[name] = "not run, as it needs rd"
            continue
        start = time.monotonic()
        try:
            failure = run_stage(name, inputs)
        except KeyboardInterrupt:
            return failed, names[k:]
        if failure:
            failed[name] = failure
        passed = minutes((time.monotonic() - start) / 60)
        print(f"{place}: {failure or 'done'}, after {passed}", flush=True)
    return failed, ()


def minutes(value: float) -> str:
    """Minutes as text, as exact as one can wait for them."""
    return f"{60 * value:.0f} s" if value < 1 else f"{value:.0f} min"


def parse(argv: list[str] | None) -> tuple[list[str], Inputs]:
    """Return the stages to run and what they work on."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("pictures", type=Path, metavar="KODAK", help="folder with the 24 Kodak images")
    add("--only", nargs="+", choices=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}")
    add("--weights", action="store_true", help="renew what new weights make false")
    add("--fresh", action="store_true", help="discard what an earlier run left unfinished")
    add("--into", type=Path, metavar="DIR", help="put results here (default: benchmarks)")
    add("--model", default="tiny", help="other weights: name or directory; needs --into")
    add("--limit", type=int, metavar="N", help="only the first N images; needs --into")
    args = parser.parse_args(argv)
    if args.weights and (args.only or args.into):
        parser.error("--weights must stand without --only and --into")
    if not args.pictures.is_dir():
        parser.error(f"KODAK must be a folder of images, got {str(args.pictures)!r}")
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit must be at least 1, got {args.limit}")
    if args.into is None and (args.model != "tiny" or args.limit is not None):
        parser.error(
            "benchmarks holds results of all images and the bundled weights; "
            "with --model or --limit say --into another folder"
        )
    if args.into is not None and "tables" in (args.only or ()):
        parser.error("the stage tables fills the repository's pages from benchmarks: no --into")
    into = args.into or BENCHMARKS
    try:
        into.mkdir(exist_ok=True)
    except OSError as error:
        parser.error(f"--into must be a folder in an existing one: {error}")
    only = WEIGHTS if args.weights else args.only or UNASKED
    inputs = Inputs(args.pictures, args.limit, args.model, into, args.fresh, args.weights)
    return [name for name in STAGES if name in only], inputs


def main(argv: list[str] | None = None) -> int:
    names, inputs = parse(argv)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        failed, left = run_all(names, inputs)
    finally:
        signal.signal(signal.SIGTERM, before)
    for name, why in failed.items():
        print(f"{name} failed: {why}", file=sys.stderr)
    if left:
        rest = "--weights" if inputs.reuse else f"--only {' '.join(left)}"
        print(f"interrupted; for what is left say {rest}", file=sys.stderr)
        return INTERRUPTED
    print(f"\n{len(names) - len(failed)} of {len(names)} stages are done, in {inputs.into}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

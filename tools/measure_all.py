"""Renew most results in benchmarks/; its README lists the others.

    pip install -c constraints.txt -e ".[eval,bench]"
    python tools/measure_all.py kodak
    python tools/measure_all.py kodak --only plots report
    python tools/measure_all.py kodak --only rd plots --limit 3 --into trial
    python tools/measure_all.py kodak --weights --others CBSD68 CUrban100

`kodak` is a folder with the 24 Kodak images. --weights renews what new weights make false: `rd` and
`others`, with the other codecs' results as they are, `plots`, `report` and `tables`. By hand remain
the recipe and the id in the model card, docs/models.md, and tiny-msssim, which is a difference from
`tiny`: tools/pack_difference.py, `python tools/eval_rd.py kodak --model tiny-msssim --codecs`, its
model card, and what README.md and docs/benchmarks.md say of it.
The stages, in this order; all but `large` and `tables` unless --only names some:

    rd          size, PSNR, MS-SSIM, times: the bundled weights and the codecs of Pillow
    others      size and PSNR of the same on the images of other folders, which --others names
    fine        size and PSNR at every tenth of a quality, and whether both rise at every step
    plots       rate-distortion plots of `rd`, and one beside published points
    complexity  parameters, MACs by convention, time and memory of `base`, `small` and `tiny`
    analyze     model analysis: spectra, correlation, fusion weights, bits, receptive field
    report      one page of results, with the bundled image
    cpu         scans, codec and whole commands on a CPU; with peers, which take 15 GB of memory
    training    training throughput of `tiny` with each scan backend
    large       an image of 24 megapixels
    tables      our rows in README.md, docs/benchmarks.md and the model card

Each stage runs other tools of this folder, each in a process of its own, and prints the command. A
stage that fails is named, and only stages that need its results are skipped. Ctrl-C or SIGTERM ends
the running tool and prints the options for the rest; `rd`, `fine` and `analyze` then resume. The
exit status is 1 if a stage failed, 2 for wrong arguments, 130 after Ctrl-C or SIGTERM.

The Kodak images may not be passed on, so results show the bundled image. On two cores
of an AMD EPYC (Zen 5), `rd`, `fine` and `cpu` take ten minutes or more each, `large` five to ten,
the others less than five; let the machine do nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cmamba_ref.cli.batch import core_count
from cmamba_ref.cli.demo import DEMO_IMAGE
from cmamba_ref.cli.process_pool import TERMINATE_TIMEOUT_S

TOOLS = Path(__file__).resolve().parent
BENCHMARKS = TOOLS.parent / "benchmarks"
INTERRUPTED = 130
STAGES = (
    *("rd", "others", "fine", "plots", "complexity", "analyze", "report", "cpu", "training"),
    *("large", "tables"),
)
NEED_RD = ("plots", "report", "tables")
WEIGHTS = ("rd", "others", "plots", "report", "tables")
UNASKED = [name for name in STAGES if name not in ("large", "tables")]


def commands_of(
    images: Path,
    into: Path,
    model: str = "tiny",
    limit: int | None = None,
    reuse: bool = False,
    others: Sequence[Path] = (),
) -> dict[str, list[list[str]]]:
    """Return the commands of every stage, each a tool and its arguments.

    Args:
        images: the folder of images.
        into: the folder of results.
        model: name or directory of the model.
        limit: only the first so many images; None for all.
        reuse: take the other codecs' results from where they are.
        others: further folders of images.
    """

    def at(name: str) -> str:
        return str(into / name)

    def both(name: str) -> list[str]:
        return ["--json", at(f"{name}.json"), "--markdown", at(f"{name}.md")]

    rd, fine = (at(f"kodak_{Path(model).name}{end}.json") for end in ("", "_fine"))
    published = str(BENCHMARKS / "published_kodak.json")
    chosen = [*([] if limit is None else ["--limit", str(limit)]), "--model", model]
    given = [str(images), *chosen]
    # The rates that plots show, so that those of all curves are seen.
    bpp = ["--bpp", "0", "1.6"]
    beside_jpeg = [rd, "--anchor", f"{rd}:jpeg420", *bpp]
    tuned = at(f"kodak_{Path(model).name}_msssim.json")
    by_ms_ssim = [*([tuned] if Path(tuned).exists() else []), *beside_jpeg, "--metric", "ms-ssim"]
    beside_published = [f"{rd}:cmamba", f"{rd}:jpeg420", published, "--anchor"]
    # The Kodak images may not be passed on: what is shown is another one.
    shown = ["--image", str(DEMO_IMAGE)]
    brief = ["--brief", "--jobs", str(core_count())]
    sweep = ["--qualities", "1:8:0.1", "--codecs", *brief]
    costs = at("complexity.json")

    def measure(folder: Path, path: str, *options: str) -> list[str]:
        earlier = ["--reuse", path] if reuse and Path(path).exists() else []
        return ["eval_rd.py", str(folder), *chosen, *options, *earlier, "-o", path]

    return {
        # One process with all cores, whose times are those of a user.
        "rd": [measure(images, rd)],
        "others": [
            measure(folder, at(f"{folder.resolve().name.lower()}_{Path(model).name}.json"), *brief)
            for folder in others
        ],
        "fine": [["eval_rd.py", *given, *sweep, "-o", fine]],
        "plots": [
            ["plot_rd.py", *beside_jpeg, "-o", at("kodak_psnr.png")],
            ["plot_rd.py", *by_ms_ssim, "-o", at("kodak_ms_ssim.png")],
            ["plot_rd.py", *beside_published, f"{published}:VTM-9.1", *bpp]
            + ["-o", at("kodak_published.png")],
        ],
        "complexity": [
            ["complexity.py", "--time", "--json", "-o", costs],
            ["complexity.py", "--read", costs, "--markdown", "-o", at("complexity.md")],
        ],
        "analyze": [["analyze.py", *given, *shown, "-o", at("analysis")]],
        "report": [
            ["report.py", rd, *shown, "--model", model, "--quality", "2", *bpp]
            + ["-o", at("report.html"), "--crops", at("crops.png")]
        ],
        "cpu": [["bench_cpu.py", *both("cpu")]],
        "training": [["bench_training.py", *both("training")]],
        "large": [["bench_cpu.py", "--only", "large", *both("cpu")]],
        "tables": [["readme_tables.py"]],
    }


def _end(process: subprocess.Popen) -> None:
    """Let a tool end its own processes and files, for the time that it takes to do so."""
    # A terminal has sent Ctrl-C to the tool as well, and a second one would disturb it.  SIGTERM
    # came to this process alone: SIGINT then lets the tool clean up.
    for stop in (None, signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if stop is not None:
            process.send_signal(stop)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TERMINATE_TIMEOUT_S)
            return


def run_stage(commands: Sequence[Sequence[str]]) -> str:
    """Run the commands of a stage; return why it failed, "" if it did not.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, also if only the tool was sent one; it has ended.
    """
    for tool, *arguments in commands:
        print(f"$ python tools/{shlex.join([tool, *arguments])}", flush=True)
        process = subprocess.Popen([sys.executable, str(TOOLS / tool), *arguments])
        try:
            status = process.wait()
        except KeyboardInterrupt:
            _end(process)
            raise
        if status in (INTERRUPTED, -signal.SIGINT):
            raise KeyboardInterrupt
        if status != 0:
            return f"{tool} ended with exit status {status}"
    return ""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("images", type=Path, metavar="KODAK", help="folder with the 24 Kodak images")
    add("--others", type=Path, nargs="+", default=[], metavar="DIR", help="more folders of images")
    add("--only", nargs="+", choices=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}")
    add("--weights", action="store_true", help="renew what new weights make false")
    add("--into", type=Path, metavar="DIR", help="put results here (default: benchmarks)")
    add("--model", default="tiny", help="other weights: name or directory; needs --into")
    add("--limit", type=int, metavar="N", help="only the first N images; needs --into")
    args = parser.parse_args(argv)
    results = ["kodak", *(folder.resolve().name.lower() for folder in args.others)]
    if len(set(results)) < len(results):
        parser.error("DIR must be folders of different names, none of them kodak")
    if args.weights and (args.only or args.into):
        parser.error("--weights must stand without --only and --into")
    for folder in (args.images, *args.others):
        if not folder.is_dir():
            parser.error(f"KODAK and DIR must be folders of images, got {str(folder)!r}")
    if args.into is None and (args.model != "tiny" or args.limit is not None):
        parser.error(
            "benchmarks holds results of all images and the bundled weights; "
            "with --model or --limit say --into another folder"
        )
    if args.into is not None and "tables" in (args.only or ()):
        parser.error("the stage tables fills the repository's pages from benchmarks: no --into")
    args.into = args.into or BENCHMARKS
    if "others" in (args.only or ()) and not args.others:
        parser.error("the stage others needs folders: --others DIR")
    args.only = args.only or [
        name for name in (WEIGHTS if args.weights else UNASKED) if name != "others" or args.others
    ]
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.into.mkdir(parents=True, exist_ok=True)
    chosen = args.model, args.limit, args.weights, args.others
    commands = commands_of(args.images, args.into, *chosen)
    names = [name for name in STAGES if name in args.only]
    failed: dict[str, str] = {}
    for k, name in enumerate(names):
        print(f"\n[{k + 1}/{len(names)}] {name}", flush=True)
        start = time.monotonic()
        try:
            if name in NEED_RD and "rd" in failed:
                failed[name] = "not run, as it needs rd"
            elif failure := run_stage(commands[name]):
                failed[name] = failure
        except KeyboardInterrupt:
            rest = "--weights" if args.weights else f"--only {' '.join(names[k:])}"
            if "others" in names[k:]:
                rest += f" --others {shlex.join(map(str, args.others))}"
            print(f"interrupted; for what is left say {rest}", file=sys.stderr)
            return INTERRUPTED
        print(f"{name}: {failed.get(name, 'done')}, after {time.monotonic() - start:.0f} s")
    for name, why in failed.items():
        print(f"{name} failed: {why}", file=sys.stderr)
    print(f"\n{len(names) - len(failed)} of {len(names)} stages are done, in {args.into}")
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    sys.exit(main())

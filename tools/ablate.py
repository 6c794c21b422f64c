"""Ablation study: train variants of the model alike, measure them alike, in one table.

    python tools/ablate.py photos kodak --out runs/ablation
    python tools/ablate.py photos kodak --out runs/ablation --only ca-ssm cnn --seeds 0 1 2
    python tools/ablate.py photos kodak --out runs/ablation --steps 20000 --device cuda

Trains on the first folder and measures on the second.  The variants:

{variants}
Each is trained by tools/train.py with the settings of --recipe (tools/recipes/ablation.toml); what
this command does not know is passed on to it, for instance --steps.  Then tools/eval_rd.py codes
the pictures of the second folder to real files.  Into `out` go, for each variant and seed, the run
in VARIANT-SEED and its output in VARIANT-SEED.txt; and

    rd.json           every picture at every quality
    ablation.json     BD-rates by PSNR and MS-SSIM against the first variant of the same seed,
                      parameters, MACs, minutes of training
    ablation.md       the same as a page

Short runs of small models show what helps early and at that size, and with one seed nothing about
chance; the page says how long and how many they were.  The same command again goes on where it
stopped, with more variants, seeds or --jobs as well.  The exit status is 1 if a training failed,
2 for wrong arguments, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean
from typing import Any

import bd_rate
import complexity
import eval_rd
import rd_curves
from markdown_table import markdown_table
from provenance import in_words, of_run, versions
from tqdm import tqdm

from cmamba_ref import CMamba, CMambaError
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.cli.batch import core_count
from cmamba_ref.model_id import WEIGHTS_FILE
from cmamba_ref.training.settings import Settings

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Variant:
    """A model to be compared.

    Attributes:
        text: what it is, in words.
        changes: sizes that differ from the recipe's, as `--model KEY=VALUE` takes them.
    """

    text: str
    changes: tuple[str, ...] = ()


# The first is what the others are compared with.
VARIANTS = {
    "ca-ssm": Variant("the model as it is"),
    "sum": Variant("CA-SSM that adds its paths, without attention", ('block="sum"',)),
    "concatenation": Variant("CA-SSM that concatenates its paths", ('block="concatenation"',)),
    "ssm": Variant("the SSM path alone", ('block="ssm"',)),
    "cnn": Variant("the CNN path alone", ('block="cnn"',)),
    "cae-without-ssm": Variant("CAE without its scan", ('context="cae-without-ssm"',)),
    "no-lrp": Variant("without latent residual prediction", ("lrp=false",)),
    "hyperprior": Variant(
        "mean-scale hyperprior (Minnen et al. 2018), GDN between the convolutions",
        ('block="gdn"', 'context="none"', "lrp=false", "slices=1"),
    ),
}
FULL = next(iter(VARIANTS))
# A curve of all rates in four points, the fewest that a BD-rate takes.
QUALITIES = (1.0, 3.0, 5.0, 7.0)
METRIC_NAMES = {"psnr": "PSNR", "ms-ssim": "MS-SSIM"}


@dataclass(frozen=True)
class Run:
    """One variant trained from one seed."""

    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.seed}"


# ---------------------------------------------------------------- training


def train(run: Run, args: argparse.Namespace, passed_on: Sequence[str]) -> bool:
    """Train a variant to its end, or go on with it; its output goes to a file."""
    changes = VARIANTS[run.variant].changes
    command = [
        *(sys.executable, str(HERE / "train.py"), str(args.recipe)),
        *("--data", str(args.photographs), "--out", str(args.out / run.name)),
        *("--seed", str(run.seed), *(("--model", *changes) if changes else ()), *passed_on),
    ]
    with open(args.out / f"{run.name}.txt", "a") as output:
        ended = subprocess.run(command, stdout=output, stderr=output, env=_environment(args.jobs))
    return ended.returncode == 0


def _environment(jobs: int) -> dict[str, str]:
    """Of several trainings at a time each has its share of the cores."""
    share = {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, core_count() // jobs))}
    return {**os.environ, **share}


def train_all(runs: Sequence[Run], args: argparse.Namespace, passed_on: Sequence[str]) -> list[Run]:
    """Train what is not yet trained; return what failed."""
    waiting = [run for run in runs if not (args.out / run.name / "model" / WEIGHTS_FILE).exists()]
    failed = []
    with (
        tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run", disable=None) as bar,
        ThreadPoolExecutor(args.jobs) as workers,
    ):
        outcomes = {run: workers.submit(train, run, args, passed_on) for run in waiting}
        try:
            for run, outcome in outcomes.items():
                bar.set_description_str(run.name)
                if not outcome.result():
                    failed.append(run)
                bar.update()
        except KeyboardInterrupt:
            # Ctrl-C reaches the trainings as well: they save, and no other begins.
            workers.shutdown(cancel_futures=True)
            raise
    return failed


# ---------------------------------------------------------------- results


def check_alike(runs: Sequence[Run], out: Path) -> None:
    """Refuse runs that differ in more than model and seed, for instance in an older recipe.

    Raises:
        CMambaError: some do.
    """
    fixed = [f.name for f in fields(Settings) if not f.metadata["may_change"]]
    fixed.remove("seed")
    settings = {run.name: _log(out / run.name)[0]["settings"] for run in runs}
    first, *others = settings
    for name in others:
        for key in fixed:
            if settings[name][key] != settings[first][key]:
                raise CMambaError(
                    f"runs must be trained alike, got {key} {settings[first][key]} in {first} and "
                    f"{settings[name][key]} in {name}; move one away, or take another --out"
                )


def results_of(runs: Sequence[Run], out: Path) -> list[dict[str, Any]]:
    """Return one row per variant, in the order of `VARIANTS`, with a value for each seed."""
    curves = {curve.name: curve for curve in rd_curves.load_curves(str(out / "rd.json"))}
    rows = []
    for name, variant in VARIANTS.items():
        mine = [run for run in runs if run.variant == name]
        if not mine:
            continue
        model = CMamba.from_pretrained(out / mine[0].name / "model")
        cost = complexity.count(model.config, 768, 512)["total"]
        logs = [_log(out / run.name) for run in mine]
        rows.append(
            {
                "variant": name,
                "text": variant.text,
                "changes": variant.changes,
                "seeds": [run.seed for run in mine],
                "bd_rate": {
                    metric: [_bd_rate(curves, run, metric) for run in mine]
                    for metric in METRIC_NAMES
                },
                "parameters": cost.params,
                "macs": cost.total(complexity.OURS),
                "steps": [log[-1]["step"] for log in logs],
                "minutes": [log[-1]["minutes"] for log in logs],
                "settings": logs[0][0]["settings"],
            }
        )
    return rows


def _bd_rate(curves: dict[str, rd_curves.Curve], run: Run, metric: str) -> float | None:
    """Return the BD-rate against the first variant of the same seed, in per cent, or None."""
    anchor = curves[Run(FULL, run.seed).name]
    try:
        found = bd_rate.bd_rate(anchor.points(metric), curves[run.name].points(metric))
    except rd_curves.CurveError as error:
        print(f"{run.name}, {metric}: no BD-rate, {error}", file=sys.stderr)
        return None
    return found.percent


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def page(rows: Sequence[dict[str, Any]], made: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    steps = sorted({step for row in rows for step in row["steps"]})
    seeds = sorted({seed for row in rows for seed in row["seeds"]})
    settings = rows[0]["settings"]
    phases = zip(settings["batch"], settings["crop"], strict=True)
    crops = ", then ".join(f"{batch} crops of {crop}x{crop} pixels" for batch, crop in phases)
    lines = [
        "# Ablation study",
        "",
        f"Each variant trained for {' or '.join(map(str, steps))} steps of {crops}, seed "
        f"{', '.join(map(str, seeds))}, all else equal; then measured on the {made['pictures']} "
        f"pictures of `{made['folder']}` in real files at qualities "
        f"{', '.join(f'{quality:g}' for quality in QUALITIES)}. {in_words(made)}",
        "",
        f"BD-rate is against `{FULL}` of the same seed: above zero, files are so much larger for "
        "the same quality. GMACs are at 768x512, 4.5 for each scan element. Such short runs show "
        "what helps early and at this size, and one seed says nothing about chance.",
        "",
        table(rows),
    ]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table, one row per variant."""
    heading = ("variant", "", *(f"BD-rate, {name}" for name in METRIC_NAMES.values()))
    return markdown_table((*heading, "parameters, M", "GMACs"), map(_cells, rows), figures=4)


def _cells(row: dict[str, Any]) -> list[str]:
    rates = [_percent(row["bd_rate"][metric]) for metric in METRIC_NAMES]
    costs = [f"{row['parameters'] / 1e6:.2f}", f"{row['macs'] / 1e9:.1f}"]
    return [f"`{row['variant']}`", row["text"], *rates, *costs]


def _percent(percents: Sequence[float | None]) -> str:
    """Format the mean over seeds, with the range of several."""
    found = [percent for percent in percents if percent is not None]
    if len(found) < len(percents):
        return "none"
    text = f"{mean(found):+.1f} %"
    if len(found) > 1:
        text += f" ({min(found):+.1f} to {max(found):+.1f})"
    return text


# ---------------------------------------------------------------- the command


def parse(
    argv: list[str] | None,
) -> tuple[argparse.ArgumentParser, argparse.Namespace, list[str]]:
    variants = "".join(f"    {name:<18}{variant.text}\n" for name, variant in VARIANTS.items())
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").format(variants=variants),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("photographs", type=Path, help="folder to train on")
    add("pictures", type=Path, help="folder to measure on")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for runs and results")
    add("--only", nargs="+", choices=VARIANTS, metavar="VARIANT", help="these, and the first")
    add("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default: 0")
    add("--recipe", type=Path, default=HERE / "recipes" / "ablation.toml", help="TOML file")
    add("--jobs", type=int, default=1, metavar="N", help="trainings at a time (default: 1)")
    add("--limit", type=int, metavar="N", help="only the first N pictures to measure on")
    args, passed_on = parser.parse_known_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    for folder in (args.photographs, args.pictures):
        if not folder.is_dir():
            parser.error(f"{str(folder)!r} must be a folder; see --help")
    args.out.mkdir(parents=True, exist_ok=True)
    return parser, args, passed_on


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser, args, passed_on = parse(argv)
    chosen = [name for name in VARIANTS if not args.only or name in (FULL, *args.only)]
    runs = [Run(name, seed) for seed in args.seeds for name in chosen]
    try:
        failed = train_all(runs, args, passed_on)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    if failed:
        for run in failed:
            print(f"{run.name} failed, see {args.out / run.name}.txt", file=sys.stderr)
        return 1

    try:
        check_alike(runs, args.out)
    except CMambaError as error:
        parser.error(str(error))
    models = [["--model", f"{run.name}={args.out / run.name / 'model'}"] for run in runs]
    limit = [] if args.limit is None else ["--limit", str(args.limit)]
    measured = eval_rd.main(
        [
            *(str(args.pictures), *(word for model in models for word in model)),
            *("--qualities", *map(str, QUALITIES), "--codecs", *limit),
            *("-o", str(args.out / "rd.json")),
        ]
    )
    if measured:
        return measured
    rows = results_of(runs, args.out)
    evaluated = json.loads((args.out / "rd.json").read_text())["meta"]["pictures"]
    made = {
        **of_run("ablate.py", argv),
        "versions": versions("cmamba-ref", "torch"),
        "pictures": len(evaluated["names"]),
        "folder": evaluated["folder"],
    }
    text = page(rows, made)
    content = json.dumps({"variants": rows, "meta": made}, indent=1) + "\n"
    write_atomically(args.out / "ablation.json", content.encode())
    write_atomically(args.out / "ablation.md", text.encode())
    print(f"\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Ablation study: train variants of the model alike, measure them alike, in one table.

    python tools/ablate.py photos kodak --out runs/ablation
    python tools/ablate.py photos kodak --out runs/ablation --only ca-ssm cnn --seeds 0 1 2
    python tools/ablate.py photos kodak --out runs/ablation --steps 20000 --device cuda

Trains on the first folder and measures on the second.  The variants:

{variants}
Each is trained by tools/train.py with the settings of --recipe (tools/recipes/ablation.toml); what
this command does not know is passed on to it, for instance --steps.  Then tools/eval_rd.py codes
the images of the second folder to real files.  Into `out` go, for each variant and seed, the run
in VARIANT-SEED and its output in VARIANT-SEED.txt; and

    rd.json           every image at every quality
    ablation.json     BD-rates by PSNR and MS-SSIM against the first variant of the same seed,
                      parameters, MACs, minutes of training
    ablation.md       the same as a page

Short runs of small models show what helps early and at that size, and with one seed nothing about
chance; the page says how long and how many they were.  The same command again goes on where it
stopped, with more variants or seeds as well.  The exit status is 1 if a training failed, 2 for
wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from cmamba_ref.model_id import WEIGHTS_FILE
from cmamba_ref.training.settings import Settings, conflicts

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


def train(variant: str, seed: int, args: argparse.Namespace, passed_on: Sequence[str]) -> Path:
    """Train a variant from a seed to its end, or go on with it; its output goes to a file.

    Returns:
        the folder of the run, named VARIANT-SEED.

    Raises:
        CMambaError: the training failed.
    """
    folder = args.out / f"{variant}-{seed}"
    if (folder / "model" / WEIGHTS_FILE).exists():
        return folder
    changes, text = VARIANTS[variant].changes, folder.with_suffix(".txt")
    command = [
        *(sys.executable, str(HERE / "train.py"), str(args.recipe)),
        *("--data", str(args.train_images), "--out", str(folder), "--seed", str(seed)),
        *(("--model", *changes) if changes else ()),
        *passed_on,
    ]
    with open(text, "a") as output:
        training = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            status = training.wait()
        finally:
            training.wait()  # Ctrl-C reaches the training as well: it saves before it ends
    if status:
        raise CMambaError(f"{folder.name} failed, see {text}")
    return folder


def check_alike(logs: Mapping[str, list[dict[str, Any]]]) -> None:
    """Refuse runs that differ in more than model and seed, for instance in an older recipe.

    Raises:
        CMambaError: some do.
    """
    first, *others = ((name, log[0]["settings"]) for name, log in logs.items())
    for name, settings in others:
        same_seed = Settings(**{**settings, "seed": first[1]["seed"]})
        if differing := conflicts(first[1], same_seed, extend=False):
            raise CMambaError(
                f"runs must be trained alike, from {first[0]} to {name} {'; '.join(differing)}; "
                "move one away, or take another --out"
            )


def results_of(
    variants: Sequence[str],
    seeds: Sequence[int],
    logs: Mapping[str, list[dict[str, Any]]],
    out: Path,
) -> list[dict[str, Any]]:
    """Return one row per variant, with a value for each seed.

    Args:
        logs: of each run, by its name.
        out: with `rd.json`, and the runs in folders.
    """
    curves = {curve.name: curve for curve in rd_curves.load_curves(str(out / "rd.json"))}
    rows = []
    for variant in variants:
        model = CMamba.from_pretrained(out / f"{variant}-{seeds[0]}" / "model")
        cost = complexity.count(model.config, 768, 512)["total"]
        mine = [logs[f"{variant}-{seed}"] for seed in seeds]
        rows.append(
            {
                "variant": variant,
                "text": VARIANTS[variant].text,
                "changes": VARIANTS[variant].changes,
                "seeds": list(seeds),
                "bd_rate": {
                    metric: [
                        bd_rate_of(curves[f"{FULL}-{seed}"], curves[f"{variant}-{seed}"], metric)
                        for seed in seeds
                    ]
                    for metric in METRIC_NAMES
                },
                "parameters": cost.params,
                "macs": cost.total(complexity.OURS),
                "steps": [log[-1]["step"] for log in mine],
                "minutes": [log[-1]["minutes"] for log in mine],
                "settings": mine[0][0]["settings"],
            }
        )
    return rows


def bd_rate_of(anchor: rd_curves.Curve, curve: rd_curves.Curve, metric: str) -> float | None:
    """Return the BD-rate in per cent, or None where there is none, and print why."""
    try:
        return bd_rate.bd_rate(anchor.points(metric), curve.points(metric)).percent
    except rd_curves.CurveError as error:
        print(f"{curve.name}, {metric}: no BD-rate, {error}", file=sys.stderr)
        return None


def page(rows: Sequence[dict[str, Any]], made: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    steps = sorted({step for row in rows for step in row["steps"]})
    settings = rows[0]["settings"]
    phases = zip(settings["batch"], settings["crop"], strict=True)
    crops = ", then ".join(f"{batch} crops of {crop}x{crop} pixels" for batch, crop in phases)
    rates = [f"BD-rate, {name}" for name in METRIC_NAMES.values()]
    heading = ("variant", "", *rates, "parameters, M", "GMACs")
    return f"""\
# Ablation study

Each variant trained for {" or ".join(map(str, steps))} steps of {crops}, seed \
{", ".join(map(str, rows[0]["seeds"]))}, all else equal; then measured on the {made["images"]} \
images of `{made["folder"]}` in real files at qualities \
{", ".join(f"{quality:g}" for quality in QUALITIES)}. {in_words(made)}

BD-rate is against `{FULL}` of the same seed: above zero, files are so much larger for the same \
quality. GMACs are at 768x512, 4.5 for each scan element. Such short runs show what helps early \
and at this size, and one seed says nothing about chance.

{markdown_table(heading, map(_cells, rows), figures=4)}
"""


def _cells(row: dict[str, Any]) -> list[str]:
    rates = [in_percent(row["bd_rate"][metric]) for metric in METRIC_NAMES]
    costs = [f"{row['parameters'] / 1e6:.2f}", f"{row['macs'] / 1e9:.1f}"]
    return [f"`{row['variant']}`", row["text"], *rates, *costs]


def in_percent(rates: Sequence[float | None]) -> str:
    """Format the mean over seeds, with the range of several."""
    found = [rate for rate in rates if rate is not None]
    if len(found) < len(rates):
        return "none"
    ends = f" ({min(found):+.1f} to {max(found):+.1f})" if len(found) > 1 else ""
    return f"{mean(found):+.1f} %{ends}"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    variants = "".join(f"    {name:<18}{variant.text}\n" for name, variant in VARIANTS.items())
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").format(variants=variants),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("train_images", type=Path, help="folder to train on")
    add("images", type=Path, help="folder to measure on")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for runs and results")
    add("--only", nargs="+", choices=VARIANTS, metavar="VARIANT", help="these, and the first")
    add("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default: 0")
    add("--recipe", type=Path, default=HERE / "recipes" / "ablation.toml", help="TOML file")
    args, passed_on = parser.parse_known_args(argv)
    for folder in (args.train_images, args.images):
        if not folder.is_dir():
            parser.error(f"{str(folder)!r} must be a folder; see --help")
    args.out.mkdir(parents=True, exist_ok=True)

    chosen = [name for name in VARIANTS if not args.only or name in (FULL, *args.only)]
    runs = [(name, seed) for seed in args.seeds for name in chosen]
    try:
        trained = [train(*run, args, passed_on) for run in tqdm(runs, unit="run", disable=None)]
        logs = {
            folder.name: [
                json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()
            ]
            for folder in trained
        }
        check_alike(logs)
    except CMambaError as error:
        print(error, file=sys.stderr)
        return 1
    models = [word for folder in trained for word in ("--model", f"{folder.name}={folder}/model")]
    rd = args.out / "rd.json"
    qualities = ["--qualities", *map(str, QUALITIES), "--codecs"]
    if status := eval_rd.main([str(args.images), *models, *qualities, "-o", str(rd)]):
        return status
    rows = results_of(chosen, args.seeds, logs, args.out)
    evaluated = json.loads(rd.read_text())["meta"]["images"]
    made = {
        **of_run("ablate.py", argv),
        "versions": versions("cmamba-ref", "torch"),
        "images": len(evaluated["names"]),
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

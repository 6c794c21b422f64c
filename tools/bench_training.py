"""Benchmark training throughput with each scan backend, and where the time goes.

    python tools/bench_training.py --json training.json --markdown training.md
    python tools/bench_training.py photos --config small --backends chunked triton --device cuda

For each backend and size of crops, tools/train.py does a few steps in a process of its own: one of
the first is profiled, in the last ones images per second and the share of data, forward, backward
and optimiser are taken.  The profiler gives each part's share of the time in operators, forward
and backward: `entropy model` is h_s, CAE, LRP and the likelihoods with their scans, `scan` and
`convolution` are those of the transforms.  `--cuda-graph` trains once more with a CUDA graph;
that run is not profiled.  Without a folder of images, the bundled one
is used, continued by mirroring.  The exit status is 1 if a training failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_cpu import demo_image
from complexity import image_size
from markdown_table import markdown_table
from provenance import in_words, of_run, versions
from tqdm import tqdm

from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.codec.output import write_png
from cmamba_ref.ops.dispatch import BACKENDS

HERE = Path(__file__).resolve().parent
# The profiler's records of scans step by step fill gigabytes, and take minutes to count.
PROFILED = 1
# Of each record: enough for the first to take in the profiler's warm-up and the profile.
MEASURED = 6
WITH_GRAPH = "images_per_second_with_graph"
# (side of the crops, crops per step), as tiny was trained.
SMALL, LARGE = (128, 8), (512, 2)


def default_sizes(backend: str) -> list[tuple[int, int]]:
    """`reference` is for small crops: with large ones it took too long to wait for."""
    return [SMALL] if backend == "reference" else [SMALL, LARGE]


def measure(
    backend: str, crop: int, batch: int, images: Path, args: argparse.Namespace
) -> dict[str, Any] | None:
    """Return one row of the result; None where the training failed, with its stderr shown."""
    row: dict[str, Any] = {"backend": backend, "crop": crop, "batch": batch, "steps": MEASURED}
    log = train(row, images, args, "--profile", str(PROFILED))
    if log is None:
        return None
    (profile,) = (record for record in log if record.get("event") == "profile")
    row |= {name: _last(log)[name] for name in ("images_per_second", "share")}
    row["share_of_operators"] = profile["share_of_operators"]
    if args.cuda_graph:
        last = _last(train(row, images, args, "--cuda-graph") or [{}])
        row[WITH_GRAPH] = last["images_per_second"] if last.get("cuda_graph") else None
    return row


def train(
    row: dict[str, Any], images: Path, args: argparse.Namespace, *more: str
) -> list[dict[str, Any]] | None:
    """Train a few steps as the row says, and return the log; None where that failed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, str(HERE / "train.py"), "--data", str(images)),
            *("--out", folder, "--config", args.config, "--device", args.device),
            *("--crop", str(row["crop"]), "--batch", str(row["batch"])),
            # A record after the profile, and one of steps without it.
            *("--steps", str(2 * MEASURED), "--log-every", str(MEASURED)),
            *("--validation", "1", "--validation-crop", "64", "--validate-every", "0"),
            *("--coded", "never", "--samples", "0", "--precision", args.precision, *more),
        ]
        environment = {**os.environ, "CMAMBA_SCAN_BACKEND": row["backend"]}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ended.returncode:
            what = f"{row['backend']}, {row['batch']} crops of {row['crop']}"
            print(f"{what}:\n{ended.stderr}", file=sys.stderr)
            return None
        lines = (Path(folder) / "log.jsonl").read_text().splitlines()
        log = [json.loads(line) for line in lines]
        if "--cuda-graph" in more and not _last(log).get("cuda_graph"):
            print(f"without a CUDA graph:\n{ended.stderr}", file=sys.stderr)
        return log


def _last(log: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of the last steps."""
    return [record for record in log if "event" not in record][-1]


def write_images(folder: Path, crop: int) -> None:
    """Write the bundled image, mirrored, as one image to train on and one to hold out."""
    for name, side in (("a.png", 2 * crop), ("b.png", 3 * crop)):
        write_png(folder / name, demo_image(side, side))


def page(rows: list[dict[str, Any]], made: dict[str, Any]) -> str:
    """Return the rows as a Markdown table."""
    speeds = {"images_per_second": "images/s", WITH_GRAPH: "with a CUDA graph"}
    speeds = {name: heading for name, heading in speeds.items() if name in rows[0]}
    cells = []
    for row in rows:
        shares = row["share"] | row["share_of_operators"]
        crops = f"{row['batch']} of {row['crop']}x{row['crop']}"
        measured = ["-" if row[name] is None else f"{row[name]:.2f}" for name in speeds]
        measured += [f"{share:.0%}" for share in shares.values()]
        cells.append([f"`{row['backend']}`", crops, *measured])
    shares = (*rows[0]["share"], *rows[0]["share_of_operators"])
    heading = ("backend", "crops", *speeds.values(), *shares)
    return (
        f"# Training throughput\n\n`{made['config']}`, {made['precision']}, "
        f"{made.get('gpu', 'CPU')}, over {MEASURED} steps; shares of the time, then of the "
        f"time of operators. {in_words(made)}\n\n"
        f"{markdown_table(heading, cells, figures=len(heading) - 2)}\n"
    )


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    cuda = torch.cuda.is_available()
    usual = ["chunked", "triton" if cuda else "reference"]
    sizes = "default: 128x8, and but for `reference` 512x2"
    add("images", type=Path, nargs="?", help="folder to train on")
    add("--config", default="tiny", help="which model (default: tiny)")
    add(
        "--backends", nargs="+", choices=BACKENDS, default=usual, help=f"default: {' '.join(usual)}"
    )
    add("--sizes", nargs="+", type=image_size, metavar="CROPxBATCH", help=sizes)
    add("--device", default="cuda" if cuda else "cpu", help="default: cuda where there is one")
    add("--precision", default="fp32", help="fp32 or bf16 (default: fp32)")
    add("--cuda-graph", action="store_true", help="measure with a CUDA graph as well")
    add("--json", type=Path, metavar="FILE", help="write the figures here")
    add("--markdown", type=Path, metavar="FILE", help="write the page here")
    args = parser.parse_args(argv)
    if args.images and not args.images.is_dir():
        parser.error(f"{str(args.images)!r} must be a folder of images")
    jobs = [
        (backend, crop, batch)
        for backend in args.backends
        for crop, batch in args.sizes or default_sizes(backend)
    ]
    made = {
        **of_run("bench_training.py", argv),
        "versions": versions("cmamba-ref", "torch", "triton"),
        **{name: getattr(args, name) for name in ("config", "device", "precision")},
    }
    if args.device == "cuda":
        made["gpu"] = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as ours:
        folder = args.images or Path(ours)
        if not args.images:
            write_images(folder, max(crop for _, crop, _ in jobs))
        measured = []
        for job in tqdm(jobs, unit="training", disable=None):
            row = measure(*job, folder, args)
            if row is not None:
                measured.append(row)
            if measured and args.json:  # after each: a run that is cut off keeps its rows
                content = json.dumps({"rows": measured, "meta": made}, indent=1) + "\n"
                write_atomically(args.json, content.encode())
    if not measured:
        return 1
    text = page(measured, made)
    print(text)
    if args.markdown:
        write_atomically(args.markdown, text.encode())
    return 0 if len(measured) == len(jobs) else 1


if __name__ == "__main__":
    sys.exit(main())

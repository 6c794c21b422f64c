"""Count parameters and multiply-accumulates of a model, per module, under each MAC convention.

    python tools/complexity.py                    base, small and tiny at 768x512
    python tools/complexity.py base --size 1920x1080 --json
    python tools/complexity.py --time --json -o complexity.json
    python tools/complexity.py --read complexity.json -o complexity.md

Counted on the meta device: nothing is computed and no memory is needed.  The conventions differ in
what one scan of L positions, D inner channels, N states and four directions is said to cost; papers
use all three, so every figure must name its own:

    no scan      the scan is left out; convolutions and linear layers only
    4.5          4.5 MACs per (position, channel, state, direction): 18 L D N; ours
    VMamba's     VMamba's FLOP formula, 9 per (...), added to MACs as it stands: 36 L D N

--time also encodes and decodes an image of that size on this machine's CPU, each model and each
direction in a new process, whose peak memory is counted with torch and the weights.  A model
without trained weights is given random ones: its networks take as long, its files are larger.  The
time is the median of three runs after the first, the memory that of the first; `base` takes
minutes and several GiB.  The output is Markdown, with our models beside what others publish, or
JSON.  --read takes everything from the JSON of an earlier run and measures nothing.  The exit
status is 1 if an image could not be coded.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import bench_cpu
import torch
from markdown_table import markdown_table
from profile_scan import output
from provenance import of_run, versions
from published_costs import PUBLISHED_CODECS
from torch.utils.flop_counter import FlopCounterMode

from cmamba_ref import CMamba, CMambaError
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.bundled import pretrained_names
from cmamba_ref.config import CONFIGS, CMambaConfig
from cmamba_ref.nn.bypass import BLOCK
from cmamba_ref.nn.ss2d import DIRECTIONS

CONVENTIONS = {"no scan": 0, "4.5": 18, "VMamba's": 36}
OURS = "4.5"
# The paper's totals, derived in docs/model.md from what it states against MLIC++.
PUBLISHED = {"params": 56.26e6, "macs": 362.7e9, "convention": OURS, "size": (768, 512)}


@dataclass(frozen=True)
class Cost:
    """The cost of one module.

    Attributes:
        params: trainable numbers.
        macs: multiply-accumulates of convolutions, linear layers and matrix products, the step-size
            projection inside the scan included.
        scan: L D N summed over all scans, to be multiplied by a convention's factor.
    """

    params: int
    macs: int
    scan: int

    def total(self, convention: str) -> int:
        """Return the MACs under a convention."""
        return self.macs + CONVENTIONS[convention] * self.scan


def _dt_flops(x_shape, proj_shape, a_shape, dt_weight_shape, *args, **kwargs) -> int:
    batch, height, width, channels = x_shape
    return 2 * batch * height * width * DIRECTIONS * channels * dt_weight_shape[2]


def _scan_elements(x_shape, proj_shape, a_shape, *args, **kwargs) -> int:
    batch, height, width, channels = x_shape
    return batch * height * width * channels * a_shape[2]


def count(config: CMambaConfig | str, width: int, height: int) -> dict[str, Cost]:
    """Return the cost of each module of a configuration for one image; `total` for all of it.

    Encoder and decoder are both counted: g_a, g_s, h_a, h_s and the context model once each, as
    `forward` runs them and as the field counts.
    """
    with torch.device("meta"):
        model = CMamba(config).eval()
        x = torch.empty(1, 3, height, width)
    scan = torch.ops.cmamba.chunked_scan_2d

    def counts(scan_formula: Callable[..., int]) -> dict[str, dict[Any, int]]:
        """Return what each module and operator costs."""
        custom = {scan: scan_formula}
        with FlopCounterMode(display=False, custom_mapping=custom) as counter, torch.no_grad():
            model(x, 1.0 if model.gain is not None else None)
        return counter.get_flop_counts()

    flops, elements = counts(_dt_flops), counts(_scan_elements)
    costs = {}
    for name, module in [("total", model), *model.named_children()]:
        key = "Global" if name == "total" else f"CMamba.{name}"
        costs[name] = Cost(
            params=sum(p.numel() for p in module.parameters()),
            # A module that computes nothing of the kind has no entry.
            macs=sum(flops.get(key, {}).values()) // 2,
            scan=elements.get(key, {}).get(scan, 0),
        )
    if "bypass" in costs:
        # The counter names no other method than `forward`. Each weight meets each position of y.
        bypass = costs["bypass"]
        costs["bypass"] = replace(bypass, macs=bypass.params * width * height // BLOCK**2)
    return costs


def measure(names: list[str], width: int, height: int) -> dict[str, dict[str, Any]]:
    """Measure encoding and decoding by each model on this machine, with a progress bar.

    Returns:
        by model and direction: `status`, "ok" or why there are no figures; `seconds`, a median;
        `peak_mib` of the process, None where the system does not count; `has_trained_weights`.
    """
    runs: dict[str, dict[str, Any]] = {name: {} for name in names}
    settings = replace(bench_cpu.SETTINGS, repeats=3)
    for run in bench_cpu.measure_codec([(width, height)], names, settings)["runs"]:
        runs[run["model"]][run["direction"]] = {
            "status": run["status"],
            "seconds": run.get("median_s"),
            "peak_mib": run.get("peak_mib"),
            "has_trained_weights": run["model"] in pretrained_names(),
        }
    return runs


# ---------------------------------------------------------------- output


def to_markdown(content: dict[str, Any]) -> str:
    """Return tables of what the JSON holds: our models, their modules, and what others publish."""
    width, height = content["size"]
    made = content["meta"]
    models = {
        name: {module: Cost(**cost) for module, cost in costs.items()}
        for name, costs in content["models"].items()
    }
    columns = ("parameters, M", *(f"GMACs, {convention}" for convention in CONVENTIONS))
    totals = [
        (*(f"`{name}`", *_cells(total)), f"{total.total(OURS) / (width * height) / 1e3:.0f}")
        for name, total in ((name, costs["total"]) for name, costs in models.items())
    ]
    parts = [
        "# Complexity",
        f"At {width}x{height}, encoder and decoder together; `{made['command']}`, "
        f"commit {made['commit']}, {made['date']}. MACs without the scans, with 4.5 for each "
        "scan element (position, channel, state and direction), and by VMamba's count, 9.",
        markdown_table(("model", *columns, f"kMACs per pixel, {OURS}"), totals, figures=5),
    ]
    if content["runs"]:
        measures = [f"{d}, {unit}" for d in bench_cpu.DIRECTIONS for unit in ("s", "peak MiB")]
        rows = [_run_cells(name, runs) for name, runs in content["runs"].items()]
        parts += [
            "## Time and memory",
            f"On {made['machine']}, {made['threads']} threads, torch "
            f"{made['versions']['torch']}; memory is the peak of a new process.",
            markdown_table(("model", "weights", *measures), rows, figures=4),
        ]
    parts.append("## Modules")
    for name, costs in models.items():
        whole = costs.pop("total")
        rows = [
            (
                module,
                *_cells(cost),
                f"{cost.params / whole.params:.1%}",
                f"{cost.total(OURS) / whole.total(OURS):.1%}",
            )
            for module, cost in costs.items()
        ]
        shares = ("share of parameters", f"share of GMACs, {OURS}")
        parts.append(markdown_table((f"`{name}`", *columns, *shares), rows, figures=6))
    parts += [
        "## Published",
        "As stated by each source, otherwise marked: counted is from released code, at "
        "768x512. GPUs, sizes and conventions differ or are not stated, so times cannot be "
        "compared with each other or with ours.",
        markdown_table(
            ("codec", "parameters, M", "MACs", "time on a GPU", "source"),
            ((c.name, c.params, c.macs, c.times, c.source) for c in PUBLISHED_CODECS),
            figures=0,
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _cells(cost: Cost) -> list[str]:
    return [f"{cost.params / 1e6:.3f}", *(f"{cost.total(c) / 1e9:.2f}" for c in CONVENTIONS)]


def _run_cells(name: str, runs: dict[str, dict[str, Any]]) -> list[str]:
    trained = all(run["has_trained_weights"] for run in runs.values())
    cells = [f"`{name}`", "trained" if trained else "random"]
    for run in (runs[direction] for direction in bench_cpu.DIRECTIONS):
        cells.append(run["status"] if run["seconds"] is None else f"{run['seconds']:.2f}")
        cells.append("" if run["peak_mib"] is None else f"{run['peak_mib']:,.0f}")
    return cells


# ---------------------------------------------------------------- the command


def image_size(text: str) -> tuple[int, int]:
    """Read a size written as WIDTHxHEIGHT, for argparse."""
    if not (found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT, got {text!r}")
    return int(found[1]), int(found[2])


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("models", nargs="*", metavar="model", help="default: base small tiny")
    add("--size", type=image_size, default=(768, 512), help="WIDTHxHEIGHT (default: 768x512)")
    add("--time", action="store_true", help="also measure time and memory here")
    add("--read", type=Path, metavar="FILE", help="show what an earlier run wrote with --json")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="JSON instead of tables")
    form.add_argument("--markdown", action="store_true", help="tables in Markdown (default)")
    add("-o", "--output", type=output, metavar="FILE", help="write it here (default: print it)")
    args = parser.parse_args(argv)
    if args.read and (args.models or args.time):
        parser.error("--read shows what is in the file; leave out models and --time")
    names = args.models or list(CONFIGS)
    if args.read:
        content = json.loads(args.read.read_text())
    else:
        try:
            costs = {name: count(name, *args.size) for name in names}
        except CMambaError as error:
            parser.error(str(error))
        content = {
            "size": args.size,
            "scan_factor": CONVENTIONS,
            "models": {
                name: {module: asdict(cost) for module, cost in modules.items()}
                for name, modules in costs.items()
            },
            "runs": measure(names, *args.size) if args.time else {},
            "published": [asdict(codec) for codec in PUBLISHED_CODECS],
            "meta": {**of_run("complexity.py", argv), "versions": versions("cmamba-ref", "torch")},
        }
    text = json.dumps(content, indent=2) + "\n" if args.json else to_markdown(content)
    if args.output:
        write_atomically(args.output, text.encode())
    else:
        print(text, end="")
    runs = [run for of_model in content["runs"].values() for run in of_model.values()]
    return int(any(run["seconds"] is None for run in runs))


if __name__ == "__main__":
    sys.exit(main())

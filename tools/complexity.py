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
time is the median of up to three runs after the first, the memory that of the first; `base` takes
minutes and several GiB.  The output is Markdown, with our models beside what others publish, or
JSON.  --read takes everything from the JSON of an earlier run and measures nothing.  The exit
status is 1 if an image could not be coded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench_cpu
import torch
from bench_cpu import DIRECTIONS as CODING
from bench_cpu import image_size
from markdown_table import markdown_table
from profile_scan import Settings, output
from provenance import of_run, versions
from published_costs import PUBLISHED_CODECS
from torch.utils.flop_counter import FlopCounterMode

from cmamba_ref import CMamba, CMambaError
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.config import CONFIGS, CMambaConfig
from cmamba_ref.nn.ss2d import DIRECTIONS
from cmamba_ref.weights import pretrained_names

CONVENTIONS = {"no scan": 0, "4.5": 18, "VMamba's": 36}
OURS = "4.5"
# The paper's totals, derived in the README from what it states against MLIC++.
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
    quality = 1.0 if model.gain is not None else None
    op = torch.ops.cmamba.chunked_scan_2d
    with FlopCounterMode(display=False, custom_mapping={op: _dt_flops}) as linear, torch.no_grad():
        model(x, quality)
    only_scan = {op: _scan_elements}
    with FlopCounterMode(display=False, custom_mapping=only_scan) as scans, torch.no_grad():
        model(x, quality)

    costs = {}
    for child, module in [("total", model), *model.named_children()]:
        key = "Global" if child == "total" else f"CMamba.{child}"
        # A module that computes nothing of the kind has no entry.
        elements = scans.get_flop_counts().get(key, {}).get(op, 0)
        costs[child] = Cost(
            params=sum(p.numel() for p in module.parameters()),
            macs=sum(linear.get_flop_counts().get(key, {}).values()) // 2,
            scan=elements,
        )
    return costs


# ---------------------------------------------------------------- time and memory


@dataclass(frozen=True)
class Run:
    """An image encoded or decoded by a model; see tools/bench_cpu.py.

    Attributes:
        status: "ok", or why there are no figures.
        seconds: median.
        peak_mib: of the process, with torch and the weights; None where the system does not count.
        has_trained_weights: otherwise they are random.
    """

    status: str
    seconds: float | None
    peak_mib: float | None
    has_trained_weights: bool


def measure(names: list[str], width: int, height: int) -> dict[str, dict[str, Run]]:
    """Measure encoding and decoding by each model on this machine, with a progress bar."""
    settings = Settings(torch.device("cpu"), "fp32", bench_cpu.MODES, repeats=3, seconds=5)
    coded = bench_cpu.measure_codec(((width, height),), tuple(names), settings)
    runs: dict[str, dict[str, Run]] = {name: {} for name in names}
    for run in coded["runs"]:
        runs[run["model"]][run["direction"]] = Run(
            run["status"],
            run.get("median_s"),
            run.get("peak_mib"),
            run["model"] in pretrained_names(),
        )
    return runs


# ---------------------------------------------------------------- output


@dataclass(frozen=True)
class Findings:
    """All that there is to show.

    Attributes:
        size: width and height.
        costs: by model and module.
        runs: by model and direction; empty if nothing was measured.
        made: by what command, on what machine, with which versions.
    """

    size: tuple[int, int]
    costs: dict[str, dict[str, Cost]]
    runs: dict[str, dict[str, Run]]
    made: dict[str, Any]

    def to_json(self) -> str:
        content = {
            "size": self.size,
            "scan_factor": CONVENTIONS,
            "models": _each(asdict, self.costs),
            "runs": _each(asdict, self.runs),
            "published": [asdict(codec) for codec in PUBLISHED_CODECS],
            "meta": self.made,
        }
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> Findings:
        """Read a file that `to_json` made.

        Raises:
            CMambaError: the file cannot be read, or is another.
        """
        try:
            content = json.loads(path.read_text())
            width, height = content["size"]
            costs = _each(lambda values: Cost(**values), content["models"])
            runs = _each(lambda values: Run(**values), content["runs"])
            return cls((width, height), costs, runs, content["meta"])
        except OSError as error:
            raise CMambaError(f"{path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CMambaError(
                f"{path} must be what complexity.py --json wrote, got another file ({error!r}); "
                "write it again"
            ) from error

    def to_markdown(self) -> str:
        """Return tables: our models, the share of each module, and what others publish."""
        made, pixels = self.made, self.size[0] * self.size[1]
        totals = [
            (
                f"`{name}`",
                *_cells(costs["total"]),
                f"{costs['total'].total(OURS) / pixels / 1e3:.0f}",
            )
            for name, costs in self.costs.items()
        ]
        columns = ("parameters, M", *(f"GMACs, {c}" for c in CONVENTIONS))
        parts = [
            "# Complexity",
            f"At {self.size[0]}x{self.size[1]}, encoder and decoder together; `{made['command']}`, "
            f"commit {made['commit']}, {made['date']}. MACs without the scans, with 4.5 for each "
            "scan element (position, channel, state and direction), and by VMamba's count, 9.",
            markdown_table(("model", *columns, f"kMACs per pixel, {OURS}"), totals, figures=5),
        ]
        if self.runs:
            heading = (
                "model",
                "weights",
                *(f"{d}, {of}" for d in CODING for of in ("s", "peak MiB")),
            )
            parts += [
                "## Time and memory",
                f"On {made['machine']}, {made['threads']} threads, torch "
                f"{made['versions']['torch']}; memory is the peak of a new process.",
                markdown_table(heading, map(_run_cells, self.runs.items()), figures=4),
            ]
        parts.append("## Modules")
        for name, costs in self.costs.items():
            whole = costs["total"]
            rows = [
                (
                    module,
                    *_cells(cost),
                    f"{cost.params / whole.params:.1%}",
                    f"{cost.total(OURS) / whole.total(OURS):.1%}",
                )
                for module, cost in costs.items()
                if module != "total"
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


def _each(change: Callable[[Any], Any], table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a table of tables with every entry changed."""
    return {name: {key: change(x) for key, x in row.items()} for name, row in table.items()}


def _cells(cost: Cost) -> list[str]:
    return [f"{cost.params / 1e6:.3f}", *(f"{cost.total(c) / 1e9:.2f}" for c in CONVENTIONS)]


def _run_cells(of_model: tuple[str, dict[str, Run]]) -> list[str]:
    name, runs = of_model
    trained = all(run.has_trained_weights for run in runs.values())
    cells = [f"`{name}`", "trained" if trained else "random"]
    for run in (runs[direction] for direction in CODING):
        cells.append(run.status if run.seconds is None else f"{run.seconds:.2f}")
        cells.append("" if run.peak_mib is None else f"{run.peak_mib:,.0f}")
    return cells


# ---------------------------------------------------------------- the command


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
    try:
        if args.read:
            found = Findings.from_json(args.read)
        else:
            costs = {name: count(name, *args.size) for name in names}
            runs = measure(names, *args.size) if args.time else {}
            made = {**of_run("complexity.py", argv), "versions": versions("cmamba-ref", "torch")}
            found = Findings(args.size, costs, runs, made)
    except CMambaError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        # Times are compared with each other, so they come from one run; it takes minutes.
        print("interrupted; nothing is written", file=sys.stderr)
        return 130
    text = found.to_json() if args.json else found.to_markdown()
    if args.output:
        write_atomically(args.output, text.encode())
    else:
        print(text, end="")
    runs = [run for of_model in found.runs.values() for run in of_model.values()]
    return int(any(run.seconds is None for run in runs))


if __name__ == "__main__":
    sys.exit(main())

"""Parameters and multiply-accumulates of a model, per module, under each MAC convention.

    python tools/complexity.py                    base, small and tiny at 768x512
    python tools/complexity.py base --size 1920x1080 --json
    python tools/complexity.py --time --markdown -o complexity.md
    python tools/complexity.py --time --json -o complexity.json
    python tools/complexity.py --read complexity.json --markdown -o complexity.md

Counted on the meta device: nothing is computed and no memory is needed.  The conventions differ in
what one scan of L positions, D inner channels, N states and four directions is said to cost; papers
use all three, so every figure must name its own:

    no scan      the scan is left out; convolutions and linear layers only
    4.5          4.5 MACs per (position, channel, state, direction): 18 L D N; ours
    VMamba's     VMamba's FLOP formula, 9 per (...), added to MACs as it stands: 36 L D N

--time also encodes and decodes a photograph of that size on this machine's CPU, each model and each
direction in a new process, whose peak memory is counted with torch and the weights.  A model
without trained weights is given random ones: its networks take as long, its files are larger.  The
time is the median of up to three runs after the first, the memory that of the first; `base` takes
minutes and several GiB.  --markdown is a page with our models beside what others publish.  --read
takes everything from the JSON of an earlier run and measures nothing.  The exit status is 1 if a
picture could not be coded.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench_cpu
import torch
from bench_cpu import DIRECTIONS as CODING
from markdown_table import markdown_table
from profile_scan import Settings
from provenance import of_run, versions
from published_costs import PUBLISHED_CODECS
from torch.utils.flop_counter import FlopCounterMode

from cmamba_ref import CMamba, CMambaError
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.config import CONFIGS, CMambaConfig
from cmamba_ref.errors import InvalidArgumentError
from cmamba_ref.nn.ss2d import DIRECTIONS
from cmamba_ref.weights import pretrained_names

CONVENTIONS = {"no scan": 0, "4.5": 18, "VMamba's": 36}
OURS = "4.5"
# The paper's totals, derived in the README from what it states against MLIC++.
PUBLISHED = {"params": 56.26e6, "macs": 362.7e9, "convention": OURS, "size": (768, 512)}


@dataclass(frozen=True)
class Cost:
    """What one module costs.

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
        """MACs under a convention."""
        return self.macs + CONVENTIONS[convention] * self.scan


def _dt_flops(x_shape, proj_shape, a_shape, dt_weight_shape, *args, **kwargs) -> int:
    batch, height, width, channels = x_shape
    return 2 * batch * height * width * DIRECTIONS * channels * dt_weight_shape[2]


def _scan_elements(x_shape, proj_shape, a_shape, *args, **kwargs) -> int:
    batch, height, width, channels = x_shape
    return batch * height * width * channels * a_shape[2]


def count(config: CMambaConfig | str, width: int, height: int) -> dict[str, Cost]:
    """Cost of each module of a configuration for one picture; key `total` for all of it.

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


def table(name: str, costs: dict[str, Cost], width: int, height: int) -> str:
    """The costs as text."""
    lines = [
        f"{name}, {width}x{height}: parameters in M, GMACs by convention",
        f"{'module':<22}{'params':>9}" + "".join(f"{c:>12}" for c in CONVENTIONS),
    ]
    for module, cost in costs.items():
        if module == "total":
            continue
        lines.append(_row(module, cost))
    lines.append(_row("total", costs["total"]))
    per_pixel = [costs["total"].total(c) / (width * height) / 1e3 for c in CONVENTIONS]
    lines.append(f"{'kMACs per pixel':<31}" + "".join(f"{value:>12.1f}" for value in per_pixel))
    return "\n".join(lines)


def _row(module: str, cost: Cost) -> str:
    macs = "".join(f"{cost.total(c) / 1e9:>12.2f}" for c in CONVENTIONS)
    return f"{module:<22}{cost.params / 1e6:>9.3f}{macs}"


# ---------------------------------------------------------------- time and memory


@dataclass(frozen=True)
class Run:
    """A picture encoded or decoded by a model; see tools/bench_cpu.py.

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
    """Encoding and decoding by each model on this machine, with a progress bar."""
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


def run_lines(name: str, runs: dict[str, Run]) -> str:
    """What was measured of a model, as text."""
    trained = all(run.has_trained_weights for run in runs.values())
    lines = [f"{name} on this machine, {'trained' if trained else 'random'} weights"]
    for direction in CODING:
        run = runs[direction]
        peak = "not counted" if run.peak_mib is None else f"{run.peak_mib:,.0f} MiB"
        text = run.status if run.seconds is None else f"{run.seconds:.2f} s, peak of memory {peak}"
        lines.append(f"  {direction:<20}{text}")
    return "\n".join(lines)


# ---------------------------------------------------------------- Markdown


def markdown(
    results: dict[str, dict[str, Cost]],
    runs: dict[str, dict[str, Run]],
    width: int,
    height: int,
    made: dict[str, Any],
) -> str:
    """A page: our models, the share of each module, and what others publish.

    Args:
        runs: empty if nothing was measured.
        made: by what command, on what machine, with which versions.
    """
    parts = [
        "# What the codec costs",
        f"At {width}x{height}, encoder and decoder together; `{made['command']}`, commit "
        f"{made['commit']}, {made['date']}.",
        "MACs without the scans, with 4.5 for each scan element, and by VMamba's count (9). A scan "
        "element is one (position, channel, state, direction). Papers use all three; compare "
        "figures only within one.",
        markdown_table(
            [
                "model",
                "parameters, M",
                *(f"GMACs, {c}" for c in CONVENTIONS),
                f"kMACs per pixel, {OURS}",
            ],
            [_totals(name, costs["total"], width * height) for name, costs in results.items()],
            figures=0,
        ),
    ]
    if runs:
        parts += [
            "## Time and memory",
            f"On {made['machine']}, {made['threads']} threads, torch {made['versions']['torch']}. "
            "Memory is the peak of a new process, with torch and the weights. With random weights "
            "the networks take as long as with trained ones, but files are larger.",
            markdown_table(
                ["model", "weights", *(f"{d}, {of}" for d in CODING for of in ("s", "peak MiB"))],
                [_run_cells(name, of_model) for name, of_model in runs.items()],
                figures=0,
            ),
        ]
    parts.append("## Share of each module")
    for name, costs in results.items():
        rows = [_share(m, cost, costs["total"]) for m, cost in costs.items() if m != "total"]
        head = [f"`{name}`", "parameters, M", "share", f"GMACs, {OURS}", "share"]
        parts.append(markdown_table(head, rows, figures=0))
    parts += [
        "## What others publish",
        "As stated by each source, otherwise marked: counted is from released code, at 768x512. "
        "Graphics cards, sizes and conventions differ or are not stated, so times cannot be "
        "compared with each other or with ours.",
        markdown_table(
            ["codec", "parameters, M", "MACs", "time on a GPU", "source"],
            [[c.name, c.params, c.macs, c.times, c.source] for c in PUBLISHED_CODECS],
            figures=0,
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _totals(name: str, total: Cost, pixels: int) -> list[str]:
    macs = [f"{total.total(c) / 1e9:.1f}" for c in CONVENTIONS]
    return [
        f"`{name}`",
        f"{total.params / 1e6:.2f}",
        *macs,
        f"{total.total(OURS) / pixels / 1e3:.0f}",
    ]


def _run_cells(name: str, runs: dict[str, Run]) -> list[str]:
    trained = all(run.has_trained_weights for run in runs.values())
    cells = [f"`{name}`", "trained" if trained else "random"]
    for run in (runs[direction] for direction in CODING):
        cells.append(run.status if run.seconds is None else f"{run.seconds:.2f}")
        cells.append("" if run.peak_mib is None else f"{run.peak_mib:,.0f}")
    return cells


def _share(module: str, cost: Cost, total: Cost) -> list[str]:
    macs = cost.total(OURS)
    return [
        module,
        f"{cost.params / 1e6:.3f}",
        f"{cost.params / total.params:.1%}",
        f"{macs / 1e9:.2f}",
        f"{macs / total.total(OURS):.1%}",
    ]


# ---------------------------------------------------------------- JSON


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
            "models": {
                name: {module: asdict(cost) for module, cost in of_model.items()}
                for name, of_model in self.costs.items()
            },
            "runs": {
                name: {direction: asdict(run) for direction, run in of_model.items()}
                for name, of_model in self.runs.items()
            },
            "published": [asdict(codec) for codec in PUBLISHED_CODECS],
            "meta": self.made,
        }
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> Findings:
        """What `to_json` wrote to a file.

        Raises:
            CMambaError: the file cannot be read, or is another.
        """
        try:
            content = json.loads(path.read_text())
            width, height = content["size"]
            costs = {
                name: {module: Cost(**cost) for module, cost in of_model.items()}
                for name, of_model in content["models"].items()
            }
            runs = {
                name: {direction: Run(**run) for direction, run in of_model.items()}
                for name, of_model in content["runs"].items()
            }
            return cls((width, height), costs, runs, content["meta"])
        except OSError as error:
            raise CMambaError(f"{path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CMambaError(
                f"{path} must be what complexity.py --json wrote, got another file ({error!r}); "
                "write it again"
            ) from error


# ---------------------------------------------------------------- the command


def parse(argv: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="model", help="default: base small tiny")
    parser.add_argument("--size", default="768x512", help="WIDTHxHEIGHT (default: 768x512)")
    parser.add_argument("--time", action="store_true", help="also measure time and memory here")
    parser.add_argument(
        "--read", type=Path, metavar="FILE", help="show what an earlier run wrote with --json"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="JSON instead of tables")
    form.add_argument("--markdown", action="store_true", help="a page instead of tables")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write it here (default: print it)"
    )
    args = parser.parse_args(argv)
    if args.read and (args.models or args.time):
        parser.error("--read shows what is in the file; leave out models and --time")
    if args.output and not args.output.parent.is_dir():
        parser.error(f"-o must lie in an existing directory, got {str(args.output)!r}")
    return parser, args


def look(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: list[str]) -> Findings:
    """Count, and with --time measure."""
    try:
        width, height = (int(part) for part in args.size.split("x"))
    except ValueError:
        parser.error(f"--size must be WIDTHxHEIGHT, got {args.size!r}")
    names = args.models or list(CONFIGS)
    costs = {}
    for name in names:
        try:
            costs[name] = count(name, width, height)
        except InvalidArgumentError as error:
            parser.error(str(error))
    runs = measure(names, width, height) if args.time else {}
    made = {**of_run("complexity.py", argv), "versions": versions("cmamba-ref", "torch")}
    return Findings((width, height), costs, runs, made)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser, args = parse(argv)
    if args.read:
        try:
            found = Findings.from_json(args.read)
        except CMambaError as error:
            parser.error(str(error))
    else:
        try:
            found = look(parser, args, argv)
        except KeyboardInterrupt:
            # Times are compared with each other, so they come from one run; it takes minutes.
            print("interrupted; nothing is written", file=sys.stderr)
            return 130
    if args.json:
        text = found.to_json()
    elif args.markdown:
        text = markdown(found.costs, found.runs, *found.size, found.made)
    else:
        parts = [table(name, costs, *found.size) for name, costs in found.costs.items()]
        parts += [run_lines(name, of_model) for name, of_model in found.runs.items()]
        text = "\n\n".join(parts) + "\n"
    if args.output:
        write_atomically(args.output, text.encode())
    else:
        print(text, end="")
    failed = [
        run for of_model in found.runs.values() for run in of_model.values() if run.seconds is None
    ]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

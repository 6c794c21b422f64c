"""Parameters and multiply-accumulates of a model, per module, under each MAC convention.

    python tools/complexity.py                    base, small and tiny at 768x512
    python tools/complexity.py base --size 1920x1080 --json

Counted on the meta device: nothing is computed and no memory is needed.  The conventions differ in
what one scan of L positions, D inner channels, N states and four directions is said to cost; papers
use all three, so every figure must name its own:

    no scan      the scan is left out; convolutions and linear layers only
    4.5          4.5 MACs per (position, channel, state, direction): 18 L D N; ours
    VMamba's     VMamba's FLOP formula, 9 per (...), added to MACs as it stands: 36 L D N
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from cmamba_ref import CMamba
from cmamba_ref.config import CONFIGS
from cmamba_ref.errors import InvalidArgumentError
from cmamba_ref.ss2d import DIRECTIONS

CONVENTIONS = {"no scan": 0, "4.5": 18, "VMamba's": 36}
# The paper's totals, derived in the README from what it states against MLIC++.
PUBLISHED = {"params": 56.26e6, "macs": 362.7e9, "convention": "4.5", "size": (768, 512)}


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


def count(name: str, width: int, height: int) -> dict[str, Cost]:
    """Cost of each module of a configuration for one picture; key `total` for all of it.

    Encoder and decoder are both counted: g_a, g_s, h_a, h_s and the context model once each, as
    `forward` runs them and as the field counts.
    """
    with torch.device("meta"):
        model = CMamba(name).eval()
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="model", help="default: base small tiny")
    parser.add_argument("--size", default="768x512", help="WIDTHxHEIGHT (default: 768x512)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args(argv)
    try:
        width, height = (int(part) for part in args.size.split("x"))
    except ValueError:
        parser.error(f"--size must be WIDTHxHEIGHT, got {args.size!r}")
    results = {}
    for name in args.models or list(CONFIGS):
        try:
            results[name] = count(name, width, height)
        except InvalidArgumentError as error:
            parser.error(str(error))
    if args.json:
        print(
            json.dumps(
                {
                    "size": [width, height],
                    "scan_factor": CONVENTIONS,
                    "models": {
                        name: {module: asdict(cost) for module, cost in costs.items()}
                        for name, costs in results.items()
                    },
                },
                indent=2,
            )
        )
    else:
        print("\n\n".join(table(name, costs, width, height) for name, costs in results.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Puts defects into the Triton kernels, one at a time, and says which ones the tests would notice.

    python tests/mutants.py

Prints JSON: for every mutation `wrong result`, `crashed` or `passed`. A mutant may write where it
should not, so each runs in a process of its own. Every defect is one that a hand could make.
"""

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import interpreter  # noqa: E402
import torch  # noqa: E402
from scan_helpers import chunks_of  # noqa: E402

from cmamba_ref.ops import dispatch  # noqa: E402
from cmamba_ref.testing import assert_accurate, guarded, poisoned, scan_2d_arguments  # noqa: E402

PATIENCE_SECONDS = 180  # a check takes ten to thirty

# Name: file, text in it, defect that replaces the text.
MUTATIONS = {
    "nothing": ("tiling.py", "min_chunk", "min_chunk"),
    "sign of the decay": (
        "chunk_scan_fwd.py",
        "decay_of(dt, A, begins_ptr, row, PACKED) * h",
        "decay_of(-dt, A, begins_ptr, row, PACKED) * h",
    ),
    "chunk one position short": (
        "chunk_scan_fwd.py",
        "tl.range(0, steps)",
        "tl.range(0, steps - 1)",
    ),
    "states enter a chunk too late": ("chunk_scan_fwd.py", "rank + 1)", "rank + 2)"),
    "lines turn one position late": ("primitives.py", "at_turn = left == 0", "at_turn = left == 1"),
    "missing mask of channels": (
        "primitives.py",
        "pointer + row * D + channels, mask=mask, other=0.0",
        "pointer + row * D + channels",
    ),
    "missing mask of steps": (
        "chunk_scan_bwd.py",
        "dy_ptr, row, channels, mask & inside",
        "dy_ptr, row, channels, mask",
    ),
    "softplus without digits": (
        "primitives.py",
        "_log1p(tl.exp2(-tl.abs(x) * LOG2_E), TERMS)",
        "tl.log2(1.0 + tl.exp2(-tl.abs(x) * LOG2_E)) * LN_2",
    ),
    "adjoint carried the wrong way": ("launch.py", "adjoint=True", "adjoint=False"),
    "gradient of B without dt": (
        "chunk_scan_bwd.py",
        "dh * input[None, :], 1",
        "dh * x[None, :], 1",
    ),
    "reverse direction not added": ("chunk_scan_fwd.py", "(direction > 0)", "(direction > 1)"),
}


def mutate(folder: Path, file: str, text: str, defect: str) -> None:
    """A copy of the kernels with a defect, as the package `mutant` in a folder."""
    shutil.copytree(ROOT / "kernels", folder / "mutant")
    path = folder / "mutant" / file
    source = path.read_text()
    if text not in source:
        raise SystemExit(f"{text!r} no longer stands in kernels/{file}")
    path.write_text(source.replace(text, defect))
    # Its operators need names of their own.
    op = folder / "mutant" / "op.py"
    op.write_text(op.read_text().replace("cmamba::", "mutant::"))


def check(folder: Path) -> str:
    """Whether the package `mutant` scans one small map as accurately as it should."""
    sys.path.insert(0, str(folder))
    backend = importlib.import_module("mutant.backend")
    dispatch.BACKENDS["triton"] = dataclasses.replace(
        dispatch.BACKENDS["triton"], scan_2d=lambda inputs: backend.selective_scan_2d(*inputs)
    )
    # With fewer positions the reference may be exact by chance, and the rule fails sound kernels.
    arguments = scan_2d_arguments(
        batch=1, height=3, width=5, channels=4, n=2, rank=2, dtype=torch.float32, skip=False
    )
    try:
        with poisoned(), chunks_of(8, 2, "mutant"):
            assert_accurate("triton", guarded(arguments))
    except AssertionError:
        return "wrong result"
    return "passed"


def outcome(folder: Path) -> str:
    """Return the result of `check` in a process of its own, or "crashed" if it did not come back.

    A mutant that wrote over the heap may also hang, in the allocator's own lock.
    """
    command = [sys.executable, __file__, str(folder)]
    try:
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        return "crashed"
    return ended.stdout.strip() or "crashed"


def main() -> int:
    torch.set_num_threads(1)
    interpreter.patch_once_per_launch()
    if sys.argv[1:]:
        print(check(Path(sys.argv[1])))
        return 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        folders = {name: Path(folder) / name for name in MUTATIONS}
        for name, place in folders.items():
            mutate(place, *MUTATIONS[name])
        outcomes = dict(zip(folders, pool.map(outcome, folders.values()), strict=True))
    print(json.dumps(outcomes, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

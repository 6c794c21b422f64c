"""Faults put into the kernels, one at a time, are detected; see `mutants.py`."""

import json
import subprocess
import sys

import pytest
from mutants import MUTATIONS
from scan_helpers import kernels_are_interpreted

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(
    not kernels_are_interpreted(), reason="this machine has a GPU: kernels are not interpreted"
)


@pytest.fixture(scope="module")
def outcomes(root):
    """The outcome of each mutant; `mutants.py` runs each in a process of its own."""
    run = subprocess.run(
        [sys.executable, root / "tests" / "mutants.py"], capture_output=True, text=True, cwd=root
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_unmutated_kernels_pass(outcomes):
    assert outcomes["nothing"] == "passed"


@pytest.mark.parametrize("name", [name for name in MUTATIONS if name != "nothing"])
def test_mutated_kernel_is_detected(name, outcomes):
    assert outcomes[name] in ("wrong result", "crashed")

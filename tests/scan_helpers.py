"""Parameters for tests of every backend, and kernels with other constants."""

import importlib
import os
from dataclasses import replace

import pytest

from cmamba_ref.ops.dispatch import BACKENDS as REGISTERED


def kernels_are_interpreted() -> bool:
    """Whether Triton kernels run in triton's interpreter, and so on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def on_cpu(*left_out):
    """Parameters for tests on CPU tensors: every registered backend but those left out.

    Only a GPU lets the kernels off: a backend that cannot run here for another reason has to fail.
    """
    has_gpu = pytest.mark.skipif(
        not kernels_are_interpreted(), reason="this machine has a GPU: kernels are not interpreted"
    )
    return [
        pytest.param(name, marks=has_gpu if name == "triton" else (), id=name)
        for name in REGISTERED
        if name not in left_out
    ]


BACKENDS = on_cpu()
EAGER_BACKENDS = on_cpu("triton")  # the interpreter is too slow for some tests
FUSED_BACKENDS = on_cpu("reference")  # a scan is one operator


def record_backends(monkeypatch):
    """Return a list that takes the name of the backend of every scan from now on."""
    names = []

    def recorded(name, scan):
        def run(inputs):
            names.append(name)
            return scan(inputs)

        return run

    for name, backend in REGISTERED.items():
        scans = {field: recorded(name, getattr(backend, field)) for field in ("scan", "scan_2d")}
        monkeypatch.setitem(REGISTERED, name, replace(backend, **scans))
    return names


def chunks_of(length, carried_together=32, package="cmamba_ref.kernels"):
    """Return a context within which sequences are cut into chunks of `length` (a power of two).

    However few programs that takes; the carry then takes so many chunks at a time.
    """
    tiling = importlib.import_module(f"{package}.tiling")
    return tiling.using(
        tiling.FIXED._replace(programs=2**40, min_chunk=length, carry_chunks=carried_together)
    )

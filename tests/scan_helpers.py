"""Parameters for tests of every backend, and kernels with other constants."""

import contextlib
import importlib
import os
from unittest import mock

import pytest


def kernels_are_interpreted() -> bool:
    """Whether Triton kernels run in triton's interpreter, and so on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


# Parameters for tests on CPU tensors. The interpreter is too slow for some.
EAGER_BACKENDS = ("reference", "chunked")
BACKENDS = (
    *EAGER_BACKENDS,
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            not kernels_are_interpreted(), reason="this machine has a GPU: not interpreted"
        ),
    ),
)


@contextlib.contextmanager
def chunks_of(length, carried_together=32, package="cmamba_ref.kernels"):
    """Sequences are cut into chunks of `length` (a power of two), however few programs that takes.

    The carry then takes so many chunks at a time.
    """
    launch = importlib.import_module(f"{package}.launch")
    plan = importlib.import_module(f"{package}.plan")
    with (
        mock.patch.object(plan, "MIN_CHUNK", length),
        mock.patch.object(plan, "PROGRAMS", 2**40),
        mock.patch.object(launch, "CARRY_CHUNKS", carried_together),
    ):
        yield

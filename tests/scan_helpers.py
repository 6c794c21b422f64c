"""Arguments for the scans and the rule by which a backend passes; for tests of every backend."""

import contextlib
import importlib
import math
import os
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from cmamba_ref.ops import selective_scan, selective_scan_2d


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

# In fp64 the oracle has no more digits than the backend, so the rule below says nothing there.
FP64_TOLERANCE = 1e-12


def scan_arguments(
    seed: int = 0,
    *,
    batch: int = 2,
    channels: int = 6,
    length: int = 17,
    n: int = 4,
    b_form: str = "varying",
    c_form: str = "varying",
    groups: int = 1,
    skip: bool = True,
    gate: bool = True,
    bias: bool = True,
    softplus: bool = True,
    initial_state: bool = True,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Keyword arguments of `selective_scan`, all tensors leaves that require gradients.

    b_form and c_form: "constant" [D, N], "varying" [B, N, L] or "grouped" [B, G, N, L].
    """
    generator = torch.Generator().manual_seed(seed)
    parameter_dtype = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(of)

    def projection(form: str) -> Tensor:
        if form == "constant":
            return normal(channels, n, of=parameter_dtype)
        if form == "varying":
            return normal(batch, n, length)
        return normal(batch, groups, n, length)

    uniform = torch.rand(channels, generator=generator, dtype=torch.float64)
    delta = normal(batch, channels, length)
    arguments: dict[str, Any] = {
        "u": normal(batch, channels, length),
        "delta": delta if softplus else delta.abs(),
        "A": -normal(channels, n, of=parameter_dtype).abs() - 0.1,
        "B": projection(b_form),
        "C": projection(c_form),
        "D": normal(channels, of=parameter_dtype) if skip else None,
        "z": normal(batch, channels, length) if gate else None,
        # dt from -9 to -2 before softplus, where an inaccurate softplus shows.
        "delta_bias": (uniform * (7 if softplus else 1) - (9 if softplus else 0)).to(
            parameter_dtype
        )
        if bias
        else None,
        "initial_state": normal(batch, channels, n, of=parameter_dtype) if initial_state else None,
        "delta_softplus": softplus,
    }
    return require_gradients(arguments)


def scan_2d_arguments(
    seed: int = 0,
    *,
    batch: int = 2,
    height: int = 5,
    width: int = 3,
    channels: int = 4,
    n: int = 2,
    rank: int = 2,
    skip: bool = True,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Keyword arguments of `selective_scan_2d`, all tensors leaves that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    parameter_dtype = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dt_bias = torch.rand(4, channels, generator=generator, dtype=torch.float64) * 7 - 9
    arguments: dict[str, Any] = {
        "x": normal(batch, height, width, channels).to(dtype),
        "proj": normal(batch, height, width, 4, rank + 2 * n).to(dtype),
        "A": (-normal(4, channels, n).abs() - 0.1).to(parameter_dtype),
        "dt_weight": (normal(4, channels, rank) / rank**0.5).to(parameter_dtype),
        "dt_bias": dt_bias.to(parameter_dtype),
        "D": normal(4, channels).to(parameter_dtype) if skip else None,
    }
    return require_gradients(arguments)


def require_gradients(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with every tensor a fresh leaf that requires gradients."""
    return {
        name: value.detach().clone().requires_grad_() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def to_double(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same values in fp64: what the oracle computes with."""
    return require_gradients(
        {
            name: value.double() if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
    )


def evaluate(arguments: dict[str, Any], backend: str, seed: int = 1) -> dict[str, Tensor]:
    """Outputs and every gradient by name, for arguments of either scan.

    The gradients of the outputs are drawn in fp64 and rounded to the outputs' types.
    """
    if "proj" in arguments:
        outputs = {"y": selective_scan_2d(**arguments, backend=backend)}
    else:
        y, last_state = selective_scan(**arguments, return_last_state=True, backend=backend)
        outputs = {"y": y, "last_state": last_state}

    generator = torch.Generator().manual_seed(seed)
    io_dtype = arguments["u" if "u" in arguments else "x"].dtype
    grad_outputs = []
    for y in outputs.values():
        grad = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        # Exact in bf16, so that every precision differentiates the same function.
        grad = grad.to(torch.bfloat16).to(y.device, y.dtype)
        grad_outputs.append(grad)
    assert outputs["y"].dtype == io_dtype

    inputs = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    grads = torch.autograd.grad(list(outputs.values()), list(inputs.values()), grad_outputs)
    named = {f"grad of {name}": grad for name, grad in zip(inputs, grads, strict=True)}
    results = {**outputs, **named}
    return {name: x.detach() for name, x in results.items()}


def worst(x: Tensor) -> float:
    """Largest magnitude, 0 for an empty tensor."""
    return x.abs().max().item() if x.numel() else 0.0


def assert_as_accurate_as_reference(arguments: dict[str, Any], backend: str) -> None:
    """max|K - O| <= 2 (max|R - O| + eps max|O|) for every output and every gradient.

    O is the reference in fp64, R the reference in the arguments' types, K the backend.
    """
    oracle = evaluate(to_double(arguments), "reference")
    same_precision = evaluate(arguments, "reference")
    tested = evaluate(arguments, backend)
    for name, expected in oracle.items():
        result, rounded = tested[name], same_precision[name]
        assert result.shape == rounded.shape, name
        assert result.dtype == rounded.dtype, name
        assert torch.isfinite(result).all(), name
        error = worst(result.double() - expected)
        if result.dtype == torch.float64:
            bound = FP64_TOLERANCE * worst(expected)
        else:
            eps = torch.finfo(result.dtype).eps
            bound = 2 * (worst(rounded.double() - expected) + eps * worst(expected))
        assert error <= bound, f"{name}: error {error:.3g} above the bound {bound:.3g}"


GUARD = 64  # elements of NaN before and after an argument; keeps its alignment


@contextlib.contextmanager
def poisoned():
    """Memory from new_empty and empty_like is NaN until it is written."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    with (
        mock.patch.object(
            torch.Tensor, "new_empty", lambda *args, **kw: new_empty(*args, **kw).fill_(math.nan)
        ),
        mock.patch.object(
            torch, "empty_like", lambda *args, **kw: empty_like(*args, **kw).fill_(math.nan)
        ),
    ):
        yield


def guarded(arguments):
    """The same arguments, each between two stretches of NaN in memory."""

    def guard(x):
        memory = x.new_full((x.numel() + 2 * GUARD,), math.nan)
        memory[GUARD:-GUARD] = x.detach().flatten()
        return memory[GUARD:-GUARD].view(x.shape).requires_grad_()

    return {
        name: guard(value) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


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

"""Check a selective scan of your own against the reference: arguments, accuracy rule, guards.

    from cmamba_ref import testing

    arguments = testing.scan_2d_arguments(height=9, width=11, channels=64, dtype=torch.float32)
    testing.assert_accurate(my_scan_2d, arguments)

`my_scan_2d` takes what `cmamba_ref.selective_scan_2d` takes and returns what it returns; likewise
for `selective_scan`.  Nothing here needs a test framework; what fails raises an AssertionError.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeGuard
from unittest import mock

import torch
from torch import Tensor

from cmamba_ref.ops import selective_scan, selective_scan_2d

# In fp64 the oracle has no more digits than the scan, so the accuracy rule says nothing there.
FP64_TOLERANCE = 1e-12
GUARD = 64  # elements of NaN before and after an argument; keeps its alignment

Arguments = dict[str, Any]
# The name of a backend, or a scan that is called with `Arguments` (and `return_last_state=True`).
Scan = str | Callable[..., Any]


# ---------------------------------------------------------------- arguments


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
    packed: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Arguments:
    """Draw keyword arguments of `selective_scan`, all tensors leaves that require gradients.

    Args:
        b_form, c_form: "constant" `[D, N]`, "varying" `[B, N, L]` or "grouped" `[B, G, N, L]`.
        packed: several sequences in a row, a quarter as many as positions in the mean.
        dtype: of u, delta, the gate and what varies of B and C; the others have float32 at least.
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
    arguments: Arguments = {
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
    if packed:
        begins = torch.rand(batch, length, generator=generator) < 0.25
        arguments["seq_idx"] = begins.cumsum(1)
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
) -> Arguments:
    """Draw keyword arguments of `selective_scan_2d`, all tensors leaves that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    parameter_dtype = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dt_bias = torch.rand(4, channels, generator=generator, dtype=torch.float64) * 7 - 9
    arguments: Arguments = {
        "x": normal(batch, height, width, channels).to(dtype),
        "proj": normal(batch, height, width, 4, rank + 2 * n).to(dtype),
        "A": (-normal(4, channels, n).abs() - 0.1).to(parameter_dtype),
        "dt_weight": (normal(4, channels, rank) / rank**0.5).to(parameter_dtype),
        "dt_bias": dt_bias.to(parameter_dtype),
        "D": normal(4, channels).to(parameter_dtype) if skip else None,
    }
    return require_gradients(arguments)


def require_gradients(arguments: Arguments) -> Arguments:
    """Return the same arguments with every real tensor a fresh leaf that requires gradients."""
    return {
        name: value.detach().clone().requires_grad_() if _is_real(value) else value
        for name, value in arguments.items()
    }


def _is_real(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point()


def to_double(arguments: Arguments) -> Arguments:
    """Return the same values in fp64: what the oracle computes with."""
    return require_gradients(
        {name: value.double() if _is_real(value) else value for name, value in arguments.items()}
    )


# ---------------------------------------------------------------- accuracy


def evaluate(
    arguments: Arguments, scan: Scan, seed: int = 1, *, gradients: bool = True
) -> dict[str, Tensor]:
    """Compute outputs and every gradient by name, for arguments of either scan.

    The gradients of the outputs are drawn in fp64 and rounded to the outputs' types.  Without
    `gradients` only the outputs are computed, without autograd.
    """
    is_2d = "proj" in arguments
    call = partial(selective_scan_2d if is_2d else selective_scan, backend=scan)
    call = call if isinstance(scan, str) else scan
    with torch.set_grad_enabled(gradients):
        if is_2d:
            outputs = {"y": call(**arguments)}
        else:
            y, last_state = call(**arguments, return_last_state=True)
            outputs = {"y": y, "last_state": last_state}
    io_dtype = arguments["x" if is_2d else "u"].dtype
    assert outputs["y"].dtype == io_dtype, f"y is {outputs['y'].dtype} and not {io_dtype}"
    if not gradients:
        return outputs

    generator = torch.Generator().manual_seed(seed)
    grad_outputs = []
    for y in outputs.values():
        grad = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        # Exact in bf16, so that every precision differentiates the same function.
        grad = grad.to(torch.bfloat16).to(y.device, y.dtype)
        grad_outputs.append(grad)

    inputs = {name: x for name, x in arguments.items() if _is_real(x)}
    grads = torch.autograd.grad(list(outputs.values()), list(inputs.values()), grad_outputs)
    named = {f"grad of {name}": grad for name, grad in zip(inputs, grads, strict=True)}
    results = {**outputs, **named}
    return {name: x.detach() for name, x in results.items()}


def worst(x: Tensor) -> float:
    """Return the largest magnitude, 0 for an empty tensor."""
    return x.abs().max().item() if x.numel() else 0.0


class Margin(NamedTuple):
    """How far one result is from the oracle, and how far it may be."""

    name: str
    error: float
    bound: float

    @property
    def is_kept(self) -> bool:
        """Whether the error is within the bound; false for NaN."""
        return self.error <= self.bound


class AccuracyRule:
    """max|K - O| <= 2 (max|R - O| + eps max|O|), by name, over as many parts as are compared.

    K is tested, O the oracle in fp64, R of the same precision as K; eps is that of K's type.  In
    fp64 the bound is `FP64_TOLERANCE` max|O|.

    Args:
        allowance: factor on the bound.
    """

    def __init__(self, allowance: float = 1.0) -> None:
        self.allowance = allowance
        self._maxima: dict[str, tuple[float, float, float, torch.dtype]] = {}

    def compare(self, name: str, tested: Tensor, rounded: Tensor, oracle: Tensor) -> None:
        """Take in one part of a result.

        Raises:
            AssertionError: it has another shape or type than it should have.
        """
        assert tested.shape == rounded.shape == oracle.shape, (
            f"{name} is {list(tested.shape)} and not {list(rounded.shape)}"
        )
        assert tested.dtype == rounded.dtype, f"{name} is {tested.dtype} and not {rounded.dtype}"
        oracle = oracle.double()
        error = worst(tested.double() - oracle)
        if not torch.isfinite(tested).all():
            error = math.inf
        before = self._maxima.get(name, (0.0, 0.0, 0.0, tested.dtype))
        now = error, worst(rounded.double() - oracle), worst(oracle)
        self._maxima[name] = (*map(max, now, before[:3]), tested.dtype)  # type: ignore[assignment]

    def margins(self) -> list[Margin]:
        """Return error and bound of each name."""
        found = []
        for name, (error, rounding, scale, dtype) in self._maxima.items():
            bound = FP64_TOLERANCE * scale
            if dtype != torch.float64:
                bound = 2 * (rounding + torch.finfo(dtype).eps * scale)
            found.append(Margin(name, error, self.allowance * bound))
        return found

    def check(self) -> None:
        """Check every name.

        Raises:
            AssertionError: names all that are beyond their bounds.
        """
        failures = [
            f"{m.name}: error {m.error:.3g} above the bound {m.bound:.3g}"
            for m in self.margins()
            if not m.is_kept
        ]
        assert not failures, "; ".join(failures)


def accuracy(
    scan: Scan, arguments: Arguments, judge: Scan = "reference", *, gradients: bool = True
) -> AccuracyRule:
    """Compare outputs and all gradients of a scan with those of `judge`, in fp64 and as given.

    Args:
        gradients: False for a scan that has no backward.
    """
    oracle = evaluate(to_double(arguments), judge, gradients=gradients)
    rounded = evaluate(arguments, judge, gradients=gradients)
    tested = evaluate(arguments, scan, gradients=gradients)
    rule = AccuracyRule()
    for name, expected in oracle.items():
        rule.compare(name, tested[name], rounded[name], expected)
    return rule


def assert_accurate(
    scan: Scan, arguments: Arguments, judge: Scan = "reference", allowance: float = 1.0
) -> None:
    """Check that a scan is about as accurate as the reference: outputs and all gradients.

    Args:
        scan: the name of a backend, or a function with the signature of `selective_scan` or
            `selective_scan_2d`, whichever the arguments are for.
        arguments: of `scan_arguments` or `scan_2d_arguments`, or others that require gradients.
        judge: what gives the oracle and the rounded results, `reference` for small inputs.
        allowance: factor on the bound.

    Raises:
        AssertionError: a result is beyond the bound of `AccuracyRule`.
    """
    rule = accuracy(scan, arguments, judge)
    rule.allowance = allowance
    rule.check()


# ---------------------------------------------------------------- guards


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within the block, memory from `new_empty` and `empty_like` is NaN until it is written."""

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
            x = allocate(*args, **kwargs)
            return x.fill_(math.nan) if _is_real(x) else x

        return allocate_poisoned

    with (
        mock.patch.object(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
    ):
        yield


def guarded(arguments: Arguments) -> Arguments:
    """Return the same arguments, each real tensor between two stretches of NaN in memory."""

    def guard(x: Tensor) -> Tensor:
        memory = x.new_full((x.numel() + 2 * GUARD,), math.nan)
        memory[GUARD:-GUARD] = x.detach().flatten()
        return memory[GUARD:-GUARD].view(x.shape).requires_grad_()

    return {name: guard(value) if _is_real(value) else value for name, value in arguments.items()}

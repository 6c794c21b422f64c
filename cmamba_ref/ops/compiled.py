"""The blocks of the backend `compiled`: blocks.py's arithmetic, fused by TorchInductor.

A block is a fixed number of steps, written out one after the other: from that TorchInductor makes
one loop over batch, groups, states and channels in which the state never leaves its register, and
a second one for the sums over states. In the eager blocks the same work is one trip through memory
per operation.

The graph goes to TorchInductor without torch.compile, whose guards take as long at every call as
the arithmetic of a block. So a program fits sizes, strides and number of threads exactly, and there
is one for each combination. Making one takes tens of seconds, once: TorchInductor keeps
its results on disk (TORCHINDUCTOR_CACHE_DIR says where).
"""

import functools
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from cmamba_ref.ops.blocks import LOG2_E, Blocks, Gradients, Operands, fitting_length

# Steps per block. More take longer to compile; fewer do not pay for the call.
MAX_STEPS = 64
MIN_STEPS = 16
# Floats of the states that the forward has in memory at a time: few enough for a core's cache.
STRETCH_FLOATS = 192 * 1024

# 2^x on [-1/2, 1/2] as a polynomial that is exact at 0 and elsewhere off by at most 2e-9 of the
# value (our fit, by linear programming). Lowest power first.
EXP2_COEFFICIENTS = (
    *(1.0, 0.693147203, 0.240226479, 0.0555033248, 0.00961843804, 0.00133988727, 0.000153531982),
)

INFINITY_BITS = 255 * 2.0**23  # of an fp32

_OPTIONS = {
    # One loop for all steps, however many there are.
    "max_fusion_size": 1_000_000,
    "cpp.max_horizontal_fusion_size": 1_000_000,
    # A product and a sum may be one instruction, which rounds once.
    "cpp.enable_floating_point_contract_flag": "fast",
}

Steps = Callable[..., tuple[Tensor, ...]]

_logger = logging.getLogger("cmamba_ref.ops")
_compiling = threading.Lock()


def unavailable_reason(device_type: str) -> str | None:
    """Why blocks cannot be compiled for this kind of device, or None when they can."""
    if device_type != "cpu":
        return "it is for tensors on the CPU"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"it needs a C++ compiler, and there is no {compiler!r}"
    return None


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo.
unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


class CompiledBlocks(Blocks):
    """The blocks of one scan, compiled; what is left over at the end is done as in `Blocks`."""

    @staticmethod
    def block_length(state_floats: int) -> int:
        """Steps per block for a state of that many floats (all of S, G, N, D)."""
        return fitting_length(state_floats, MAX_STEPS, MIN_STEPS)

    def __init__(self, A: Tensor, state: Tensor, length: int):
        super().__init__(A, state, length)
        self._programs: dict[Steps, Steps] = {}

    def _is_whole(self, start: int, stop: int) -> bool:
        return self._state_floats > 0 and stop - start == self.block_length(self._state_floats)

    def forward(
        self, start: int, stop: int, operands: Operands, first: Tensor, y: Tensor
    ) -> Tensor:
        if not self._is_whole(start, stop):
            return super().forward(start, stop, operands, first, y)
        y_, last = self._call(forward_steps, self._A2, *_cut(operands, start, stop), first)
        y[start:stop].copy_(y_)
        return last

    def backward(
        self,
        start: int,
        stop: int,
        operands: Operands,
        first: Tensor,
        grad_y: Tensor,
        grad_last: Tensor,
        gradients: Gradients,
    ) -> Tensor:
        if not self._is_whole(start, stop):
            arguments = (operands, first, grad_y, grad_last, gradients)
            return super().backward(start, stop, *arguments)
        block = _cut(operands, start, stop)
        arguments = (*block, first, grad_y[start:stop], grad_last)
        u, dt, B, C, A, grad_first = self._call(backward_steps, self._A2, *arguments)
        gradients.u[start:stop].copy_(u)
        gradients.dt[start:stop].copy_(dt)
        _part(gradients.B, slice(start, stop)).add_(B)
        _part(gradients.C, slice(start, stop)).add_(C)
        gradients.A.add_(A)
        return grad_first

    def _call(self, steps: Steps, *arguments: Tensor) -> tuple[Tensor, ...]:
        # All whole blocks of one scan have the same form.
        if steps not in self._programs:
            forms = tuple((x.shape, x.stride()) for x in arguments)
            threads = torch.get_num_threads()
            self._programs[steps] = _program(steps, forms, arguments[0].dtype, threads)
        return self._programs[steps](*arguments)


def _cut(operands: Operands, start: int, stop: int) -> Operands:
    return Operands(*(_part(x, slice(start, stop)) for x in operands))


def _part(x: Tensor, at: slice) -> Tensor:
    """These steps of x, or all of a constant x."""
    return x if len(x) == 1 else x[at]


@functools.cache
def _program(
    steps: Steps,
    forms: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...],
    dtype: torch.dtype,
    threads: int,
) -> Steps:
    """`steps` compiled for arguments of these shapes and strides, and for this many threads."""
    # Imported here: this takes seconds, which only those who use it should wait.
    import torch._inductor
    from torch.fx.experimental.proxy_tensor import make_fx

    _logger.info("compiling a block of the scan for %s, %d threads", forms, threads)
    no_autocast = torch.autocast("cpu", enabled=False)
    with _compiling, torch.inference_mode(False), torch.no_grad(), no_autocast:
        examples: list[Any] = [
            torch.empty_strided(*form, dtype=dtype, device="cpu").zero_() for form in forms
        ]
        graph = make_fx(steps)(*examples)
        return cast(Steps, torch._inductor.compile(graph, examples, options=_OPTIONS))


# ---------------------------------------------------------------- what is compiled
#
# Axes as in blocks.py, without chunks: A2 (A times log2 e) [G, N, D]; u and dt [steps, S, G, 1, D];
# B and C [steps, S, G, N, 1] or constant [1, 1, G, N, D]; states [S, G, N, D].


def forward_steps(
    A2: Tensor, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, first: Tensor
) -> tuple[Tensor, Tensor]:
    """Output `[steps, S, G, 1, D]` and last state."""
    dtu, state, outputs = dt * u, first, []
    stretch = max(STRETCH_FLOATS // first.numel(), 1)
    for start in range(0, len(dt), stretch):
        at = slice(start, start + stretch)
        states = _states(A2, dt[at], dtu[at], _part(B, at), state)
        outputs.append(_sum_over_states(states, _part(C, at)))
        state = states[-1].clone()
    return torch.cat(outputs), state


def backward_steps(
    A2: Tensor,
    u: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    first: Tensor,
    grad_y: Tensor,
    grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, B, C, A (per batch element) and first; see `Blocks.backward`."""
    dtu = dt * u
    states = _states(A2, dt, dtu, B, first)
    grad, grads, exponents = grad_last, [], []
    for t in reversed(range(len(dt))):
        grad = grad + grad_y[t] * _at(C, t)
        grads.append(grad)
        grad = grad * exp2(dt[t] * A2)
        exponents.append(grad * (states[t - 1] if t else first))
    g, w = torch.stack(grads[::-1]), torch.stack(exponents[::-1])
    grad_dtu = _sum_over_states(g, B)
    grad_dt = _sum_over_states(w, A2 / LOG2_E) + grad_dtu * u
    grad_B, grad_C = _gradient_of_weights(g, dtu, B), _gradient_of_weights(states, grad_y, C)
    return grad_dtu * dt, grad_dt, grad_B, grad_C, (w * dt).sum(0), grad


def exp2(x: Tensor) -> Tensor:
    """2^x; in fp32 in a form that is all vector arithmetic, where a library call would be made.

    To 1 unit in the last place; 0 below -126.5 and inf from 127.5 on. NaN for infinite x, which no
    scan of finite arguments has.
    """
    if x.dtype != torch.float32:
        return torch.exp2(x)
    whole = torch.round(x)
    fraction = x - whole
    power = torch.full_like(x, EXP2_COEFFICIENTS[-1])
    for coefficient in EXP2_COEFFICIENTS[-2::-1]:
        power = power * fraction + coefficient
    # The bits of 2^whole as a number, which a float holds exactly. Between 0 and inf, by two relus:
    # one instruction each, where a clamp is five.
    bits = torch.relu((whole + 127) * 2.0**23)
    bits = INFINITY_BITS - torch.relu(INFINITY_BITS - bits)
    return power * bits.to(torch.int32).view(torch.float32)


def _at(x: Tensor, t: int) -> Tensor:
    return x[t if len(x) > 1 else 0]


def _states(A2: Tensor, dt: Tensor, dtu: Tensor, B: Tensor, first: Tensor) -> Tensor:
    """States after each step `[steps, S, G, N, D]`."""
    state, states = first, []
    for t in range(len(dt)):
        state = exp2(dt[t] * A2) * state + dtu[t] * _at(B, t)
        states.append(state)
    return torch.stack(states)


def _sum_over_states(x: Tensor, weights: Tensor) -> Tensor:
    """Sum over N of x * weights, `[.., 1, D]`: written out, so that it is fused."""
    total = x[..., :1, :] * weights[..., :1, :]
    for n in range(1, x.shape[-2]):
        total = total + x[..., n : n + 1, :] * weights[..., n : n + 1, :]
    return total


def _gradient_of_weights(x: Tensor, grad: Tensor, weights: Tensor) -> Tensor:
    """Gradient of `weights` of `_sum_over_states` from that of its result."""
    product = (grad @ x.mT).mT if weights.shape[-1] == 1 else grad * x
    return product.sum((0, 1), keepdim=True) if len(weights) == 1 else product

"""The blocks of the backend `compiled`: the forward of blocks.py, fused by TorchInductor.

TorchInductor makes one loop of much arithmetic, but none that carries a state from step to step. So
a block is cut into many chunks of few steps. Steps and states are written out, and what is left to
loop over, chunks, batch, groups and channels, is independent. The first loop finds what each chunk
adds to its last state, the second carries states from chunk to chunk, and the third goes through
the chunks again with the states in registers and adds up the output. Decays are computed twice,
which costs less than to write and read the states of all steps.

The backward is that of the eager blocks. Its gradients of B and C are sums over channels of as many
products as there are states and steps; TorchInductor has no loop that adds them up without writing
all of them to memory first, and with that a compiled backward was not faster.

The graph goes to TorchInductor without torch.compile, whose guards take as long at every call as
the arithmetic of a block. So a program fits sizes, strides and number of threads exactly, and there
is one for each combination. Making one takes tens of seconds, once: TorchInductor keeps
its results on disk (TORCHINDUCTOR_CACHE_DIR says where).
"""

import functools
import logging
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from cmamba_ref.errors import BackendUnavailableError
from cmamba_ref.ops.blocks import Block, Blocks, Operands, fitting

# Pairs of a step and a state that are written out, and how many of these are states: more take
# longer to compile; fewer steps mean more chunks to carry states between.
UNROLLED = 64
UNROLLED_STATES = 8
# Chunks per block: they are written out where states are carried, and few do not pay for the call.
MAX_CHUNKS = 32
MIN_CHUNKS = 4
# Floats of the states before all chunks of a block.
CHUNKS_FLOATS = 512 * 1024

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
    # What is put together is first computed, each part in its own loop and not all in every loop.
    "max_pointwise_cat_inputs": 1,
}

Program = Callable[..., tuple[Tensor, Tensor]]

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
    """The blocks of one scan, the forward compiled; a rest at the end is done as in `Blocks`."""

    @staticmethod
    def forward_length(state: Sequence[int]) -> int:
        return _steps(state[2]) * fitting(CHUNKS_FLOATS, math.prod(state), MAX_CHUNKS, MIN_CHUNKS)

    def __init__(self, A: Tensor, state: Tensor, length: int, softplus: bool = False):
        super().__init__(A, state, length, softplus)
        self._steps = _steps(state.shape[2])
        self._whole = self.forward_length(state.shape) if state.numel() else 0  # no block
        self._program: Program | None = None

    def forward(
        self, start: int, stop: int, operands: Operands, first: Tensor, y: Tensor
    ) -> Tensor:
        if stop - start != self._whole:
            size = self.block_length(first.shape)
            for at in range(start, stop, size):
                first = super().forward(at, min(at + size, stop), operands, first, y)
            return first
        block = Block(start, stop, self._whole // self._steps, self._steps)
        arguments = (self._A2, *map(block.view, operands), first)
        if self._program is None:  # all whole blocks of one scan have the same form
            forms = tuple((x.shape, x.stride()) for x in arguments)
            threads = torch.get_num_threads()
            self._program = _compiled(forms, first.dtype, threads, self._softplus)
        y_, last = self._program(*arguments)
        block.view(y).copy_(y_)
        # From parts, see below, to [S, G, N, D], contiguous.
        return last.movedim(0, 2).flatten(2, 3).clone(memory_format=torch.contiguous_format)


# Bounded, as a program that runs for long may meet pictures of any number of sizes.
@functools.lru_cache(maxsize=256)
def _compiled(
    forms: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...],
    dtype: torch.dtype,
    threads: int,
    softplus: bool,
) -> Program:
    """`forward_block` compiled for these shapes and strides, and for this many threads.

    Raises:
        BackendUnavailableError: the C++ compiler that is there does not work.
    """
    # Imported here: this takes seconds, which only those who use it should wait.
    import torch._inductor
    import torch._inductor.exc
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    _logger.info("compiling a block of the scan for %s, %d threads", forms, threads)
    no_autocast = torch.autocast("cpu", enabled=False)
    with _compiling, torch.inference_mode(False), torch.no_grad(), no_autocast:
        examples: list[Any] = [
            torch.empty_strided(*form, dtype=dtype, device="cpu").zero_() for form in forms
        ]
        graph = make_fx(functools.partial(forward_block, softplus=softplus))(*examples)
        # TorchInductor keeps what it makes on disk only where it finds a ShapeEnv.
        with tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv()))):
            try:
                return cast(Program, torch._inductor.compile(graph, examples, options=_OPTIONS))
            except torch._inductor.exc.InductorError as error:
                reason = str(error).partition("\n")[0]
                raise BackendUnavailableError(
                    "`backend` must be one that runs this scan here, got 'compiled', which cannot "
                    f"be compiled ({reason}); use backend='auto' or 'chunked'"
                ) from error


# ---------------------------------------------------------------- what is compiled
#
# Axes as in blocks.py: A2 (A times log2 e) [G, N, D]; u and dt [steps, chunks, S, G, 1, D]; B and C
# [steps, chunks, S, G, N, 1] or constant [1, 1, 1, G, N, D]; states [S, G, N, D].
#
# The N states are taken apart into n parts of N/n. What is done to a part is written out, and the
# loop that TorchInductor makes runs over the states within a part; N/n is 1 for up to
# UNROLLED_STATES states. A list of parts becomes a tensor with n as its first axis, in which every
# part is contiguous and need not be copied to its place.


def _part_count(states: int) -> int:
    """n, the largest divisor of N that is not above UNROLLED_STATES."""
    return max(n for n in range(1, UNROLLED_STATES + 1) if states % n == 0)


def _steps(states: int) -> int:
    """Steps per chunk: a power of two, as the lengths of all blocks are."""
    return fitting(UNROLLED, _part_count(states), UNROLLED, 1)


def _split(x: Tensor) -> tuple[Tensor, ...]:
    """The n parts [..., N/n, D] of x [..., N, D]."""
    return x.unflatten(-2, (_part_count(x.shape[-2]), -1)).unbind(-3)


def forward_block(
    A2: Tensor, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, first: Tensor, softplus: bool
) -> tuple[Tensor, Tensor]:
    """Output `[steps, chunks, S, G, 1, D]` and last state, in parts `[n, S, G, N/n, D]`."""
    if softplus:
        dt = F.softplus(dt)
    dtu = dt * u
    ends = [_end_of_chunk(A_, B_, dt, dtu) for A_, B_ in zip(_split(A2), _split(B), strict=True)]
    *starts, last = _carry(first, ends, _decays_of_chunks(A2, dt))

    outputs: list[Tensor | None] = [None] * len(dt)
    parts = zip(_split(A2), _split(B), _split(C), torch.stack(starts).unbind(1), strict=True)
    for A_, B_, C_, state in parts:
        for t in range(len(dt)):
            state = exp2(dt[t] * A_) * state + dtu[t] * _at(B_, t)
            outputs[t] = _plus(outputs[t], state * _at(C_, t))
    return torch.stack(cast(list[Tensor], outputs)).sum(-2, keepdim=True), last


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


def _plus(total: Tensor | None, x: Tensor) -> Tensor:
    return x if total is None else total + x


def _end_of_chunk(A2: Tensor, B: Tensor, dt: Tensor, dtu: Tensor) -> Tensor:
    """What each chunk adds to its last state: a part `[chunks, S, G, N/n, D]`."""
    end = dtu[0] * _at(B, 0)
    for t in range(1, len(dt)):
        end = exp2(dt[t] * A2) * end + dtu[t] * _at(B, t)
    return end


def _decays_of_chunks(A2: Tensor, dt: Tensor) -> list[Tensor]:
    """The product of the decays of each chunk, all parts `[n, S, G, N/n, D]`."""
    parts = torch.stack(_split(A2)).unsqueeze(1)
    return [exp2(total * parts) for total in dt.sum(0).unbind(0)]


def _carry(first: Tensor, ends: list[Tensor], decays: list[Tensor]) -> list[Tensor]:
    """The state before each chunk, and that after the last: all parts `[n, S, G, N/n, D]`."""
    states = [torch.stack(_split(first))]
    for end, decay in zip(torch.stack(ends).unbind(1), decays, strict=True):
        states.append(decay * states[-1] + end)
    return states

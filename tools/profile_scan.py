"""Profile the four-direction scan: our backends and baselines on the same work, in the same run.

    python tools/profile_scan.py
    python tools/profile_scan.py --preset kodak --mode forward --json scan.json
    python tools/profile_scan.py --shape 1x128x128x192x16x6 --backends chunked vmamba-pipeline

Correctness comes first: on two maps of 12x10 with the same channels, states, rank and type, output
and gradients are held against the reference in fp64 by the rule of `cmamba_ref.testing`, with NaN
around every argument and in memory that is not yet written.  A candidate that fails is reported
and not timed, and the exit status is 1.  Timing is interleaved round-robin, one repeat of each
candidate at a time, so that a drift of the machine hits all alike.

Our backends run through `selective_scan_2d`.  Baselines know only one-dimensional scans; they run
as VMamba runs them, on four copies of the map:

    mamba_ssm                   selective_scan_fn of the package mamba-ssm
    selective_scan_cuda_oflex   VMamba's extension; forward only
    mambapy                     pscan of mamba.py, which stores every state
    ref-style                   position by position over stored decays and inputs of every state:
                                the scheme of mamba-ssm's selective_scan_ref, nothing to install
    vmamba-pipeline             our own one-dimensional scan: what the copies cost

tune_scan.py measures in the same way how good the fixed rules of the Triton kernels are.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import math
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from provenance import of_run, processor, versions
from resident import peak_beyond
from torch import Tensor
from torch.nn import functional as F

from cmamba_ref import testing
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.config import CONFIGS
from cmamba_ref.errors import BackendUnavailableError
from cmamba_ref.model import MULTIPLE
from cmamba_ref.ops import selective_scan, selective_scan_2d
from cmamba_ref.ops.dispatch import BACKENDS

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
FORWARD, BACKWARD, BOTH = MODES = ("forward", "backward", "both")

BASELINE_ALLOWANCE = 8
MIN_REPEATS = 3  # with fewer there is no spread to speak of

# Defines the figures: below the table, and in the JSON.
NOTES = (
    "ms, IQR: median and interquartile range of single calls",
    "forward: inference without autograd; backward: without the forward before it; both: the two",
    "GB/s: bytes that no way of computing can avoid, parameters left out, over the median: forward "
    "2E + P elements, backward 3E + 2P, with E = B H W D and P = 4 B H W (R + 2N)",
    "Gexp/s: exponentials of the recurrence alone, 4 E N in forward and again in backward",
    "ns/elt: per position, channel, state and direction (4 E N of them), whatever the mode",
    "of floor: the time that memory, exponential units or fp32 units of the GPU would take in full "
    "use, whichever is longest, over the median; empty where the device is not modelled",
    "MiB: peak of memory beyond what was there before the timed part, results included; on CUDA of "
    "torch's allocator, on the CPU of the process in RAM, in whole pages, on Linux only",
    "check: max|K-O| <= 2 (max|R-O| + eps max|O|) with O the fp64 reference, R the reference in "
    f"the same type, K the candidate; for baselines {BASELINE_ALLOWANCE} times that, and R rounds "
    "the time steps to that type, as they do",
)


# ---------------------------------------------------------------- what to measure


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        dtype_name: key of `DTYPES`, type of map and projections.
        modes: of `MODES`.
        repeats: upper limit for each candidate.
        seconds: measured time after which `MIN_REPEATS` are enough.
        checked_map: batch, height and width of the map on which candidates are checked.
    """

    device: torch.device
    dtype_name: str
    modes: tuple[str, ...]
    repeats: int
    seconds: float
    checked_map: tuple[int, int, int] = (2, 12, 10)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    def enough(self, times: list[float]) -> bool:
        """Return whether no further repeat is wanted after these, in seconds."""
        spread = len(times) >= MIN_REPEATS and sum(times) >= self.seconds
        return spread or len(times) >= self.repeats


@dataclass(frozen=True)
class Shape:
    """One call: a map `[batch, height, width, channels]`, N states and R columns of dt."""

    batch: int
    height: int
    width: int
    channels: int
    states: int
    rank: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read a shape written as BxHxWxDxNxR, for argparse."""
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){5}", text):
            raise argparse.ArgumentTypeError(
                f"must be BxHxWxDxNxR, six positive numbers such as 1x128x128x192x16x6, got {text}"
            )
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return "x".join(str(getattr(self, f.name)) for f in fields(self))

    @property
    def elements(self) -> int:
        """E: elements of the map."""
        return self.batch * self.height * self.width * self.channels

    @property
    def projections(self) -> int:
        """P: elements of the projections of all four directions."""
        return 4 * self.batch * self.height * self.width * (self.rank + 2 * self.states)

    @property
    def elts(self) -> int:
        """Steps of the recurrence: one per position, channel, state and direction."""
        return 4 * self.elements * self.states

    @property
    def kind(self) -> tuple[int, int, int]:
        """Channels, states and rank: what decides whether a scan is correct."""
        return self.channels, self.states, self.rank


@dataclass(frozen=True)
class Case:
    """A shape and where it comes from."""

    label: str
    shape: Shape


def model_cases(width: int, height: int) -> list[Case]:
    """Return every scan of the configured models on one image; g_s has the shapes of g_a."""
    rows, columns = (-(-side // MULTIPLE) * MULTIPLE for side in (height, width))
    cases = []
    for config in CONFIGS.values():
        places = [
            (f"stage {stage}", channels, stage)  # stage s lies at H / 2^s
            for stage, channels in enumerate(config.widths, start=1)
            if config.stages_with_scan[stage - 1] and config.depths[stage - 1]
        ]
        places.append(("context", config.cae_width or 2 * max(config.slice_widths), 4))
        for place, channels, halvings in places:
            size = (rows >> halvings, columns >> halvings, round(config.ssm_ratio * channels))
            shape = Shape(1, *size, config.d_state, math.ceil(channels / 16))
            cases.append(Case(f"{config.name} {place}", shape))
    return cases


def fixed_cases(label: str, *sizes: tuple[int, int, int, int, int, int]) -> list[Case]:
    return [Case(label, Shape(*size)) for size in sizes]


PRESETS: dict[str, list[Case]] = {
    # For a minute on a GPU: one image, a batch, few states.
    "short": fixed_cases(
        "short", *((b, 128, 128, 192, n, 6) for b, n in ((1, 16), (8, 16), (8, 1)))
    ),
    # To compare kernels by: a large map, a batch, narrow and wide channels; R = D / 32, as in a
    # model with twice as many channels inside the scan as outside.
    "kernels": fixed_cases(
        "kernels",
        *(
            (batch, height, width, channels, states, channels // 32)
            for batch, height, width, channels in (
                (1, 128, 128, 192),
                (8, 128, 128, 192),
                (1, 256, 384, 128),
                (1, 256, 384, 384),
            )
            for states in (1, 4, 8, 16)
        ),
    ),
    "256": model_cases(256, 256),
    "kodak": model_cases(768, 512),
    "2k": model_cases(2048, 1080),
    # So small that the sequential reference takes a fraction of a second.
    "quick": fixed_cases("quick", (1, 24, 16, 64, 16, 4), (2, 16, 16, 96, 2, 6)),
}


# ---------------------------------------------------------------- the least work, and the floor


@dataclass(frozen=True)
class Gpu:
    """What the floor depends on.

    Attributes:
        bandwidth: of the memory, sustained, in bytes per second.
        sms: multiprocessors.
        clock: of the multiprocessors, in Hz.
        fp32_lanes: fp32 operations per clock and multiprocessor, a fused multiply-add being one.
        exps: exponentials or logarithms per clock and multiprocessor.
    """

    bandwidth: float
    sms: int
    clock: float
    fp32_lanes: int = 128
    exps: int = 16


# Assumed: nine tenths of the data sheet's 4.8, 3.35 and 2.0 TB/s, and the clock that
# docs/kernels.md's predictions take; a card that runs faster may come below its floor.
KNOWN_GPUS = {
    "NVIDIA H200": Gpu(4.3e12, 132, 1.755e9),
    "NVIDIA H100 80GB HBM3": Gpu(3.0e12, 132, 1.755e9),
    "NVIDIA H100 PCIe": Gpu(1.8e12, 114, 1.755e9),
}


def gpu_model(device: torch.device) -> Gpu | None:
    """Return the model of a device, or None where there is none."""
    return KNOWN_GPUS.get(device_name(device)) if device.type == "cuda" else None


def minimum_bytes(shape: Shape, mode: str, itemsize: int) -> int:
    """Return the bytes that have to be read or written in a mode, parameters left out."""
    forward = 2 * shape.elements + shape.projections  # x, y; proj
    backward = 3 * shape.elements + 2 * shape.projections  # x, dy, dx; proj, dproj
    return itemsize * {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[mode]


def floor_seconds(shape: Shape, mode: str, itemsize: int, gpu: Gpu) -> float:
    """Return the least time of a fused kernel: one pass, dt formed in the kernel.

    The backward recomputes the states, once.
    """
    n, rank = shape.states, shape.rank
    # Per position, channel and direction. Softplus takes an exponential and a logarithm.
    exps = {FORWARD: n + 2, BOTH: 2 * n + 6}
    lanes = {FORWARD: 4 * n + rank + 8, BOTH: 17 * n + 3 * rank + 30}
    for work in (exps, lanes):
        work[BACKWARD] = work[BOTH] - work[FORWARD]
    clocks = gpu.sms * gpu.clock
    return max(
        minimum_bytes(shape, mode, itemsize) / gpu.bandwidth,
        4 * shape.elements * exps[mode] / (gpu.exps * clocks),
        4 * shape.elements * lanes[mode] / (gpu.fp32_lanes * clocks),
    )


# ---------------------------------------------------------------- baselines

Scan2d = Callable[..., Tensor]  # takes the arguments of `selective_scan_2d` by name
# u, delta [B, 4D, L], A [4D, N], B, C [B, 4, N, L], D [4D] or None, delta_bias [4D] to y [B, 4D, L]
Scan1d = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor], Tensor]


def along(direction: int, maps: Tensor) -> Tensor:
    """Return maps `[B, C, H, W]` as sequences `[B, C, L]`, in the order of one direction."""
    sequences = (maps.mT if direction % 2 else maps).flatten(2)
    return sequences.flip(-1) if direction >= 2 else sequences


def through_copies(scan: Scan1d) -> Scan2d:
    """Return the four-direction scan as VMamba computes it: copy the map four times, scan, merge.

    VMamba projects the copies; here the projections are given, and it is they that are reordered.
    """

    def scan_2d(
        x: Tensor,
        proj: Tensor,
        A: Tensor,
        dt_weight: Tensor,
        dt_bias: Tensor,
        D: Tensor | None = None,
    ) -> Tensor:
        _, height, width, _ = x.shape
        rank, n = dt_weight.shape[2], A.shape[2]
        x_maps = rearrange(x, "b h w d -> b d h w")
        proj_maps = rearrange(proj, "b h w k f -> k b f h w")
        xs = torch.stack([along(k, x_maps) for k in range(4)], dim=1)
        r, B, C = torch.stack([along(k, proj_maps[k]) for k in range(4)], dim=1).split(
            (rank, n, n), dim=2
        )
        delta = torch.einsum("bkrl,kdr->bkdl", r, dt_weight.to(x.dtype))
        ys = scan(
            xs.flatten(1, 2),
            delta.flatten(1, 2).contiguous(),  # positions last in memory, as the kernels want it
            A.flatten(0, 1),
            B,
            C,
            None if D is None else D.flatten(),
            dt_bias.flatten(),
        ).unflatten(1, (4, -1))
        rows, columns = (ys[:, :2] + ys[:, 2:].flip(-1)).unbind(1)
        y = rows.unflatten(-1, (height, width)) + columns.unflatten(-1, (width, height)).mT
        return rearrange(y, "b d h w -> b h w d").to(x.dtype).contiguous()

    return scan_2d


# Each imports its package when it is called.


def ours(u, delta, A, B, C, D, delta_bias, backend="auto"):
    """Our one-dimensional scan."""
    return selective_scan(
        u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True, backend=backend
    )


def mamba_ssm(u, delta, A, B, C, D, delta_bias):
    """The scan of mamba-ssm."""
    interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    scan = interface.selective_scan_fn
    return scan(u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True)


def oflex(u, delta, A, B, C, D, delta_bias):
    """The forward of VMamba's extension, which takes 16-bit inputs and returns fp32."""
    extension = importlib.import_module("selective_scan_cuda_oflex")
    softplus, rows, fp32_output = True, 1, True
    return extension.fwd(u, delta, A, B, C, D, delta_bias, softplus, rows, fp32_output)[0]


def mambapy(u, delta, A, B, C, D, delta_bias):
    """The parallel scan of mamba.py, over decays and inputs stored for every state."""
    pscan = importlib.import_module("mambapy.pscan").pscan
    dt = F.softplus(delta.to(A.dtype) + delta_bias[:, None])
    dt = rearrange(dt, "b (k d) l -> b l k d 1", k=4)
    inputs = rearrange(u.to(A.dtype), "b (k d) l -> b l k d 1", k=4)
    B = rearrange(B.to(A.dtype), "b k n l -> b l k 1 n")
    C = rearrange(C.to(A.dtype), "b k n l -> b l k n 1")
    decays = torch.exp(dt * A.unflatten(0, (4, -1)))
    states = pscan(decays.flatten(2, 3), (dt * inputs * B).flatten(2, 3))
    y = rearrange(states.unflatten(2, (4, -1)) @ C, "b l k d 1 -> b (k d) l")
    return y if D is None else y + D[:, None] * u


def ref_style(u, delta, A, B, C, D, delta_bias):
    """The scheme of mamba-ssm's `selective_scan_ref`, which runs where its kernels do not.

    Decays and inputs of all states exist at once as `[B, D, L, N]`, B and C are repeated for every
    channel, and a Python loop over positions forms one output at a time.  One thing is kinder here:
    the original indexes the tensors in every step, and the gradient of each such index is a tensor
    of the full size, which makes its backward quadratic in L.  `unbind` has one gradient for all.
    """
    per_group = A.shape[0] // B.shape[1]
    B, C = (x.to(A.dtype).repeat_interleave(per_group, dim=1) for x in (B, C))
    dt, u = F.softplus(delta.to(A.dtype) + delta_bias[:, None]), u.to(A.dtype)
    decays = torch.exp(torch.einsum("bdl,dn->bdln", dt, A))
    inputs = torch.einsum("bdl,bdnl,bdl->bdln", dt, B, u)
    state = torch.zeros_like(inputs[:, :, 0])
    ys = []
    for decay, step, c in zip(decays.unbind(2), inputs.unbind(2), C.unbind(3), strict=True):
        state = decay * state + step
        ys.append(torch.einsum("bdn,bdn->bd", state, c))
    y = torch.stack(ys, dim=2)
    return y if D is None else y + D[:, None] * u


BASELINES: dict[str, Scan1d] = {
    "mamba_ssm": mamba_ssm,
    "selective_scan_cuda_oflex": oflex,
    "mambapy": mambapy,
    "ref-style": ref_style,
    "vmamba-pipeline": ours,
}
CUDA_ONLY = ("mamba_ssm", "selective_scan_cuda_oflex")  # and at most 32 bits
FORWARD_ONLY = "selective_scan_cuda_oflex"


# ---------------------------------------------------------------- candidates


class UnavailableError(Exception):
    """What was asked for cannot run here; the message says why."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute the four-direction scan.

    Attributes:
        name: as in the table.
        scan: takes the arguments of `selective_scan_2d` by name.
        reference: the literal recurrence that rounds where the scan may round, for the check.
        allowance: factor on the bound of the check.
        differentiable: whether it has a backward.
        within: makes what has to surround every call of it, and of its backward.
    """

    name: str
    scan: Scan2d
    reference: testing.Scan = "reference"
    allowance: float = 1
    differentiable: bool = True
    within: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext


def find_candidate(name: str, settings: Settings) -> Candidate:
    """Return the backend or baseline of that name.

    Raises:
        UnavailableError: it cannot run here.
    """
    if name in CUDA_ONLY and (settings.device.type != "cuda" or settings.dtype == torch.float64):
        raise UnavailableError("it takes CUDA tensors of 16 or 32 bits only")
    if name in BACKENDS:
        candidate = Candidate(name, functools.partial(selective_scan_2d, backend=name))
    else:
        candidate = Candidate(
            name,
            through_copies(BASELINES[name]),
            through_copies(functools.partial(ours, backend="reference")),
            BASELINE_ALLOWANCE,
            differentiable=name != FORWARD_ONLY,
        )
    try:
        with torch.no_grad():
            candidate.scan(**draw_arguments(Shape(1, 1, 1, 1, 1, 1), settings))
    except BackendUnavailableError as error:
        raise UnavailableError(str(error)) from error
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        raise UnavailableError(f"it cannot be imported ({error})") from error
    return candidate


def default_names(device: torch.device) -> tuple[str, ...]:
    """Return what is measured unless something is asked for."""
    if device.type == "cpu":
        return ("reference", "chunked")
    # Not position by position: on these maps that takes minutes, and in backward all of the memory.
    # `chunked` is hundreds of launches there.
    left_out = ("reference", "ref-style", "chunked")
    return tuple(name for name in (*BACKENDS, *BASELINES) if name not in left_out)


def find_candidates(asked: list[str] | None, settings: Settings) -> list[Candidate]:
    """Return what is to be measured; a default that cannot run is named and left out.

    Raises:
        UnavailableError: what was asked for by name cannot run.
    """
    candidates = []
    for name in dict.fromkeys(asked or default_names(settings.device)):
        try:
            candidates.append(find_candidate(name, settings))
        except UnavailableError as error:
            if asked:
                raise UnavailableError(f"--backends: {name} cannot run: {error}") from error
            print(f"{name} is left out: {error}")
    return candidates


# ---------------------------------------------------------------- arguments and the check


def draw_arguments(shape: Shape, settings: Settings, *, skip: bool = True) -> testing.Arguments:
    """Draw arguments of `selective_scan_2d` on the device, always the same."""
    b, h, w, d, n, r = (getattr(shape, f.name) for f in fields(shape))
    drawn = testing.scan_2d_arguments(
        batch=b, height=h, width=w, channels=d, n=n, rank=r, skip=skip, dtype=settings.dtype
    )
    return testing.require_gradients(
        {name: None if x is None else x.to(settings.device) for name, x in drawn.items()}
    )


@dataclass(frozen=True)
class Outcome:
    """Result of trying a candidate.

    Attributes:
        status: "ok", "failed", "cannot run", "out of memory" or "forward only".
        reason: in one line, where there is more to say.
    """

    status: str = "ok"
    reason: str = ""


OK = Outcome()


def outcome_of(error: Exception) -> Outcome:
    """Return what an exception out of a candidate, or out of its check, means."""
    # On the CPU torch reports exhausted memory by a plain RuntimeError.
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return Outcome("out of memory")
    message = str(error).partition("\n")[0]
    if isinstance(error, BackendUnavailableError):  # with so many states, say
        return Outcome("cannot run", message)
    if isinstance(error, AssertionError):  # of the accuracy rule
        return Outcome("failed", message)
    return Outcome("failed", f"{type(error).__name__}: {message}")


def check_correctness(candidate: Candidate, shape: Shape, settings: Settings) -> Outcome:
    """Return whether a candidate is right, by the rule at the end of `NOTES`.

    Of the shape, only channels, states and rank count.
    """
    small = Shape(*settings.checked_map, *shape.kind)
    gradients = settings.modes != (FORWARD,) and candidate.differentiable
    try:
        for skip in (True, False):  # without, as the skip connection hides errors of the recurrence
            arguments = testing.guarded(draw_arguments(small, settings, skip=skip))
            with candidate.within(), testing.poisoned():
                rule = testing.accuracy(
                    candidate.scan, arguments, candidate.reference, gradients=gradients
                )
            rule.allowance = candidate.allowance
            rule.check()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the candidate's
        return outcome_of(error)
    return OK


# ---------------------------------------------------------------- measuring


class CpuMeter:
    """Wall-clock time; peak memory of the process, on Linux."""

    warm_ups = 1  # what compiles on its first call needs more memory in it

    def seconds(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        return peak_beyond(call)


class CudaMeter:
    """Time between two events on the device, from a cold L2 cache; peak memory of the allocator."""

    warm_ups = 2
    # While the buffer is written so often, for some 1.2 ms on an H200 by its bandwidth, the host
    # queues the kernels of the call: it is they that are timed, and not their launches. Forward and
    # backward take the host about 1 ms; of a call that takes it longer, the launches show.
    flushes = 24

    def __init__(self, device: torch.device) -> None:
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.buffer = torch.empty(max(4 * l2_bytes, 2**26), dtype=torch.uint8, device=device)

    def seconds(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self.flushes):
            self.buffer.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before


Meter = CpuMeter | CudaMeter


def meter_for(device: torch.device) -> Meter:
    return CpuMeter() if device.type == "cpu" else CudaMeter(device)


@dataclass
class Measurement:
    """Seconds of each repeat of one candidate in one mode, and the bytes it took."""

    candidate: Candidate
    outcome: Outcome = OK
    times: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Within the block the candidate may be called; an exception becomes the outcome."""
        try:
            with self.candidate.within():
                yield
        except Exception as error:  # noqa: BLE001 - the other candidates go on
            self.outcome = outcome_of(error)

    def figures(self) -> dict[str, Any]:
        """Return status and the columns that every table has; without figures where it failed."""
        row: dict[str, Any] = asdict(self.outcome)
        row |= {"repeats": 0, "median_ms": None, "iqr_ms": None, "peak_mib": None}
        if self.outcome == OK:
            low, median, high = (float(q) * 1e3 for q in np.percentile(self.times, (25, 50, 75)))
            row |= {"repeats": len(self.times), "median_ms": median, "iqr_ms": high - low}
            row["peak_mib"] = None if self.peak_bytes is None else self.peak_bytes / 2**20
        return row


def prepare(scan: Scan2d, arguments: testing.Arguments, mode: str) -> Callable[[], object]:
    """Return the call to be timed; for the backward, the forward has run by then."""
    inputs = [x for x in arguments.values() if x is not None]

    def forward() -> Tensor:
        with torch.no_grad():
            return scan(**arguments)

    if mode == FORWARD:
        return forward
    grad_y = torch.randn_like(arguments["x"], requires_grad=False)  # y has this shape and type

    def differentiate(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, inputs, grad_y)

    if mode == BACKWARD:
        return functools.partial(differentiate, scan(**arguments))
    return lambda: differentiate(scan(**arguments))


def measure(
    candidates: list[Candidate],
    outcomes: dict[str, Outcome],
    arguments: testing.Arguments,
    mode: str,
    settings: Settings,
    meter: Meter,
) -> list[Measurement]:
    """Return a measurement of each candidate; those that are right take turns.

    Args:
        outcomes: of each candidate at the check.
    """
    results = [Measurement(candidate, outcomes[candidate.name]) for candidate in candidates]
    for result in results:
        candidate = result.candidate
        if result.outcome != OK:
            continue
        if mode != FORWARD and not candidate.differentiable:
            result.outcome = Outcome("forward only")
            continue
        with result.attempt():
            for _ in range(meter.warm_ups):
                prepare(candidate.scan, arguments, mode)()
            result.peak_bytes = meter.peak_bytes(prepare(candidate.scan, arguments, mode))
    while turn := [r for r in results if r.outcome == OK and not settings.enough(r.times)]:
        for result in turn:
            with result.attempt():
                call = prepare(result.candidate.scan, arguments, mode)
                result.times.append(meter.seconds(call))
    return results


# ---------------------------------------------------------------- results


Row = dict[str, Any]  # of strings and figures, as JSON has them


def to_row(case: Case, mode: str, result: Measurement, settings: Settings, gpu: Gpu | None) -> Row:
    """Return a measurement as a row, with the figures that follow from it; `NOTES` defines them."""
    shape, itemsize = case.shape, settings.dtype.itemsize
    row = {
        "label": case.label,
        "shape": str(shape),
        "dtype": settings.dtype_name,
        "backend": result.candidate.name,
        "mode": mode,
        **result.figures(),
        **dict.fromkeys(("gb_per_s", "gexp_per_s", "ns_per_elt", "floor_ms", "of_floor")),
    }
    if result.outcome != OK:
        return row
    seconds = row["median_ms"] / 1e3
    passes = 2 if mode == BOTH else 1  # the backward recomputes the states
    row["gb_per_s"] = minimum_bytes(shape, mode, itemsize) / seconds / 1e9
    row["gexp_per_s"] = passes * shape.elts / seconds / 1e9
    row["ns_per_elt"] = seconds * 1e9 / shape.elts
    if gpu is not None and settings.dtype != torch.float64:  # the model counts fp32 units
        floor = floor_seconds(shape, mode, itemsize, gpu)
        row |= {"floor_ms": floor * 1e3, "of_floor": floor / seconds}
    return row


COLUMNS = {
    "median_ms": "ms",
    "iqr_ms": "IQR",
    "gb_per_s": "GB/s",
    "gexp_per_s": "Gexp/s",
    "ns_per_elt": "ns/elt",
    "of_floor": "of floor",
    "peak_mib": "MiB",
    "repeats": "repeats",
}
NAME_WIDTH = max(map(len, (*BACKENDS, *BASELINES))) + 2
HEADING = f"{'backend':<{NAME_WIDTH}}{'mode':<8}" + "".join(f"{c:>10}" for c in COLUMNS.values())


def as_text(value: float | None) -> str:
    """Format a figure with four digits, but at most six after the point."""
    if value is None:
        return "-"
    if not value or isinstance(value, int):
        return str(int(value))
    return f"{value:.{min(6, max(0, 3 - math.floor(math.log10(abs(value)))))}f}"


def table_line(row: Row) -> str:
    """Format a row, aligned with `HEADING`."""
    line = f"{row['backend']:<{NAME_WIDTH}}{row['mode']:<8}"
    return line + (why_not(row) or "".join(f"{as_text(row[name]):>10}" for name in COLUMNS))


def why_not(row: Row) -> str:
    """Say why a row has no figures; empty where it has."""
    reason = f": {row['reason']}" if row["reason"] else ""
    return "" if row["status"] == "ok" else f"  {row['status']}{reason}"


def device_name(device: torch.device) -> str:
    return processor() if device.type == "cpu" else torch.cuda.get_device_name(device)


MEASURED_WITH = ("cmamba-ref", "torch", "triton", "numpy", "mamba-ssm", "mambapy", "selective-scan")


# ---------------------------------------------------------------- command line


def positive(text: str) -> float:
    """Read a number above 0, for argparse."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def count(text: str) -> int:
    """Read a whole number above 0, for argparse."""
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text}")
    return int(text)


def output(text: str) -> Path:
    """Read a path that can be written to, for argparse."""
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in an existing directory, got {text!r}")
    return path


def measuring_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that `settings_of` and `cases_of` read."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="shapes; default: short on CUDA, quick on the CPU")
    add(
        "--shape",
        type=Shape.parse,
        action="append",
        default=[],
        metavar="BxHxWxDxNxR",
        help="batch, height, width, channels, states and rank of dt; may be repeated",
    )
    add("--mode", nargs="+", choices=MODES, default=MODES, help="default: all three")
    add("--dtype", choices=DTYPES, default="fp32", help="of map and projections (default: fp32)")
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    add("--device", choices=devices, default=devices[-1], help=f"default: {devices[-1]}")
    add("--repeats", type=count, default=20, help="of each, at most (default: 20)")
    enough = f"measured time after which {MIN_REPEATS} repeats are enough (default: 0.5)"
    add("--seconds", type=positive, default=0.5, help=enough)
    add("--json", type=output, help="write rows and provenance here")
    return parser


def settings_of(args: argparse.Namespace) -> Settings:
    modes = tuple(dict.fromkeys(args.mode))
    device = torch.device(args.device)
    return Settings(device, args.dtype, modes, args.repeats, args.seconds)


def cases_of(args: argparse.Namespace) -> list[Case]:
    cases = [Case("custom", shape) for shape in args.shape]
    if args.preset or not cases:
        cases += PRESETS[args.preset or ("quick" if args.device == "cpu" else "short")]
    return cases


def profile_cases(
    cases: list[Case], candidates: list[Candidate], settings: Settings, gpu: Gpu | None
) -> Iterator[Row]:
    """Measure everything and print it; yields rows as results come in."""
    meter = meter_for(settings.device)
    checked: dict[tuple[int, int, int], dict[str, Outcome]] = {}
    for case in cases:
        shape = case.shape
        print(f"\n{case.label}: {shape}", flush=True)
        if shape.kind not in checked:
            checked[shape.kind] = {
                c.name: check_correctness(c, shape, settings) for c in candidates
            }
        arguments = draw_arguments(shape, settings)
        for mode in settings.modes:
            for result in measure(
                candidates, checked[shape.kind], arguments, mode, settings, meter
            ):
                row = to_row(case, mode, result, settings, gpu)
                print(table_line(row), flush=True)
                yield row


def collect(
    results: Iterator[Row],
    tool: str,
    args: argparse.Namespace,
    argv: list[str],
    notes: Iterable[str],
    **more: object,
) -> int:
    """Take rows as they come, write them and the notes; return the exit status.

    Also when Ctrl-C or an error ends the measurement, the rows are written as JSON, and with them
    under `meta` what they were measured with, and `more`.
    """
    rows: list[Row] = []
    interrupted = False
    try:
        for row in results:
            rows.append(row)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted", file=sys.stderr)
    finally:
        if args.json:
            meta = {
                **of_run(tool, argv),
                "device": device_name(torch.device(args.device)),
                "cuda": torch.version.cuda,
                "versions": versions(*MEASURED_WITH),
                "notes": notes,
                **more,
            }
            report = {"meta": meta, "results": rows}
            write_atomically(args.json, (json.dumps(report, indent=1) + "\n").encode())
    print()
    for note in notes:
        print(textwrap.fill(note, 100, subsequent_indent="    "))
    return 130 if interrupted else int(any(row["status"] == "failed" for row in rows))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser, names = measuring_parser(__doc__), (*BACKENDS, *BASELINES)
    default = "on CUDA triton and baselines, on the CPU reference and chunked"
    chosen = f"of {', '.join(names)} (default: {default})"
    parser.add_argument("--backends", nargs="+", choices=names, metavar="NAME", help=chosen)
    args = parser.parse_args(argv)
    settings = settings_of(args)
    try:
        candidates = find_candidates(args.backends, settings)
    except UnavailableError as error:
        parser.error(str(error))
    gpu = gpu_model(settings.device)
    print(f"{device_name(settings.device)}, {args.dtype}; shapes are BxHxWxDxNxR\n\n{HEADING}")
    rows = profile_cases(cases_of(args), candidates, settings, gpu)
    model = None if gpu is None else asdict(gpu)
    return collect(rows, "profile_scan.py", args, argv, NOTES, floor_model=model)


if __name__ == "__main__":
    sys.exit(main())

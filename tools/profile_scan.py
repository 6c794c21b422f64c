"""Speed of the four-direction scan: our backends and peers, on the same work, in the same run.

    python tools/profile_scan.py
    python tools/profile_scan.py --preset kodak --mode forward --json scan.json
    python tools/profile_scan.py --shape 1x128x128x192x16x6 --backends chunked vmamba-pipeline

Nothing is timed before it has been found correct: on two maps of 12x10 with the same channels,
states, rank and type, output and gradients are held against the reference in fp64.  What fails is
reported and not timed, and the exit status is 1.  Then the candidates take turns, one repeat each,
so that a drift of the machine hits all alike.

Our backends run through `selective_scan_2d`.  Peers know only one-dimensional scans; they run as
VMamba runs them, on four copies of the map:

    mamba_ssm                   selective_scan_fn of the package mamba-ssm
    selective_scan_cuda_oflex   VMamba's extension; forward only
    mambapy                     pscan of mamba.py, which stores every state
    ref-style                   position by position over stored decays and inputs of every state:
                                the scheme of mamba-ssm's selective_scan_ref, nothing to install
    vmamba-pipeline             our own one-dimensional scan: what the copies cost

How good the fixed rules of the Triton kernels are is measured by tune_scan.py, in the same way.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import importlib
import importlib.metadata
import io
import json
import math
import platform
import re
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from provenance import of_run, processor
from resident import peak_beyond
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

import cmamba_ref
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.config import CONFIGS
from cmamba_ref.errors import BackendUnavailableError
from cmamba_ref.model import MULTIPLE
from cmamba_ref.ops import selective_scan, selective_scan_2d
from cmamba_ref.ops.dispatch import BACKENDS
from cmamba_ref.testing import AccuracyRule

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
FORWARD, BACKWARD, BOTH = MODES = ("forward", "backward", "both")
# Forward and backward each decay every state once; the backward recomputes the states.
PASSES = {FORWARD: 1, BACKWARD: 1, BOTH: 2}

GATE_MAP = (2, 12, 10)  # batch, height, width
PEER_ALLOWANCE = 8
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
    "gate: max|K-O| <= 2 (max|R-O| + eps max|O|) with O the fp64 reference, R the reference in the "
    f"same type, K the candidate; for peers {PEER_ALLOWANCE} times that, and R rounds the time "
    "steps to that type, as they do",
)


# ---------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        dtype_name: of `DTYPES`, of map and projections.
        modes: of `MODES`.
        repeats: at most so many of each candidate.
        seconds: of measured time, after which `MIN_REPEATS` are enough.
    """

    device: torch.device
    dtype_name: str
    modes: tuple[str, ...]
    repeats: int
    seconds: float

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    def enough(self, times: list[float]) -> bool:
        """Whether no further repeat is wanted after these, in seconds."""
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
        """The shape written as BxHxWxDxNxR, for argparse."""
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


@dataclass(frozen=True)
class Case:
    """A shape and where it comes from."""

    label: str
    shape: Shape


def model_cases(width: int, height: int) -> list[Case]:
    """Every scan of the configured models on one picture; g_s has the shapes of g_a."""
    rows, columns = (-(-side // MULTIPLE) * MULTIPLE for side in (height, width))
    cases = []
    for config in CONFIGS.values():
        literal_width = 2 * max(config.slice_widths)
        places = [
            (f"stage {stage}", channels, stage)  # stage s lies at H / 2^s
            for stage, channels in enumerate(config.widths, start=1)
            if config.stages_with_scan[stage - 1] and config.depths[stage - 1]
        ]
        places.append(("context", config.cae_width or literal_width, 4))
        for place, channels, halvings in places:
            shape = Shape(
                batch=1,
                height=rows >> halvings,
                width=columns >> halvings,
                channels=round(config.ssm_ratio * channels),
                states=config.d_state,
                rank=math.ceil(channels / 16),
            )
            cases.append(Case(f"{config.name} {place}", shape))
    return cases


def kernel_cases() -> list[Case]:
    """Fixed shapes to compare kernels by: a large map, a batch, and narrow and wide channels."""
    return [
        # R = D / 32, as in a model with twice as many channels inside the scan as outside.
        Case("kernels", Shape(batch, height, width, channels, states, channels // 32))
        for batch, height, width, channels in (
            (1, 128, 128, 192),
            (8, 128, 128, 192),
            (1, 256, 384, 128),
            (1, 256, 384, 384),
        )
        for states in (1, 4, 8, 16)
    ]


def short_cases() -> list[Case]:
    """Three of `kernel_cases`, for a minute on a GPU: one image, a batch, and few states."""
    shapes = ((1, 16), (8, 16), (8, 1))
    return [Case("short", Shape(batch, 128, 128, 192, states, 6)) for batch, states in shapes]


def quick_cases() -> list[Case]:
    """Maps so small that the reference, position by position, takes a fraction of a second."""
    return [Case("quick", Shape(1, 24, 16, 64, 16, 4)), Case("quick", Shape(2, 16, 16, 96, 2, 6))]


PRESETS: dict[str, Callable[[], list[Case]]] = {
    "short": short_cases,
    "kernels": kernel_cases,
    "256": functools.partial(model_cases, 256, 256),
    "kodak": functools.partial(model_cases, 768, 512),
    "2k": functools.partial(model_cases, 2048, 1080),
    "quick": quick_cases,
}


# ---------------------------------------------------------------- the least work, and the floor


@dataclass(frozen=True)
class Gpu:
    """What the floor depends on.

    Attributes:
        bandwidth: of the memory, in bytes per second.
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


# Sustained bandwidth in bytes per second and clock in Hz, by name. Assumed: nine tenths of the data
# sheet's 4.8, 3.35 and 2.0 TB/s, and the clock that docs/kernels.md's predictions take; a card that
# runs faster may come below its floor.
KNOWN_GPUS = {
    "NVIDIA H200": (4.3e12, 1.755e9),
    "NVIDIA H100 80GB HBM3": (3.0e12, 1.755e9),
    "NVIDIA H100 PCIe": (1.8e12, 1.755e9),
}
# By compute capability, from the CUDA programming guide.
FP32_LANES = {(7, 5): 64, (8, 0): 64, (8, 6): 128, (8, 9): 128, (9, 0): 128}


def gpu_model(device: torch.device) -> Gpu | None:
    """The model of a device; None where there is none."""
    if device.type != "cuda" or torch.version.hip:  # AMD's versions are no compute capabilities
        return None
    properties = torch.cuda.get_device_properties(device)
    if properties.name in KNOWN_GPUS:
        bandwidth, clock = KNOWN_GPUS[properties.name]
        return Gpu(bandwidth, properties.multi_processor_count, clock)
    lanes = FP32_LANES.get((properties.major, properties.minor))
    # In kHz and bits; absent from some versions of torch, and 0 where the driver does not tell.
    clock, memory_clock, bus = (
        getattr(properties, name, 0)
        for name in ("clock_rate", "memory_clock_rate", "memory_bus_width")
    )
    if not (lanes and clock and memory_clock and bus):
        return None
    return Gpu(
        bandwidth=2 * memory_clock * 1e3 * bus / 8,  # two transfers per clock
        sms=properties.multi_processor_count,
        clock=clock * 1e3,
        fp32_lanes=lanes,
    )


def minimum_bytes(shape: Shape, mode: str, itemsize: int) -> int:
    """Bytes that have to be read or written in a mode, parameters left out."""
    elements = {
        FORWARD: 2 * shape.elements + shape.projections,  # x, y; proj
        BACKWARD: 3 * shape.elements + 2 * shape.projections,  # x, dy, dx; proj, dproj
    }
    elements[BOTH] = elements[FORWARD] + elements[BACKWARD]
    return elements[mode] * itemsize


def floor_seconds(shape: Shape, mode: str, itemsize: int, gpu: Gpu) -> float:
    """Time in which no kernel of this kind can do better: one pass, dt formed in the kernel.

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


# ---------------------------------------------------------------- candidates

Scan2d = Callable[..., Tensor]  # takes the tensors of `selective_scan_2d` by name
# u, delta [B, 4D, L], A [4D, N], B, C [B, 4, N, L], D [4D] or None, delta_bias [4D] to y [B, 4D, L]
Scan1d = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor], Tensor]


class UnavailableError(Exception):
    """What was asked for cannot run here; the message says why."""


def along(direction: int, maps: Tensor) -> Tensor:
    """Maps `[B, C, H, W]` as sequences `[B, C, L]`, in the order of one direction."""
    sequences = (maps.mT if direction % 2 else maps).flatten(2)
    return sequences.flip(-1) if direction >= 2 else sequences


def through_copies(scan: Scan1d) -> Scan2d:
    """The four-direction scan as VMamba computes it: copy the map four times, scan, merge.

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


def our_scan(backend: str) -> Scan1d:
    """Our one-dimensional scan."""

    def scan(u, delta, A, B, C, D, delta_bias):
        return selective_scan(
            u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True, backend=backend
        )

    return scan


def load_mamba_ssm() -> Scan1d:
    """The scan of mamba-ssm."""
    interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")

    def scan(u, delta, A, B, C, D, delta_bias):
        return interface.selective_scan_fn(
            u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True
        )

    return scan


def load_oflex() -> Scan1d:
    """The forward of VMamba's extension, which takes 16-bit inputs and returns fp32."""
    extension = importlib.import_module("selective_scan_cuda_oflex")

    def scan(u, delta, A, B, C, D, delta_bias):
        softplus, rows, fp32_output = True, 1, True
        return extension.fwd(u, delta, A, B, C, D, delta_bias, softplus, rows, fp32_output)[0]

    return scan


def load_mambapy() -> Scan1d:
    """The parallel scan of mamba.py, over decays and inputs stored for every state."""
    pscan = importlib.import_module("mambapy.pscan").pscan

    def scan(u, delta, A, B, C, D, delta_bias):
        dt = F.softplus(delta.to(A.dtype) + delta_bias[:, None])
        dt = rearrange(dt, "b (k d) l -> b l k d 1", k=4)
        inputs = rearrange(u.to(A.dtype), "b (k d) l -> b l k d 1", k=4)
        B = rearrange(B.to(A.dtype), "b k n l -> b l k 1 n")
        C = rearrange(C.to(A.dtype), "b k n l -> b l k n 1")
        decays = torch.exp(dt * A.unflatten(0, (4, -1)))
        states = pscan(decays.flatten(2, 3), (dt * inputs * B).flatten(2, 3))
        y = rearrange(states.unflatten(2, (4, -1)) @ C, "b l k d 1 -> b (k d) l")
        return y if D is None else y + D[:, None] * u

    return scan


def load_ref_style() -> Scan1d:
    """The scheme of mamba-ssm's `selective_scan_ref`, which runs wherever its kernels do not.

    Decays and inputs of all states exist at once as `[B, D, L, N]`, B and C are repeated for every
    channel, and a Python loop over positions forms one output at a time.  One thing is kinder here:
    the original indexes the tensors in every step, and the gradient of each such index is a tensor
    of the full size, which makes its backward quadratic in L.  `unbind` has one gradient for all.
    """

    def scan(u, delta, A, B, C, D, delta_bias):
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

    return scan


@dataclass(frozen=True)
class Peer:
    """How to get a one-dimensional scan, and what it can do.

    Attributes:
        load: imports it.
        cuda_only: takes CUDA tensors of at most 32 bits only.
        differentiable: whether it has a backward.
    """

    load: Callable[[], Scan1d]
    cuda_only: bool = False
    differentiable: bool = True


PEERS = {
    "mamba_ssm": Peer(load_mamba_ssm, cuda_only=True),
    "selective_scan_cuda_oflex": Peer(load_oflex, cuda_only=True, differentiable=False),
    "mambapy": Peer(load_mambapy),
    "ref-style": Peer(load_ref_style),
    "vmamba-pipeline": Peer(functools.partial(our_scan, "auto")),
}


REFERENCE = functools.partial(selective_scan_2d, backend="reference")
REFERENCE_OF_PEERS = through_copies(our_scan("reference"))


@dataclass(frozen=True)
class Candidate:
    """One way to compute the four-direction scan.

    Attributes:
        name: as in the table.
        scan: takes the tensors of `selective_scan_2d` by name.
        reference: the literal recurrence that rounds where the scan may round: R of the gate.
        allowance: factor on the bound of the gate.
        differentiable: whether it has a backward.
        within: makes what has to surround every call of it, and of its backward.
    """

    name: str
    scan: Scan2d
    reference: Scan2d = REFERENCE
    allowance: float = 1
    differentiable: bool = True
    within: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext


def find_candidate(name: str, settings: Settings) -> Candidate:
    """The backend or peer of that name.

    Raises:
        UnavailableError: it cannot run here.
    """
    if name in BACKENDS:
        candidate = Candidate(name, functools.partial(selective_scan_2d, backend=name))
        try:
            candidate.scan(**draw_arguments(Shape(1, 1, 1, 1, 1, 1), settings))
        except BackendUnavailableError as error:
            raise UnavailableError(str(error)) from error
        return candidate
    peer = PEERS[name]
    if peer.cuda_only and (settings.device.type != "cuda" or settings.dtype == torch.float64):
        raise UnavailableError("it takes CUDA tensors of 16 or 32 bits only")
    try:
        scan = through_copies(peer.load())
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        raise UnavailableError(f"it cannot be imported ({error})") from error
    return Candidate(name, scan, REFERENCE_OF_PEERS, PEER_ALLOWANCE, peer.differentiable)


def default_names(device: torch.device) -> tuple[str, ...]:
    """What is measured unless something is asked for."""
    if device.type == "cpu":
        return ("reference", "chunked")
    # Not position by position: on these maps that takes minutes, and in backward all of the memory.
    # `chunked` is hundreds of launches there.
    left_out = ("reference", "ref-style", "chunked")
    return tuple(name for name in (*BACKENDS, *PEERS) if name not in left_out)


def find_candidates(asked: list[str] | None, settings: Settings) -> list[Candidate]:
    """What is to be measured; a default that cannot run is named and left out.

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


# ---------------------------------------------------------------- arguments and the gate


def draw_arguments(shape: Shape, settings: Settings, *, skip: bool = True) -> dict[str, Tensor]:
    """Random arguments of `selective_scan_2d` by name, always the same, that require gradients."""
    generator = torch.Generator(settings.device).manual_seed(0)
    dtype, parameter_dtype = settings.dtype, torch.promote_types(settings.dtype, torch.float32)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=settings.device)

    d, n, rank = shape.channels, shape.states, shape.rank
    # Small steps, where an inaccurate softplus shows.
    dt_bias = torch.rand((4, d), generator=generator, device=settings.device) * 7 - 9
    area = (shape.batch, shape.height, shape.width)
    arguments = {
        "x": normal(*area, d).to(dtype),
        "proj": normal(*area, 4, rank + 2 * n).to(dtype),
        "A": (-normal(4, d, n).abs() - 0.1).to(parameter_dtype),
        "dt_weight": (normal(4, d, rank) / rank**0.5).to(parameter_dtype),
        "dt_bias": dt_bias.to(parameter_dtype),
    }
    if skip:
        arguments["D"] = normal(4, d).to(parameter_dtype)
    return {name: value.requires_grad_() for name, value in arguments.items()}


def draw_gradient(y: Tensor) -> Tensor:
    """A gradient for an output, exact in bf16, so that it is the same in every precision."""
    generator = torch.Generator(y.device).manual_seed(1)
    gradient = torch.randn(y.shape, generator=generator, device=y.device)
    return gradient.to(torch.bfloat16).to(y.dtype)


def evaluate(scan: Scan2d, arguments: dict[str, Tensor], gradients: bool) -> dict[str, Tensor]:
    """The output and, if asked for, every gradient, by name."""
    if not gradients:
        with torch.no_grad():
            return {"y": scan(**arguments)}
    y = scan(**arguments)
    grads = torch.autograd.grad(y, list(arguments.values()), draw_gradient(y))
    named = {f"gradient of {name}": grad for name, grad in zip(arguments, grads, strict=True)}
    return {"y": y.detach(), **named}


@dataclass(frozen=True)
class Outcome:
    """What came of trying a candidate.

    Attributes:
        status: "ok", "failed", "cannot run", "out of memory" or "forward only".
        reason: in one line, where there is more to say.
    """

    status: str = "ok"
    reason: str = ""


OK = Outcome()


def outcome_of(error: Exception) -> Outcome:
    """What an exception out of a candidate means."""
    # On the CPU torch reports exhausted memory by a plain RuntimeError.
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return Outcome("out of memory")
    message = str(error).partition("\n")[0]
    if isinstance(error, BackendUnavailableError):  # with so many states, say
        return Outcome("cannot run", message)
    return Outcome("failed", f"{type(error).__name__}: {message}")


def check(
    candidate: Candidate,
    arguments: dict[str, Tensor],
    gradients: bool,
    wrong: Callable[[dict[str, Tensor]], str],
) -> Outcome:
    """Whether a candidate's results are right.

    Args:
        wrong: says what is wrong with the results, "" if nothing.
    """
    try:
        with candidate.within():
            results = evaluate(candidate.scan, arguments, gradients and candidate.differentiable)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the candidate's
        return outcome_of(error)
    reason = wrong(results)
    return Outcome("failed", reason) if reason else OK


def beyond_the_rule(
    rounded: dict[str, Tensor],
    oracle: dict[str, Tensor],
    allowance: float,
    results: dict[str, Tensor],
) -> str:
    """What of the results is further from the oracle than the accuracy rule allows."""
    rule = AccuracyRule(allowance)
    try:
        for name, result in results.items():
            rule.compare(name, result, rounded[name], oracle[name])
        rule.check()
    except AssertionError as error:
        return str(error)
    return ""


def pass_gate(candidates: list[Candidate], shape: Shape, settings: Settings) -> dict[str, Outcome]:
    """Which candidates are right, by the rule at the end of `NOTES`.

    Of the shape, only channels, states and rank count.
    """
    gradients = settings.modes != (FORWARD,)
    small = Shape(*GATE_MAP, shape.channels, shape.states, shape.rank)
    outcomes = {candidate.name: OK for candidate in candidates}
    for skip in (True, False):  # without, as the skip connection hides errors of the recurrence
        arguments = draw_arguments(small, settings, skip=skip)
        in_double = {k: x.detach().double().requires_grad_() for k, x in arguments.items()}
        oracle = evaluate(REFERENCE, in_double, gradients)
        rounded = {
            reference: evaluate(reference, arguments, gradients)
            for reference in {candidate.reference for candidate in candidates}
        }
        for candidate in candidates:
            if outcomes[candidate.name] == OK:
                wrong = functools.partial(
                    beyond_the_rule, rounded[candidate.reference], oracle, candidate.allowance
                )
                outcomes[candidate.name] = check(candidate, arguments, gradients, wrong)
    return outcomes


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

    times: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    outcome: Outcome = OK

    @contextlib.contextmanager
    def noting_failure(self) -> Iterator[None]:
        """What goes wrong inside becomes the outcome, so that the other candidates go on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - as at the gate
            self.outcome = outcome_of(error)


def prepare(
    scan: Scan2d, arguments: dict[str, Tensor], grad_y: Tensor, mode: str
) -> Callable[[], object]:
    """The call to be timed; for the backward, the forward has run when this returns."""

    def differentiate(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, list(arguments.values()), grad_y)

    def forward() -> Tensor:
        with torch.no_grad():
            return scan(**arguments)

    if mode == FORWARD:
        return forward
    if mode == BACKWARD:
        return functools.partial(differentiate, scan(**arguments))
    return lambda: differentiate(scan(**arguments))


def measure(
    candidates: list[Candidate], shape: Shape, mode: str, settings: Settings, meter: Meter
) -> dict[str, Measurement]:
    """A measurement of each candidate; they take turns."""
    arguments = draw_arguments(shape, settings)
    grad_y = draw_gradient(arguments["x"])  # the output is of the same shape and type
    measurements = {candidate.name: Measurement() for candidate in candidates}

    for candidate in candidates:
        measurement = measurements[candidate.name]
        with measurement.noting_failure(), candidate.within():
            for _ in range(meter.warm_ups):
                prepare(candidate.scan, arguments, grad_y, mode)()
            measurement.peak_bytes = meter.peak_bytes(
                prepare(candidate.scan, arguments, grad_y, mode)
            )
    waiting = candidates
    while waiting := [
        candidate
        for candidate in waiting
        if measurements[candidate.name].outcome == OK
        and not settings.enough(measurements[candidate.name].times)
    ]:
        for candidate in waiting:
            measurement = measurements[candidate.name]
            with measurement.noting_failure(), candidate.within():
                seconds = meter.seconds(prepare(candidate.scan, arguments, grad_y, mode))
                measurement.times.append(seconds)
    return measurements


def measure_sound(
    candidates: list[Candidate],
    outcomes: dict[str, Outcome],
    shape: Shape,
    mode: str,
    settings: Settings,
    meter: Meter,
) -> dict[str, Measurement]:
    """What came of each candidate; only those that are right are measured.

    Args:
        outcomes: of each candidate at the gate.
    """
    results = {name: Measurement(outcome=outcome) for name, outcome in outcomes.items()}
    able = []
    for candidate in candidates:
        if outcomes[candidate.name] != OK:
            continue
        if candidate.differentiable or mode == FORWARD:
            able.append(candidate)
        else:
            results[candidate.name].outcome = Outcome("forward only")
    try:
        results |= measure(able, shape, mode, settings, meter)
    except RuntimeError as error:  # even the arguments are too much
        for candidate in able:
            results[candidate.name].outcome = outcome_of(error)
    return results


# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class Row:
    """One candidate on one shape in one mode; `NOTES` defines the figures.

    Attributes:
        label: where the shape comes from.
        shape: BxHxWxDxNxR.
        status, reason: of the `Outcome`; there are figures only with "ok".
    """

    label: str
    shape: str
    dtype: str
    backend: str
    mode: str
    status: str
    reason: str = ""
    repeats: int = 0
    median_ms: float | None = None
    iqr_ms: float | None = None
    gb_per_s: float | None = None
    gexp_per_s: float | None = None
    ns_per_elt: float | None = None
    floor_ms: float | None = None
    of_floor: float | None = None
    peak_mib: float | None = None


def to_row(
    case: Case,
    candidate: Candidate,
    mode: str,
    measurement: Measurement,
    settings: Settings,
    gpu: Gpu | None,
) -> Row:
    """A measurement as a row, with the figures that follow from it."""
    row = Row(
        label=case.label,
        shape=str(case.shape),
        dtype=settings.dtype_name,
        backend=candidate.name,
        mode=mode,
        **asdict(measurement.outcome),
    )
    if measurement.outcome != OK:
        return row
    low, median, high = (float(q) for q in np.percentile(measurement.times, (25, 50, 75)))
    itemsize = settings.dtype.itemsize
    # The model counts fp32 units, which are not what computes in fp64.
    floor = None
    if gpu is not None and settings.dtype != torch.float64:
        floor = floor_seconds(case.shape, mode, itemsize, gpu)
    peak = measurement.peak_bytes
    return replace(
        row,
        repeats=len(measurement.times),
        median_ms=median * 1e3,
        iqr_ms=(high - low) * 1e3,
        gb_per_s=minimum_bytes(case.shape, mode, itemsize) / median / 1e9,
        gexp_per_s=PASSES[mode] * case.shape.elts / median / 1e9,
        ns_per_elt=median * 1e9 / case.shape.elts,
        floor_ms=None if floor is None else floor * 1e3,
        of_floor=None if floor is None else floor / median,
        peak_mib=None if peak is None else peak / 2**20,
    )


# Heading, width and attribute of each column of figures.
COLUMNS = (
    ("ms", 10, "median_ms"),
    ("IQR", 10, "iqr_ms"),
    ("GB/s", 10, "gb_per_s"),
    ("Gexp/s", 10, "gexp_per_s"),
    ("ns/elt", 10, "ns_per_elt"),
    ("of floor", 10, "of_floor"),
    ("MiB", 10, "peak_mib"),
    ("repeats", 8, "repeats"),
)
NAME_WIDTH = max(map(len, (*BACKENDS, *PEERS))) + 2
HEADING = f"{'backend':<{NAME_WIDTH}}{'mode':<8}" + "".join(
    f"{name:>{width}}" for name, width, _ in COLUMNS
)


def as_text(value: float | None) -> str:
    """A figure with four digits, but at most six after the point."""
    if value is None:
        return "-"
    if not value or isinstance(value, int):
        return str(int(value))
    return f"{value:.{min(6, max(0, 3 - math.floor(math.log10(abs(value)))))}f}"


def table_line(row: Row) -> str:
    """A row as text, aligned with `HEADING`."""
    line = f"{row.backend:<{NAME_WIDTH}}{row.mode:<8}"
    if row.status != "ok":
        return f"{line}  {row.status}{': ' if row.reason else ''}{row.reason}"
    return line + "".join(
        f"{as_text(getattr(row, attribute)):>{width}}" for _, width, attribute in COLUMNS
    )


def to_csv(rows: list[Row]) -> bytes:
    """One line per row, empty where there is no figure."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue().encode()


def provenance(tool: str, settings: Settings, command: list[str]) -> dict[str, object]:
    """What the numbers were measured with."""
    versions = {"cmamba-ref": cmamba_ref.__version__, "python": platform.python_version()}
    for package in ("torch", "triton", "numpy", "mamba-ssm", "mambapy", "selective-scan"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        **of_run(tool, command),
        "device": device_name(settings.device),
        "cuda": torch.version.cuda,
        "versions": versions,
    }


def device_name(device: torch.device) -> str:
    return processor() if device.type == "cpu" else torch.cuda.get_device_name(device)


def chrome_trace(candidates: list[Candidate], shape: Shape, settings: Settings) -> bytes:
    """Chrome trace of one forward and backward of each candidate, after a warm-up."""
    arguments = draw_arguments(shape, settings)
    activities = [ProfilerActivity.CPU]
    if settings.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for candidate in candidates:
        with candidate.within():
            evaluate(candidate.scan, arguments, candidate.differentiable)
    with profile(activities=activities) as profiler:
        for candidate in candidates:
            with candidate.within(), record_function(candidate.name):
                evaluate(candidate.scan, arguments, candidate.differentiable)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return path.read_bytes()


# ---------------------------------------------------------------- command line


def positive(text: str) -> float:
    """A number above 0, for argparse."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def count(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text}")
    return int(text)


def output(text: str) -> Path:
    """A path that can be written to, for argparse."""
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in an existing directory, got {text!r}")
    return path


def device_there(text: str) -> torch.device:
    """A device on which scans run, for argparse."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:INDEX, got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"must be there, got {text!r}; torch does not see it")
    return device


def add_measuring_options(parser: argparse.ArgumentParser) -> None:
    """Options that say what is measured and how; `settings_of` and `cases_of` read them."""
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
    best = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=device_there, default=best, help=f"default: {best}")
    add("--repeats", type=count, default=20, help="of each, at most (default: 20)")
    add(
        "--seconds",
        type=positive,
        default=0.5,
        help=f"measured time after which {MIN_REPEATS} repeats are enough (default: 0.5)",
    )
    add("--json", type=output, help="write rows and provenance here")


def settings_of(args: argparse.Namespace) -> Settings:
    modes = tuple(dict.fromkeys(args.mode))
    return Settings(args.device, args.dtype, modes, args.repeats, args.seconds)


def cases_of(args: argparse.Namespace) -> list[Case]:
    cases = [Case("custom", shape) for shape in args.shape]
    if args.preset or not cases:
        cases += PRESETS[args.preset or ("quick" if args.device.type == "cpu" else "short")]()
    return cases


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_measuring_options(parser)
    add = parser.add_argument
    names = (*BACKENDS, *PEERS)
    add(
        "--backends",
        nargs="+",
        choices=names,
        metavar="NAME",
        help=f"of {', '.join(names)} (default: on CUDA triton and peers, on the CPU "
        "reference and chunked)",
    )
    add("--threads", type=count, help="torch threads (default: torch's choice)")
    add("--csv", type=output, help="write the rows here")
    add("--trace", type=output, help="write a Chrome trace of the first shape here")
    return parser


def profile_cases(
    cases: list[Case],
    candidates: list[Candidate],
    settings: Settings,
    gpu: Gpu | None,
    rows: list[Row],
) -> None:
    """Measure everything, print it, and append to `rows` as results come in."""
    meter = meter_for(settings.device)
    outcomes: dict[tuple[int, int, int], dict[str, Outcome]] = {}
    with tqdm(total=len(cases) * len(settings.modes), disable=None) as progress:
        for case in cases:
            shape = case.shape
            tqdm.write(f"\n{case.label}: {shape}", file=sys.stdout)
            kind = (shape.channels, shape.states, shape.rank)
            if kind not in outcomes:
                outcomes[kind] = pass_gate(candidates, shape, settings)
            for mode in settings.modes:
                results = measure_sound(candidates, outcomes[kind], shape, mode, settings, meter)
                for candidate in candidates:
                    result = results[candidate.name]
                    rows.append(to_row(case, candidate, mode, result, settings, gpu))
                    tqdm.write(table_line(rows[-1]), file=sys.stdout)
                progress.update()


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    settings = settings_of(args)
    try:
        candidates = find_candidates(args.backends, settings)
    except UnavailableError as error:
        parser.error(str(error))
    cases = cases_of(args)
    gpu = gpu_model(settings.device)

    print(f"{device_name(settings.device)}, {args.dtype}; shapes are BxHxWxDxNxR\n\n{HEADING}")
    rows: list[Row] = []
    interrupted = False
    try:
        profile_cases(cases, candidates, settings, gpu, rows)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted", file=sys.stderr)
    finally:  # what was measured is kept, whatever ended it
        if args.csv:
            write_atomically(args.csv, to_csv(rows))
        if args.json:
            meta = provenance("profile_scan.py", settings, argv)
            meta["floor_model"] = None if gpu is None else asdict(gpu)
            meta["notes"] = NOTES
            report = {"meta": meta, "results": [asdict(row) for row in rows]}
            write_atomically(args.json, (json.dumps(report, indent=1) + "\n").encode())
    print()
    for note in NOTES:
        print(textwrap.fill(note, 100, subsequent_indent="    "))
    if interrupted:
        return 130
    if args.trace:
        shape = cases[0].shape
        ran = {row.backend for row in rows if row.shape == str(shape) and row.status == "ok"}
        sound = [candidate for candidate in candidates if candidate.name in ran]
        write_atomically(args.trace, chrome_trace(sound, shape, settings))
    return 1 if any(row.status == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

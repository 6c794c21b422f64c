"""Compile the Triton kernels ahead of time for GPUs that are absent; count and predict.

    python tools/compile_kernels.py                            model and benchmark, three targets
    python tools/compile_kernels.py --scans all --jobs 2 --json
    python tools/compile_kernels.py --targets sm_90 --markdown benchmarks/kernels_static.md

What is compiled is what is dispatched: the launch code of `cmamba_ref.kernels` runs on tensors
without memory while its kernels are replaced by recorders, and every variant that it asks for is
compiled with the types and options that it asked for.  No kernel runs, so nothing is measured.

The unit of all counts is the elt: one position, channel, state and direction.  The lanes of a warp
work on different elts, so that I instructions in a loop body of S steps come to
I / (S N BLOCK_D / 32) instructions per elt.  For gfx942 loops are not counted, only registers,
spills and shared memory.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import importlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from markdown_table import markdown_table
from profile_scan import (
    BOTH,
    DTYPES,
    FORWARD,
    Gpu,
    Shape,
    count,
    floor_seconds,
    model_cases,
    output,
)
from provenance import versions
from torch import Tensor

from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.nn.ss2d import DIRECTIONS

KERNELS = (
    "chunk_state_fwd",
    "state_passing",
    "chunk_scan_fwd",
    "chunk_state_bwd",
    "chunk_scan_bwd",
)
KERNEL_MODULES = ("cmamba_ref.kernels.chunk_scan_fwd", "cmamba_ref.kernels.chunk_scan_bwd")
TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# ---------------------------------------------------------------- the scans


@dataclass(frozen=True)
class MapScan:
    """A four-direction scan of `images` maps of `height` x `width` positions.

    Attributes:
        n: states N.
        rank: R, columns of dt_weight.
        channels: D.
        dtype: of x and the projections, a key of DTYPES.
    """

    n: int
    rank: int
    channels: int
    dtype: str = "fp32"
    images: int = 1
    height: int = 128
    width: int = 128

    @classmethod
    def of(cls, shape: Shape, dtype: str = "fp32", images: int = 1) -> MapScan:
        """Return the scan of one map of a shape, or of `images` such maps."""
        sizes = (images, shape.height, shape.width)
        return cls(shape.states, shape.rank, shape.channels, dtype, *sizes)

    @property
    def shape(self) -> Shape:
        sizes = (self.images, self.height, self.width, self.channels, self.n, self.rank)
        return Shape(*sizes)

    def to_launch(self, launch: ModuleType) -> Any:
        """Return the `launch.Scan` of this scan, on the meta device."""
        new, real = _allocators(self.dtype)
        position = (self.images, self.height, self.width)
        projections = new(*position, DIRECTIONS, self.rank + 2 * self.n)
        return launch.Scan(
            x=new(*position, self.channels),
            dt_or_proj=projections,
            B=projections,
            C=projections,
            z=None,
            A=real(DIRECTIONS, self.n, self.channels),
            dt_weight=real(DIRECTIONS, self.rank, self.channels),
            dt_bias=real(DIRECTIONS, self.channels),
            skip=real(self.channels),
            softplus=True,
            groups=1,
        )


@dataclass(frozen=True)
class SequenceScan:
    """A scan of `images` sequences of `length` positions whose delta is given.

    Attributes:
        n: states N.
        channels: D, of all groups together.
        groups: G, groups of channels that share B and C.
        dtype: of u, delta and what varies of B, C and the gate, a key of DTYPES.
        b_constant, c_constant: B or C is the same at all positions.
    """

    n: int
    channels: int
    dtype: str = "fp32"
    groups: int = 1
    gate: bool = False
    softplus: bool = True
    b_constant: bool = False
    c_constant: bool = False
    images: int = 1
    length: int = 4096

    def to_launch(self, launch: ModuleType) -> Any:
        """Return the `launch.Scan` of this scan, on the meta device."""
        new, real = _allocators(self.dtype)
        position = (self.images, 1, self.length)
        varying, constant = (*position, self.groups, self.n), (self.n, self.channels)
        return launch.Scan(
            x=new(*position, self.channels),
            dt_or_proj=new(*position, self.channels),
            B=real(*constant) if self.b_constant else new(*varying),
            C=real(*constant) if self.c_constant else new(*varying),
            z=new(*position, self.channels) if self.gate else None,
            A=real(1, self.n, self.channels),
            dt_weight=None,
            dt_bias=real(1, self.channels),
            skip=real(self.channels),
            softplus=self.softplus,
            groups=self.groups,
        )


Scan = MapScan | SequenceScan


def _allocators(dtype: str) -> list[functools.partial[Tensor]]:
    """Return makers of meta tensors of an I/O type and of the compute type that goes with it."""
    compute = torch.promote_types(DTYPES[dtype], torch.float32)
    return [
        functools.partial(torch.empty, dtype=d, device="meta") for d in (DTYPES[dtype], compute)
    ]


BENCHMARK_SCANS = [MapScan(n, 12, 192, images=b) for b in (1, 8) for n in (1, 4, 8, 16)]
MODEL_SCANS = [*BENCHMARK_SCANS, *(MapScan.of(case.shape) for case in model_cases(768, 512))]
# Every kernel; both kinds of scan; sizes that fill their power of two and sizes that do not.
QUICK_SCANS = [
    MapScan(16, 12, 192),
    MapScan(3, 20, 100, "bf16"),
    SequenceScan(8, 40, gate=True, softplus=False, c_constant=True),
]


def all_scans() -> list[Scan]:
    """Return scans of every type, flag and block of channels, and N and R of every kind.

    A kernel sees N and R as a power of two and a mask: 3, 12 and 20 are there for the masks.
    """
    flags = list(itertools.product((False, True), repeat=4))
    return [
        *itertools.starmap(MapScan, itertools.product((1, 3, 8, 16, 32), (1, 12), (128, 40, 20))),
        *(
            MapScan(n, r, 100, dtype)
            for n, r, dtype in itertools.product((2, 12, 32), (8, 20, 64), ("fp32", "bf16", "fp64"))
        ),
        *(
            SequenceScan(n, 100, dtype, 1, *flag)
            for n, dtype, flag in itertools.product((2, 8, 32), ("fp32", "bf16", "fp64"), flags)
        ),
        *(SequenceScan(n, d) for n in (4, 16) for d in (128, 64, 32, 40, 20)),
        *MODEL_SCANS,
        *QUICK_SCANS,
    ]


SCANS = {"model": lambda: MODEL_SCANS, "quick": lambda: QUICK_SCANS, "all": all_scans}


# ---------------------------------------------------------------- what a scan dispatches


@dataclass(frozen=True)
class Variant:
    """A kernel as the compiler sees it.

    Attributes:
        types: triton's type of each argument that is no constant, pointers as `*fp32`. Nothing is
            known of an integer but its width, and of a pointer that it is a multiple of 16 bytes.
        constants: the compile-time arguments.
        options: of the compiler.
    """

    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int], ...]
    options: tuple[tuple[str, Any], ...]

    def constant(self, name: str) -> int:
        """The value of a constant; 0 where the kernel has none of this name."""
        return dict(self.constants).get(name, 0)

    def type_of(self, name: str) -> str:
        """The type that a pointer points to; empty where the kernel has no such argument."""
        return dict(self.types).get(name, "").removeprefix("*")

    @property
    def io(self) -> str:
        """Type of x or dy; of the carry, which has neither, the compute type."""
        return self.type_of("x_ptr") or self.type_of("dy_ptr") or self.real

    @property
    def real(self) -> str:
        """The compute type."""
        return self.type_of("A_ptr")

    @property
    def is_map(self) -> bool:
        return self.constant("RANK") > 0

    def __str__(self) -> str:
        constants = " ".join(f"{name}={int(value)}" for name, value in self.constants)
        return f"{self.kernel} {self.io} {constants}"


@dataclass(frozen=True)
class Launch:
    """One launch of a variant.

    Attributes:
        programs: size of the grid.
        tensors: of each pointer, what tells tensors apart and its size in bytes.
        integers: values of the run-time sizes.
    """

    variant: Variant
    programs: int
    tensors: dict[str, tuple[int, int]]
    integers: dict[str, int]

    @property
    def share(self) -> float:
        """Share of the directions that this launch does."""
        if "first_direction" not in self.integers:
            return 1.0
        directions = self.integers["directions"]
        return len(range(self.integers["first_direction"], directions, 2)) / directions

    @property
    def directions_per_program(self) -> int:
        """Directions that a program does one after the other."""
        if "first_direction" not in self.integers:
            return 1
        return round(self.share * self.integers["directions"])

    @property
    def steps(self) -> int:
        """Steps of the inner loop that all warps (programs) of the launch take together."""
        if self.variant.kernel == "state_passing":
            passes = math.ceil(self.integers["chunks"] / self.variant.constant("CHUNKS"))
            return self.programs * passes
        positions = self.integers["H"] * self.integers["W"]
        return self.programs // self.integers["chunks"] * positions * self.directions_per_program

    @property
    def elts(self) -> int:
        """(position, channel, state, direction) that the launch does; of the carry, chunks."""
        if self.variant.kernel == "state_passing":
            per_image = self.integers["blocks"]
            features = self.variant.constant("N") * self.integers["D"]
            return self.programs // per_image * self.integers["chunks"] * features
        per_step = self.integers["per_group"] * self.variant.constant("N")
        return self.steps // self.integers["blocks"] * per_step


@functools.cache
def _launch_module() -> ModuleType:
    """`cmamba_ref.kernels.launch`. Compiling needs that triton's interpreter was off before it."""
    return importlib.import_module("cmamba_ref.kernels.launch")


class _Recorder:
    """Stands where a kernel stood, and notes its launches."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.name = kernel.fn.__name__
        self.parameters = inspect.signature(kernel.fn).parameters
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]):
        return functools.partial(self._record, grid)

    def _record(self, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        options = {name: given.pop(name) for name in list(given) if name not in self.parameters}
        types, constants, tensors, integers = {}, {}, {}, {}
        for name, parameter in self.parameters.items():
            value = given[name]
            if "constexpr" in str(parameter.annotation):
                constants[name] = value
            elif isinstance(value, Tensor):
                types[name] = "*" + TYPE_NAMES[value.dtype]
                tensors[name] = (id(value), value.nbytes)
            else:
                types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                integers[name] = value
        variant = Variant(
            self.name, *(tuple(group.items()) for group in (types, constants, options))
        )
        self.launches.append(Launch(variant, math.prod(grid), tensors, integers))


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within the `with` block no kernel runs; what is launched is noted in the list."""
    launch = _launch_module()
    launches: list[Launch] = []
    kernels = {name: getattr(launch, name) for name in KERNELS}
    for name, kernel in kernels.items():
        setattr(launch, name, _Recorder(kernel, launches))
    try:
        yield launches
    finally:
        for name, kernel in kernels.items():
            setattr(launch, name, kernel)


def record(scan: Scan) -> list[Launch]:
    """What the forward and the backward of a scan launch, in order."""
    launch = _launch_module()
    prepared = scan.to_launch(launch)
    state = prepared.A.new_empty(scan.images, *prepared.A.shape)
    with recording() as launches:
        y, _, starts = launch.forward(prepared, state)
        launch.backward(prepared, starts, torch.empty_like(y), torch.empty_like(state))
    return launches


def variants(scans: Iterable[Scan]) -> list[Variant]:
    """What scans dispatch, each variant once, in the order of first use."""
    return list(dict.fromkeys(launch.variant for scan in scans for launch in record(scan)))


# ---------------------------------------------------------------- compiling


@dataclass(frozen=True)
class Target:
    """A machine to compile for, as triton names it."""

    backend: str
    arch: int | str
    lanes: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32),
    "sm_90": Target("cuda", 90, 32),
    "gfx942": Target("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Loop:
    """The body of a loop over positions.

    Attributes:
        steps: positions that one pass of the body does.
        instructions, exps, special: all; `MUFU.EX2`; all of the special function unit.
        wide_loads: from global memory, of 128 bits.
        local: loads from and stores to the stack: spilled registers.
    """

    steps: int
    instructions: int
    exps: int
    special: int
    wide_loads: int
    local: int


@dataclass(frozen=True)
class Report:
    """A compiled variant.

    Attributes:
        registers: per lane.
        stack: bytes per lane, spilled registers among them.
        spilled: vector registers that gfx942 spills; on cuda, instructions that use the stack.
        shared: bytes of shared memory.
        exps_in_ptx: exponentials of the whole kernel before ptxas unrolls loops; cuda only.
        loops: over positions, in the order of the code; of chunk_scan_bwd the sweep forward and
            the main loop, of the other kernels one.  Empty for gfx942.
    """

    variant: Variant
    target: str
    registers: int
    stack: int
    spilled: int
    shared: int
    exps_in_ptx: int
    loops: tuple[Loop, ...]

    def per_step(self, count: str) -> float:
        """Return a count of `Loop` per step of a warp, summed over the loops."""
        return sum(getattr(loop, count) / loop.steps for loop in self.loops)

    def per_elt(self, count: str) -> float:
        """Return a count of `Loop` per lane and elt; of the carry, per chunk and feature."""
        rows = self.variant.constant("CHUNKS" if self.variant.kernel == "state_passing" else "N")
        return self.per_step(count) * WARP / (rows * self.variant.constant("BLOCK_D"))

    @property
    def warps(self) -> int:
        """Warps, of one program each, that an SM of an H100 or H200 holds at a time.

        Each of its four parts has 16384 registers, and a warp takes multiples of 256.
        """
        per_warp = math.ceil(self.registers * WARP / 256) * 256
        return min(32, 4 * (16384 // per_warp))


WARP = 32


def compile_variant(variant: Variant, target: str) -> Report:
    """Compile a variant for a target and read its machine code.

    Raises:
        RuntimeError: it does not compile, or triton's interpreter is on.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError(
            "`TRITON_INTERPRET` must be unset to compile kernels, got "
            f"{os.environ['TRITON_INTERPRET']!r}; run in a process without it"
        )
    try:
        found = compiled(variant, TARGETS[target])
    except Exception as error:
        raise RuntimeError(f"{variant} does not compile for {target}: {error}") from error
    shared = found.metadata.shared
    if TARGETS[target].backend == "hip":
        keys = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
        used = [int(_search(rf"\.{key}:\s*(\d+)", found.asm["amdgcn"])[1]) for key in keys]
        return Report(variant, target, used[0], used[1], used[2], shared, 0, ())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        usage = _nvidia_tool("cuobjdump", "-res-usage", file.name)
        sass = _nvidia_tool("nvdisasm", "-c", file.name)
    registers, stack = map(int, _search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    spilled = len(re.findall(COUNTED["local"], sass))
    exps = len(re.findall(r"ex2\.approx", found.asm["ptx"]))
    loops = _step_loops(variant, sass)
    return Report(variant, target, registers, stack, spilled, shared, exps, loops)


def compiled(variant: Variant, target: Target) -> Any:
    """Return the variant as triton compiles it; a launch finds it in triton's cache."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = next(
        getattr(module, variant.kernel)
        for module in map(importlib.import_module, KERNEL_MODULES)
        if hasattr(module, variant.kernel)
    )
    types, constants = dict(variant.types), dict(variant.constants)
    facts = [["tt.divisibility", 16]]
    if target.backend == "hip":
        facts.append(["tt.pointer_range", 32])  # so it is launched for tensors below 2 GiB
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in function.arg_names},
        constexprs=constants,
        attrs={
            (index,): facts
            for index, name in enumerate(function.arg_names)
            if types.get(name, "").startswith("*")
        },
    )
    return triton.compile(
        source,
        target=GPUTarget(target.backend, target.arch, target.lanes),
        options=dict(variant.options),
    )


def compile_all(chosen: Sequence[Variant], targets: Sequence[str], jobs: int) -> list[Report]:
    """Return reports of all variants on all targets, from processes without the interpreter."""
    work = list(itertools.product(chosen, targets))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        return list(pool.map(compile_variant, *zip(*work, strict=True)))


# ---------------------------------------------------------------- reading machine code

# Of `Loop`, matched against single instructions.
COUNTED = {
    "instructions": r"",
    "exps": r"MUFU\.EX2",
    "special": r"MUFU\.",
    "wide_loads": r"LDG\.\S*128",
    "local": r"\b(?:LDL|STL)\b",
}
WORK = r"MUFU\.EX2|DFMA"  # every loop over positions has it, and no other loop


def _nvidia_tool(name: str, *arguments: str) -> str:
    """Return the output of a tool that comes with triton."""
    package = Path(importlib.import_module("triton").__path__[0])
    command = [str(package / "backends" / "nvidia" / "bin" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _search(pattern: str, text: str) -> re.Match[str]:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"there is no {pattern} in {text:.500}")
    return found


def _matching(code: Iterable[str], pattern: str) -> int:
    return sum(re.search(pattern, instruction) is not None for instruction in code)


def innermost_loops(sass: str) -> list[list[str]]:
    """Return the bodies of the loops over positions that contain no other one, in order."""
    code: list[str] = []
    labels: dict[str, int] = {}  # number of the instruction that each stands at
    for line in sass.splitlines():
        if found := re.match(r"\s*(\.L_\w+):", line):
            labels[found[1]] = len(code)
        elif found := re.match(r".*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(found[1].strip())
    ends: dict[int, int] = {}  # of the loops, by their begin
    for index, instruction in enumerate(code):
        found = re.search(r"BRA.*?(\.L_\w+)", instruction)
        if found and labels.get(found[1], len(code)) < index:
            ends[labels[found[1]]] = index + 1
    loops = [loop for loop in sorted(ends.items()) if _matching(code[slice(*loop)], WORK)]
    return [
        code[begin:end]
        for begin, end in loops
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in loops)
    ]


def loop_of(body: list[str], steps: int) -> Loop:
    return Loop(steps, **{name: _matching(body, pattern) for name, pattern in COUNTED.items()})


def _step_loops(variant: Variant, sass: str) -> tuple[Loop, ...]:
    """Return the loops over positions.

    An assembler that unrolls a loop leaves another for the remaining steps. Of these the one with
    the most steps counts, which does nearly all of the work.
    """
    bodies = innermost_loops(sass)
    main = ()
    if variant.kernel == "chunk_scan_bwd":
        main_body = max(bodies, key=len)
        bodies.remove(main_body)
        main = (loop_of(main_body, variant.constant("RECOMPUTE_STEPS")),)
    loops = [loop_of(body, _steps(variant, body)) for body in bodies]
    return (max(loops, key=lambda loop: (loop.steps, loop.instructions)), *main)


def _steps(variant: Variant, body: list[str]) -> int:
    """Return how many times an assembler has unrolled a loop, told from its exponentials.

    In fp64 these are long software; such loops are not unrolled, nor is that of the carry.
    """
    if variant.kernel == "state_passing" or variant.real == "fp64":
        return 1
    return max(1, round(_matching(body, COUNTED["exps"]) / exps_of_step(variant)))


def exps_of_step(variant: Variant) -> float:
    """Return exponentials per lane in one step: one per state, and those of softplus and gate.

    In chunk_scan_bwd: of its loop forward.
    """
    block = variant.constant("BLOCK_D")
    per_channel = variant.constant("SOFTPLUS")
    if variant.kernel != "chunk_scan_bwd":
        per_channel += variant.constant("GATE")
    return variant.constant("BLOCK_N") * block / WARP + per_channel * max(1, block // WARP)


# ---------------------------------------------------------------- bytes and times

H200 = Gpu(bandwidth=4.3e12, sms=132, clock=1.755e9)  # as the predictions take it
SCHEDULERS = 4  # of a multiprocessor, an instruction of a warp per clock each
ISSUE_SHARE = 0.75  # of the peak issue rate


def traffic(launch: Launch) -> int:
    """Bytes between memory and the caches in a launch: model from its arguments.

    Every tensor that a kernel reads or writes counts once per launch, or its share of the
    directions that the launch does: all else hits a cache. Checkpoints count as written and read
    once per direction; the time steps before softplus, which chunk_scan_bwd keeps where it later
    puts their gradients, as written, read and written.
    """
    kernel, constant = launch.variant.kernel, launch.variant.constant
    first, last = (
        launch.integers.get("first_direction", 0) == 0,
        launch.integers.get("first_direction", 0) + 2 >= launch.integers["directions"],
    )
    gate, is_map = constant("GATE"), launch.variant.is_map
    reads = {"x_ptr", "dt_ptr", "B_ptr", "C_ptr", "dy_ptr", "A_ptr", "weight_ptr", "bias_ptr"}
    reads |= {"skip_ptr", "first_ptr", "adjoints_ptr"}
    reads |= set() if kernel == "state_passing" else {"starts_ptr"}
    reads |= {"ends_ptr", "sums_ptr"} if kernel == "state_passing" else set()
    reads |= {"z_ptr"} if gate else set()
    reads |= set() if first else {"sum_ptr"}
    writes = {"dB_ptr", "dC_ptr", "dA_ptr", "dbias_ptr", "ddt_raw_ptr"}
    writes |= {"starts_ptr"} if kernel == "state_passing" else {"ends_ptr", "sums_ptr"}
    writes |= {"dz_ptr"} if gate else set()
    writes |= {"dskip_ptr"} if first else set()
    writes |= {"y_ptr", "dx_ptr"} if last else {"sum_ptr"}
    writes |= set() if is_map else {"last_ptr", "dfirst_ptr"}

    def total(names: set[str]) -> float:
        distinct = {launch.tensors[name]: name for name in names if name in launch.tensors}
        return sum(size * _share(name, launch) for (_, size), name in distinct.items())

    again = 2 * launch.directions_per_program * launch.tensors.get("checkpoints_ptr", (0, 0))[1]
    if is_map:
        again += 2 * launch.tensors.get("ddt_raw_ptr", (0, 0))[1]
    return round(total(reads) + total(writes) + again)


# Arguments with an axis of directions. B and C of a map lie in the projections of dt.
_OF_DIRECTIONS = {"dt_ptr", "B_ptr", "C_ptr", "A_ptr", "weight_ptr", "bias_ptr", "starts_ptr"}
_OF_DIRECTIONS |= {"adjoints_ptr", "dA_ptr", "dbias_ptr"}


def _share(name: str, launch: Launch) -> float:
    return launch.share if name in _OF_DIRECTIONS else 1.0


def predict(launch: Launch, report: Report) -> tuple[float, float, float]:
    """Return the least seconds of a launch on an H200 by issue, special function unit and bytes.

    Only the loops over positions are counted; the launch takes the largest of the three.
    """
    clocks = H200.sms * H200.clock
    return (
        launch.steps * report.per_step("instructions") / (clocks * SCHEDULERS * ISSUE_SHARE),
        launch.steps * report.per_step("special") * WARP / (clocks * H200.exps),
        traffic(launch) / H200.bandwidth,
    )


# ---------------------------------------------------------------- output

COLUMNS = (
    *("kernel", "type", "N", "R", "block", "target", "registers", "stack", "spilled", "shared"),
    *("in loop", "instr/elt", "exp/elt", "128-bit loads", "warps/SM"),
)


def report_row(report: Report) -> list[str]:
    """Return the values of COLUMNS; "-" where gfx942 is not counted."""
    variant, loops = report.variant, report.loops
    return [
        variant.kernel + _flags(variant),
        variant.io,
        str(variant.constant("N")),
        str(variant.constant("RANK") or "-"),
        str(variant.constant("BLOCK_D")),
        report.target,
        *map(str, (report.registers, report.stack, report.spilled, report.shared)),
        str(sum(loop.local for loop in loops)) if loops else "-",
        f"{report.per_elt('instructions'):.1f}" if loops else "-",
        f"{report.per_elt('exps'):.2f}" if loops else "-",
        str(sum(loop.wide_loads for loop in loops)) if loops else "-",
        str(report.warps) if loops else "-",
    ]


def _flags(variant: Variant) -> str:
    """What tells variants of the same sizes apart, in short."""
    letters = {"GATE": "z", "B_CONSTANT": "B", "C_CONSTANT": "C", "ADJOINT": "adjoint"}
    shown = [letter for flag, letter in letters.items() if variant.constant(flag)]
    if not variant.is_map and variant.constant("SOFTPLUS"):
        shown.append("softplus")
    if variant.kernel == "chunk_scan_bwd" and not variant.constant("ALIGNED"):
        shown.append("unaligned")
    return f" ({', '.join(shown)})" if shown else ""


def as_json(reports: Sequence[Report]) -> dict[str, Any]:
    """Return everything of the reports."""
    parts = ("types", "constants", "options")
    found = []
    for report in reports:
        variant = {name: dict(getattr(report.variant, name)) for name in parts}
        found.append(asdict(report) | {"variant": {"kernel": report.variant.kernel, **variant}})
    return {"versions": versions("triton", "torch"), "reports": found}


NOTES = f"""\
Counted in machine code, and times PREDICTED from it: nothing was measured. Instructions and \
exponentials are per lane and elt (position, channel, state and direction), of the loops over \
positions. "In loop": loads and stores of spilled registers there; "stack": bytes per lane; \
"warps/SM": programs, one warp each, that the registers allow on an SM of an H100 or H200.

Predictions are for an H200: of each launch the largest of instructions at {ISSUE_SHARE:.0%} of \
the peak issue rate, lanes of the special function unit, and bytes of the arguments; launches are \
added. Left out: waiting for memory, code outside the loops, launches, and the PyTorch operators \
after the backward kernels. The floor is that of any fused kernel, see tools/profile_scan.py. \
"Fill": how many times the programs of the last launch of forward or backward fill all SMs."""


def page(scans: Sequence[Scan], reports: Sequence[Report], command: str) -> str:
    """Return the tables of reports; with predictions for maps if there are reports on sm_90."""
    parts = [
        "# Static kernel analysis",
        f"`{command}`, triton {versions('triton').get('triton')}.",
        NOTES,
        markdown_table(COLUMNS, map(report_row, reports), figures=len(COLUMNS) - 1),
    ]
    of = {report.variant: report for report in reports if report.target == "sm_90"}
    maps = list(dict.fromkeys(scan for scan in scans if isinstance(scan, MapScan)))
    if of and maps:
        parts += [
            "## Predicted times, µs",
            _table(SCAN_COLUMNS, [_predicted_row(scan, of) for scan in maps]),
            "## By kernel, forward and backward, µs",
            _table(LAUNCH_COLUMNS, [row for scan in maps for row in _launch_rows(scan, of)]),
        ]
    return "\n\n".join(parts) + "\n"


SCAN_COLUMNS = ("shape", "N", "forward", "floor", "both", "floor", "fill fwd", "fill bwd")
LAUNCH_COLUMNS = ("shape", "N", "kernel", "launches", "bytes/elt", "issue", "exp unit", "memory")


def _table(columns: Sequence[str], rows: list[tuple[str | float, ...]]) -> str:
    """Return a table; floats are rounded to one digit after the point below 10."""
    cells = (
        [f"{x:.{int(x < 10)}f}" if isinstance(x, float) else str(x) for x in row] for row in rows
    )
    return markdown_table(columns, cells, figures=len(columns) - 1)


def _predicted_row(scan: MapScan, of: dict[Variant, Report]) -> tuple[str | float, ...]:
    launches = record(scan)
    outputs = [launch.variant.kernel == "chunk_scan_fwd" for launch in launches]
    begin = len(outputs) - outputs[::-1].index(True)  # of the backward
    forward, backward = (
        1e6 * sum(max(predict(launch, of[launch.variant])) for launch in half)
        for half in (launches[:begin], launches[begin:])
    )
    floors = [1e6 * floor_seconds(scan.shape, mode, 4, H200) for mode in (FORWARD, BOTH)]
    fills = [
        last.programs / (H200.sms * of[last.variant].warps)
        for last in (launches[begin - 1], launches[-1])
    ]
    return (*_names(scan), forward, floors[0], forward + backward, floors[1], *fills)


def _launch_rows(scan: MapScan, of: dict[Variant, Report]) -> Iterator[tuple[str | float, ...]]:
    launches = record(scan)
    for kernel in dict.fromkeys(launch.variant.kernel for launch in launches):
        own = [launch for launch in launches if launch.variant.kernel == kernel]
        times = [predict(launch, of[launch.variant]) for launch in own]
        moved = sum(map(traffic, own)) / sum(launch.elts for launch in own)
        sums = (1e6 * sum(parts) for parts in zip(*times, strict=True))
        yield (*_names(scan), f"`{kernel}`", len(own), moved, *sums)


def _names(scan: MapScan) -> tuple[str, str]:
    return f"B{scan.images} {scan.height}x{scan.width} D{scan.channels} R{scan.rank}", str(scan.n)


def main(argv: list[str] | None = None) -> int:
    # The interpreter must be off before the kernels are imported, here and in the pool.
    os.environ.pop("TRITON_INTERPRET", None)
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--scans",
        choices=SCANS,
        default="model",
        help="model: those of the models and benchmarks (default); quick: a few that have every "
        "kernel; all: every type, flag and size of block",
    )
    add("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    add("--jobs", type=count, default=1, help="processes (default: 1)")
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--markdown", metavar="FILE", type=output, help="write the tables here")
    args = parser.parse_args(argv)

    scans = SCANS[args.scans]()
    reports = compile_all(variants(scans), args.targets, args.jobs)
    text = page(scans, reports, shlex.join(["python", "tools/compile_kernels.py", *argv]))
    if args.markdown:
        write_atomically(args.markdown, text.encode())
    if args.json:
        print(json.dumps(as_json(reports), indent=1))
    elif not args.markdown:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

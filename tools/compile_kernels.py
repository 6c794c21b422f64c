"""What the Triton kernels become: compiled ahead of time, without a GPU, and counted.

    python tools/compile_kernels.py                            model and benchmark, three targets
    python tools/compile_kernels.py --scans all --jobs 2 --json
    python tools/compile_kernels.py --targets sm_90 --markdown benchmarks/kernels_static.md

What is compiled is what is dispatched: the launch code of `cmamba_ref.kernels` runs on tensors
without memory while its kernels are replaced by recorders, and every variant that it asks for is
compiled with the types and options that it asked for.

The unit of all counts is the elt: one position, channel, state and direction. The lanes of a warp
work on different elts, so that I instructions in a loop body of S steps come to
I / (S N BLOCK_D / 32) instructions per elt (with 64 for 32 on gfx942).
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from markdown_table import markdown_table
from torch import Tensor

from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.config import CONFIGS
from cmamba_ref.nn.ss2d import DIRECTIONS

KERNELS = (
    "chunk_state_fwd",
    "state_passing",
    "chunk_scan_fwd",
    "chunk_state_bwd",
    "chunk_scan_bwd",
)
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


# The scans.


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

    def to_launch(self, launch: ModuleType) -> Any:
        """The `launch.Scan` of this scan, on the meta device."""
        new = functools.partial(torch.empty, dtype=DTYPES[self.dtype], device="meta")
        real = functools.partial(new, dtype=_compute_dtype(self.dtype))
        position = (self.images, self.height, self.width)
        projections = new(*position, DIRECTIONS, self.rank + 2 * self.n)
        return launch.Scan(
            x=new(*position, self.channels),
            dt=projections,
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
        """The `launch.Scan` of this scan, on the meta device."""
        new = functools.partial(torch.empty, dtype=DTYPES[self.dtype], device="meta")
        real = functools.partial(new, dtype=_compute_dtype(self.dtype))
        position = (self.images, 1, self.length)
        varying, constant = (*position, self.groups, self.n), (self.n, self.channels)
        return launch.Scan(
            x=new(*position, self.channels),
            dt=new(*position, self.channels),
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


def _compute_dtype(name: str) -> torch.dtype:
    return torch.promote_types(DTYPES[name], torch.float32)


# What a scan dispatches.


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

    def replaced(self, types: dict[str, str] | None = None, **constants: int) -> Variant:
        """This variant with other types (by the old type) and constants."""
        changed = {k: constants.get(k, v) for k, v in self.constants}
        renamed = types or {}
        return replace(
            self,
            types=tuple((name, renamed.get(old, old)) for name, old in self.types),
            constants=tuple(changed.items()),
        )


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


TYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
}


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


# Which scans there are.


def _model_scans() -> list[MapScan]:
    """The scans of every stage of every configuration for a picture of 768x512."""
    scans = []
    for config in CONFIGS.values():
        for stage, (width, has_scan) in enumerate(
            zip(config.widths, config.stages_with_scan, strict=True), start=1
        ):
            if has_scan:
                scans.append(
                    MapScan(
                        n=config.d_state,
                        rank=math.ceil(width / 16),
                        channels=round(config.ssm_ratio * width),
                        height=512 >> stage,
                        width=768 >> stage,
                    )
                )
    return list(dict.fromkeys(scans))


BENCHMARK_SCANS = [MapScan(n, 12, 192, images=b) for b in (1, 8) for n in (1, 4, 8, 16)]
MODEL_SCANS = [*_model_scans(), *BENCHMARK_SCANS]
# Every kernel; both kinds of scan; sizes that fill their power of two and sizes that do not.
QUICK_SCANS = [
    MapScan(16, 12, 192),
    MapScan(3, 20, 100, "bf16"),
    SequenceScan(8, 40, gate=True, softplus=False, c_constant=True),
]

# Sizes that are compiled. A kernel sees a power of two and a mask: what is not listed here is
# represented by the power of two above, and 3, 12 and 20 are there for the masks.
STATES = (1, 2, 3, 4, 8, 12, 16, 32)
RANKS = (1, 2, 4, 8, 12, 16, 20, 32, 64)
# Fewer, for all but the forward of a map in fp32. They have the channel blocks of those that they
# stand for.
COARSE_STATES = (2, 4, 8, 16, 32)
COARSE_RANKS = (8, 16, 32, 64)
USUAL_STATES = 16  # the N for which all RANKS are compiled
# Channels that give each block that there is, as multiples of 16 and not.
WIDTHS = (128, 64, 32, 100, 40, 20)
WIDEST = 100  # gives the largest block that N and R allow


def all_scans() -> list[Scan]:
    """Scans that dispatch every variant there is, up to `representative`."""
    maps = [MapScan(n, r, d) for n, r, d in itertools.product(STATES, RANKS, WIDTHS)]
    coarse = itertools.product(COARSE_STATES, COARSE_RANKS, WIDTHS, ("bf16", "fp64"))
    maps += [MapScan(n, r, d, dtype) for n, r, d, dtype in coarse]
    usual = itertools.product(COARSE_STATES, WIDTHS, (False, True))
    sequences = [SequenceScan(n, d, gate=gate) for n, d, gate in usual]
    for n, dtype in itertools.product(COARSE_STATES, ("fp32", "bf16", "fp64")):
        sequences += [
            SequenceScan(n, WIDEST, dtype, 1, *flags)
            for flags in itertools.product((False, True), repeat=4)
        ]
    return [*maps, *sequences]


def representative(variant: Variant) -> Variant:
    """The variant that is compiled for this one in the long test.

    - N and R: themselves if listed in STATES and RANKS, else the power of two above, in the forward
      of maps in fp32, R only with N = 16; else in COARSE_STATES and COARSE_RANKS. In
      chunk_scan_bwd, where R has a part only in the first of two loops, always the largest R.
    - fp16 is represented by bf16, which is converted at the same places.
    - Sequences: with unusual flags (B or C constant, or no softplus) all types are represented by
      fp32. With these, and in other types than fp32, all blocks are represented by the largest, and
      channels in multiples of 16 by others, of which the compiler knows less.
    """
    if variant.kernel == "state_passing":
        listed = STATES if variant.real == "fp32" else COARSE_STATES
        return variant.replaced(N=_bucket(variant.constant("N"), listed))
    variant = variant.replaced({"*fp16": "*bf16"})
    usual = bool(variant.constant("SOFTPLUS")) and not any(
        variant.constant(flag) for flag in ("B_CONSTANT", "C_CONSTANT")
    )
    if not usual:
        variant = variant.replaced({f"*{name}": "*fp32" for name in DTYPES})
    fine = variant.is_map and variant.io == "fp32"
    n = _bucket(variant.constant("N"), STATES if fine else COARSE_STATES)
    if variant.is_map:
        fine = fine and variant.kernel != "chunk_state_bwd" and n == USUAL_STATES
        r = _bucket(variant.constant("RANK"), RANKS if fine else COARSE_RANKS)
        if variant.kernel == "chunk_scan_bwd":
            r = COARSE_RANKS[-1]
        return variant.replaced(
            N=n, BLOCK_N=_next_power_of_2(n), RANK=r, BLOCK_R=_next_power_of_2(r)
        )
    variant = variant.replaced(N=n, BLOCK_N=n)
    if usual and variant.io == "fp32":
        return variant
    return variant.replaced(BLOCK_D=_widest_block(variant), ALIGNED=False)


def _widest_block(variant: Variant) -> int:
    """The largest block of a kernel of a sequence."""
    plan = _launch_module().plan(1, 1, WIDEST, 1, variant.constant("N"), 0, DTYPES[variant.real])
    return plan.backward_block if variant.kernel == "chunk_scan_bwd" else plan.block


def _bucket(value: int, listed: Sequence[int]) -> int:
    """The value itself where it is listed, else the power of two above."""
    power = max(listed[0], _next_power_of_2(value))
    return value if value in listed else power


def _next_power_of_2(x: int) -> int:
    return 1 << (x - 1).bit_length()


def all_variants() -> list[Variant]:
    """What the long test compiles, with what the models and the benchmarks dispatch."""
    chosen = [representative(variant) for variant in variants(all_scans())]
    return list(dict.fromkeys([*chosen, *variants([*MODEL_SCANS, *QUICK_SCANS])]))


# Compiling.


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
        instructions, exps, special: all; `MUFU.EX2` (gfx942: `v_exp_f32`); all of the special
            function unit.
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
    """What a variant became.

    Attributes:
        registers: per lane.
        stack: bytes per lane, spilled registers among them.
        spilled: vector registers that gfx942 spills; on cuda, instructions that use the stack.
        shared: bytes of shared memory.
        exps_in_ptx: exponentials of the whole kernel before ptxas unrolls loops; cuda only.
        loops: over positions, in the order of the code; of chunk_scan_bwd the sweep forward and
            the main loop, of the other kernels one.
    """

    variant: Variant
    target: str
    registers: int
    stack: int
    spilled: int
    shared: int
    exps_in_ptx: int
    loops: tuple[Loop, ...]

    def per_elt(self, count: str) -> float:
        """A count of `Loop` per elt, summed over the loops."""
        per_step = sum(getattr(loop, count) / loop.steps for loop in self.loops)
        return per_step / _elts_of_lane(self.variant, TARGETS[self.target].lanes)

    @property
    def warps(self) -> int:
        """Warps, of one program each, that an SM of an H100 or H200 holds at a time.

        Each of its four parts has 16384 registers, and a warp takes multiples of 256.
        """
        per_warp = math.ceil(self.registers * 32 / 256) * 256
        return min(32, 4 * (16384 // per_warp))


def _elts_of_lane(variant: Variant, lanes: int) -> float:
    """Elts of a step per lane; of the carry, pairs of a chunk and a feature."""
    rows = variant.constant("CHUNKS" if variant.kernel == "state_passing" else "N")
    return rows * variant.constant("BLOCK_D") / lanes


def exps_of_step(variant: Variant, lanes: int) -> float:
    """Exponentials per lane in one step: one per state, and those of softplus and gate.

    In chunk_scan_bwd: of its loop forward.
    """
    block = variant.constant("BLOCK_D")
    per_channel = variant.constant("SOFTPLUS")
    if variant.kernel != "chunk_scan_bwd":
        per_channel += variant.constant("GATE")
    channels = max(1, block // lanes)
    return variant.constant("BLOCK_N") * block / lanes + per_channel * channels


def compile_variant(variant: Variant, target: str) -> Report:
    """Compiles a variant for a target and reads its machine code.

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
    read = _read_cuda if TARGETS[target].backend == "cuda" else _read_hip
    return read(variant, target, found)


def compiled(variant: Variant, target: Target) -> Any:
    """The variant as triton compiles it; it stays in triton's cache, where a launch finds it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = next(
        getattr(module, variant.kernel)
        for module in map(importlib.import_module, _KERNEL_MODULES)
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


_KERNEL_MODULES = ("cmamba_ref.kernels.chunk_scan_fwd", "cmamba_ref.kernels.chunk_scan_bwd")


# Reading machine code.


@dataclass(frozen=True)
class Dialect:
    """Patterns of an assembler language, matched against single instructions.

    Attributes:
        exp: the exponential.
        special: what the special function unit does.
        work: an instruction that every loop over positions has, and no other loop.
        branch, label, instruction: matched against lines, with what they name as a group.
    """

    exp: str
    special: str
    wide_load: str
    local: str
    work: str
    branch: str
    label: str
    instruction: str


SASS = Dialect(
    exp=r"MUFU\.EX2",
    special=r"MUFU\.",
    wide_load=r"LDG\.\S*128",
    local=r"(LDL|STL)\b",
    work=r"MUFU\.EX2|DFMA",
    branch=r"BRA.*?(\.L_\w+)",
    label=r"\s*(\.L_\w+):",
    instruction=r".*/\*[0-9a-f]{4,}\*/\s+(.*?);",
)
GCN = Dialect(
    exp=r"v_exp_f32",
    special=r"v_(exp|rcp|rsq|log|sqrt)_f",
    wide_load=r"(global|buffer)_load_dwordx4",
    local=r"scratch_(load|store)",
    work=r"v_exp_f32|v_fma_f64",
    branch=r"s_c?branch\S*\s+(\.LBB\w+)",
    label=r"(\.LBB\w+):",
    instruction=r"\t([a-z]\w+[^;]*)",
)


def _read_cuda(variant: Variant, target: str, compiled: Any) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _nvidia_tool("cuobjdump", "-res-usage", file.name)
        sass = _nvidia_tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump tells no registers of {variant}: {usage}")
    registers, stack = map(int, found.groups())
    return Report(
        variant,
        target,
        registers,
        stack,
        _matching(sass.splitlines(), SASS.local),
        compiled.metadata.shared,
        len(re.findall(r"ex2\.approx", compiled.asm["ptx"])),
        _step_loops(variant, TARGETS[target].lanes, sass, SASS),
    )


def _nvidia_tool(name: str, *arguments: str) -> str:
    """Output of a tool that comes with triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run(
        [str(tool), *arguments], capture_output=True, text=True, check=True
    ).stdout


def _read_hip(variant: Variant, target: str, compiled: Any) -> Report:
    text = compiled.asm["amdgcn"]

    def metadata(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s*(\d+)", text)[0])

    return Report(
        variant,
        target,
        metadata("vgpr_count"),
        metadata("private_segment_fixed_size"),
        metadata("vgpr_spill_count"),
        compiled.metadata.shared,
        0,
        _step_loops(variant, TARGETS[target].lanes, text.split(".Lfunc_end")[0], GCN),
    )


def _parse(text: str, dialect: Dialect) -> tuple[list[str], dict[str, int]]:
    """Instructions in their order, and for each label the number of the one that it stands at."""
    code: list[str] = []
    labels = {}
    for line in text.splitlines():
        if found := re.match(dialect.label, line):
            labels[found[1]] = len(code)
        elif found := re.match(dialect.instruction, line):
            code.append(found[1].strip())
    return code, labels


def _matching(code: Iterable[str], pattern: str) -> int:
    return sum(re.search(pattern, instruction) is not None for instruction in code)


def innermost_loops(text: str, dialect: Dialect) -> list[list[str]]:
    """Bodies of the loops over positions that contain no other one, in the order of the code."""
    code, labels = _parse(text, dialect)
    ends: dict[int, int] = {}  # of the loops, by their begin
    for index, instruction in enumerate(code):
        found = re.search(dialect.branch, instruction)
        if found and labels.get(found[1], len(code)) < index:
            ends[labels[found[1]]] = index + 1
    loops = [loop for loop in sorted(ends.items()) if _matching(code[slice(*loop)], dialect.work)]
    return [
        code[begin:end]
        for begin, end in loops
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in loops)
    ]


def _step_loops(variant: Variant, lanes: int, text: str, dialect: Dialect) -> tuple[Loop, ...]:
    """The loops over positions.

    An assembler that unrolls a loop leaves another for the remaining steps. Of these the one with
    the most steps counts, which does nearly all of the work.
    """
    bodies = innermost_loops(text, dialect)
    main = ()
    if variant.kernel == "chunk_scan_bwd":
        main_body = max(bodies, key=len)
        bodies.remove(main_body)
        main = (loop_of(main_body, variant.constant("RECOMPUTE_STEPS"), dialect),)
    loops = [loop_of(body, _steps(variant, lanes, body, dialect), dialect) for body in bodies]
    return (max(loops, key=lambda loop: (loop.steps, loop.instructions)), *main)


def _steps(variant: Variant, lanes: int, body: list[str], dialect: Dialect) -> int:
    """How many times an assembler has unrolled a loop, told from its exponentials.

    In fp64 these are long software; such loops are not unrolled, nor is that of the carry.
    """
    if variant.kernel == "state_passing" or variant.real == "fp64":
        return 1
    return max(1, round(_matching(body, dialect.exp) / exps_of_step(variant, lanes)))


def loop_of(body: list[str], steps: int, dialect: Dialect) -> Loop:
    return Loop(
        steps,
        len(body),
        *(
            _matching(body, pattern)
            for pattern in (dialect.exp, dialect.special, dialect.wide_load, dialect.local)
        ),
    )


def compile_all(chosen: Sequence[Variant], targets: Sequence[str], jobs: int) -> list[Report]:
    """Reports of all variants on all targets, in processes that start without the interpreter."""
    work = list(itertools.product(chosen, targets))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        return list(pool.map(compile_variant, *zip(*work, strict=True)))


# Models: bytes and times.

# An H200 as the models take it.
MULTIPROCESSORS = 132
CLOCK = 1.755e9  # Hz
SCHEDULERS = 4  # of a multiprocessor, an instruction of a warp per clock each
SPECIAL_PER_CLOCK = 16  # lanes per clock and multiprocessor
FMA_PER_CLOCK = 128
BANDWIDTH = 4.3e12  # bytes per second
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


@dataclass(frozen=True)
class Prediction:
    """Seconds that a launch takes at least: by issued instructions, by the SFU, by bytes."""

    issue: float
    special: float
    memory: float

    @property
    def seconds(self) -> float:
        return max(self.issue, self.special, self.memory)


def predict(launch: Launch, report: Report) -> Prediction:
    """The model's times of a launch on an H200. Only the loops over positions are counted."""
    per_step = {
        count: sum(getattr(loop, count) / loop.steps for loop in report.loops)
        for count in ("instructions", "special")
    }
    warps_per_second = MULTIPROCESSORS * CLOCK * SCHEDULERS * ISSUE_SHARE
    lanes_per_second = MULTIPROCESSORS * CLOCK * SPECIAL_PER_CLOCK
    return Prediction(
        launch.steps * per_step["instructions"] / warps_per_second,
        launch.steps * per_step["special"] * 32 / lanes_per_second,
        traffic(launch) / BANDWIDTH,
    )


def floors(scan: MapScan) -> tuple[float, float]:
    """Least seconds of a fused forward, and of forward and backward, whatever the kernels.

    A pass per elt of exponentials, or of multiplications and additions, or the bytes of input and
    output, in fp32, whichever takes longest.
    """
    positions = scan.images * scan.height * scan.width
    channels = DIRECTIONS * positions * scan.channels
    n, r = scan.n, scan.rank
    special = MULTIPROCESSORS * CLOCK * SPECIAL_PER_CLOCK
    fma = MULTIPROCESSORS * CLOCK * FMA_PER_CLOCK
    size = 8 * positions * scan.channels + 4 * DIRECTIONS * positions * (r + 2 * n)
    forward = max(channels * (n + 2) / special, channels * (4 * n + r + 8) / fma, size / BANDWIDTH)
    both = max(
        channels * (2 * n + 6) / special,
        channels * (17 * n + 3 * r + 30) / fma,
        3 * size / BANDWIDTH,
    )
    return forward, both


# What is printed.

COLUMNS = (
    *("kernel", "type", "N", "R", "block", "target", "registers", "stack", "in loop", "shared"),
    *("instr/elt", "exp/elt", "128-bit loads", "warps/SM"),
)


def report_row(report: Report) -> list[str]:
    """The values of COLUMNS."""
    constant = report.variant.constant
    nvidia = TARGETS[report.target].backend == "cuda"
    return [
        report.variant.kernel + _flags(report.variant),
        report.variant.io,
        str(constant("N")),
        str(constant("RANK") or "-"),
        str(constant("BLOCK_D")),
        report.target,
        str(report.registers),
        str(report.stack),
        str(sum(loop.local for loop in report.loops)),
        str(report.shared),
        f"{report.per_elt('instructions'):.1f}",
        f"{report.per_elt('exps'):.2f}",
        str(sum(loop.wide_loads for loop in report.loops)),
        str(report.warps) if nvidia else "-",
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


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    )


def as_json(reports: Sequence[Report]) -> dict[str, Any]:
    """Everything of the reports, with what the tables derive."""
    return {
        "versions": versions(),
        "reports": [
            {
                **asdict(report),
                "variant": {
                    "kernel": report.variant.kernel,
                    "types": dict(report.variant.types),
                    "constants": dict(report.variant.constants),
                    "options": dict(report.variant.options),
                },
                "instructions_per_elt": report.per_elt("instructions"),
                "exps_per_elt": report.per_elt("exps"),
                "warps": report.warps if TARGETS[report.target].backend == "cuda" else None,
            }
            for report in reports
        ],
    }


def versions() -> dict[str, str]:
    """Of triton and of the assembler that comes with it."""
    import triton

    found = re.search(r"release (\S+), (V\S+)", _nvidia_tool("ptxas", "--version"))
    return {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "ptxas": f"CUDA {found[1]} ({found[2]})" if found else "unknown",
    }


PAGE = """# What the kernels compile to

Counted in machine code and predicted from it. **Nothing on this page was measured**: no kernel ran.

Made by `{command}` with triton {triton}, ptxas of {ptxas}. \
Do not edit: run the command again.

An elt is one position, channel, state and direction. Instructions per elt are those of the loop \
over positions (of `chunk_scan_bwd` its two loops, forward and main), per lane; exp are \
`MUFU.EX2`. "In loop" are loads and stores of spilled registers in those loops, "stack" bytes per \
lane. \
"128-bit loads" are instructions in the loops. "Warps/SM" is how many programs, one warp each, the \
registers allow on an SM of an H100 or H200, of at most 32.

## The benchmark's shapes

D 192, R 12, 128x128 positions.

{benchmark}

## Peers

Counted for sm_90 in the same way: mamba-ssm forward 16.6 instructions per elt, backward about 71 \
and about 2.2 fp32 atomic additions; VMamba's oflex forward 16.0. Both take copies of the map in \
four directions; the passes that make and merge the copies are not in these counts.

## Predicted times on an H200

PREDICTED, not measured. For every launch the largest of three: instructions of the loops at \
{issue:.0%} of the peak issue rate ({sms} SMs, 4 schedulers, {clock:.3f} GHz), lanes of the \
special function unit at 16 per clock and SM, bytes at {bandwidth:.1f} TB/s; launches are added. \
The bytes are those of the arguments: each tensor once per launch, checkpoints once written and \
once read per direction. Not in the model: waiting for memory where few warps run, what stands \
outside the loops, the time of a launch, and the products and sums in PyTorch that follow the \
backward kernels. "Fill" is how many times the programs of a launch of `chunk_scan_fwd` \
(forward) or `chunk_scan_bwd` (backward) fill all SMs; the further below 1, the further the time \
is out of reach.

The floor is that of any fused kernel: exponentials 4E(N+2) forward, 4E(2N+6) with backward; fp32 \
operations 4E(4N+R+8) and 4E(17N+3R+30), at 128 per clock and SM; bytes of input and output, three \
times with backward; E = B H W D.

{predicted}

### By kernel

Sums over the launches of a kernel in forward and backward; bytes per elt of a launch.

{launches}

## The models' shapes

Every stage of `base`, `small` and `tiny` with a scan, fp32.

{models}
"""


def page(reports: Sequence[Report], command: str) -> str:
    """`benchmarks/kernels_static.md` from reports on sm_90 of MODEL_SCANS."""
    of = {report.variant: report for report in reports if report.target == "sm_90"}
    found = versions()
    return PAGE.format(
        command=command,
        triton=found["triton"],
        ptxas=found["ptxas"],
        issue=ISSUE_SHARE,
        sms=MULTIPROCESSORS,
        clock=CLOCK / 1e9,
        bandwidth=BANDWIDTH / 1e12,
        benchmark=_report_table(of[v] for v in variants(BENCHMARK_SCANS)),
        predicted=_predicted_table(of),
        launches=_launch_table(of),
        models=_report_table(of[v] for v in variants(_model_scans())),
    )


def _report_table(reports: Iterable[Report]) -> str:
    return markdown_table(COLUMNS, map(report_row, reports), figures=len(COLUMNS) - 1)


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}"


def _halves(scan: Scan) -> tuple[list[Launch], list[Launch]]:
    """Launches of the forward and of the backward."""
    launches = record(scan)
    outputs = [launch.variant.kernel == "chunk_scan_fwd" for launch in launches]
    begin = len(outputs) - outputs[::-1].index(True)
    return launches[:begin], launches[begin:]


def _predicted_table(of: dict[Variant, Report]) -> str:
    header = ["shape", "N", "forward", "floor", "forward+backward", "floor", "fill fwd", "fill bwd"]
    rows = []
    for scan in BENCHMARK_SCANS:
        halves = _halves(scan)
        forward, backward = (
            sum(predict(launch, of[launch.variant]).seconds for launch in half) for half in halves
        )
        floor_forward, floor_both = floors(scan)
        fills = [
            launches[-1].programs / (MULTIPROCESSORS * of[launches[-1].variant].warps)
            for launches in halves
        ]
        rows.append(
            [
                f"B{scan.images} {scan.height}x{scan.width} D{scan.channels}",
                str(scan.n),
                f"{_microseconds(forward)} µs",
                f"{_microseconds(floor_forward)} µs",
                f"{_microseconds(forward + backward)} µs",
                f"{_microseconds(floor_both)} µs",
                *(f"{fill:.1f}" for fill in fills),
            ]
        )
    return markdown_table(header, rows, figures=len(header) - 1)


def _launch_table(of: dict[Variant, Report]) -> str:
    header = ["shape", "N", "kernel", "launches", "bytes/elt", "issue", "exp unit", "memory"]
    rows = []
    for scan in BENCHMARK_SCANS:
        launches = record(scan)
        for kernel in KERNELS:
            own = [launch for launch in launches if launch.variant.kernel == kernel]
            if not own:
                continue
            times = [predict(launch, of[launch.variant]) for launch in own]
            moved = sum(map(traffic, own)) / sum(launch.elts for launch in own)
            rows.append(
                [
                    f"B{scan.images} {scan.height}x{scan.width} D{scan.channels}",
                    str(scan.n),
                    f"`{kernel}`",
                    str(len(own)),
                    f"{moved:.1f}",
                    *(
                        f"{_microseconds(sum(getattr(time, part) for time in times))} µs"
                        for part in ("issue", "special", "memory")
                    ),
                ]
            )
    return markdown_table(header, rows, figures=len(header) - 1)


SCANS = {
    "model": lambda: variants(MODEL_SCANS),
    "quick": lambda: variants(QUICK_SCANS),
    "all": all_variants,
}


def main(argv: list[str] | None = None) -> int:
    # The interpreter must be off before the kernels are imported, here and in the pool.
    os.environ.pop("TRITON_INTERPRET", None)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scans",
        choices=SCANS,
        default="model",
        help="model: those of the models and benchmarks (default); quick: a few that have every "
        "kernel; all: whatever can be dispatched",
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON instead of a table")
    output.add_argument("--markdown", metavar="FILE", type=Path, help="write the page of sm_90")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    if args.markdown and (args.scans != "model" or "sm_90" not in args.targets):
        parser.error("--markdown needs --scans model and sm_90 among the targets")

    reports = compile_all(SCANS[args.scans](), args.targets, args.jobs)
    if args.markdown:
        words = ["python", "tools/compile_kernels.py", *(sys.argv[1:] if argv is None else argv)]
        write_atomically(args.markdown, page(reports, shlex.join(words)).encode())
    elif args.json:
        print(json.dumps(as_json(reports), indent=1))
    else:
        print(text_table(COLUMNS, [report_row(report) for report in reports]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

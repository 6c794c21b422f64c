"""Compile the Triton kernels ahead of time for GPUs that are absent; count and predict.

    python tools/compile_kernels.py                            model and benchmark, three targets
    python tools/compile_kernels.py --jobs 2
    python tools/compile_kernels.py --targets sm_90 --markdown benchmarks/kernels_static.md

What is compiled is what is dispatched: the launch code of `cmamba_ref.kernels` runs on tensors
without memory and records its launches, and every variant that it asks for is compiled with the
types and options that it asked for.  No kernel runs, so nothing is measured.

The unit of all counts is the elt: one position, channel, state and direction.  The lanes of a warp
work on different elts, so that I instructions in a loop body of S steps come to
I / (S N BLOCK_D / 32) instructions per elt.  For gfx942 loops are not counted, only registers,
spills and shared memory.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib
import inspect
import itertools
import math
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from markdown_table import markdown_table
from profile_scan import (
    BOTH,
    DTYPES,
    FORWARD,
    KNOWN_GPUS,
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

TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.int8: "i8"}
WARP = 32


def launch_code() -> ModuleType:
    """Import `cmamba_ref.kernels.launch`.

    To compile what it holds, triton's interpreter must be off before the first import.
    """
    return importlib.import_module("cmamba_ref.kernels.launch")


# ---------------------------------------------------------------- the scans


@dataclass(frozen=True)
class Scan:
    """A scan of maps in four directions; with rank 0 one of sequences whose delta is given.

    Attributes:
        dtype: of x, delta or the projections, and what varies of B, C and the gate, a key of
            DTYPES.
        groups: G, groups of channels that share B and C. This and what follows is for sequences.
        b_constant, c_constant: B or C is the same at all positions.
    """

    shape: Shape
    dtype: str = "fp32"
    groups: int = 1
    gate: bool = False
    softplus: bool = True
    b_constant: bool = False
    c_constant: bool = False
    packed: bool = False

    def prepared(self) -> Any:
        """Return the `launch.Scan` of this scan, on the meta device."""
        s, io = self.shape, DTYPES[self.dtype]
        new = functools.partial(torch.empty, dtype=io, device="meta")
        real = functools.partial(new, dtype=torch.promote_types(io, torch.float32))
        position = (s.batch, s.height, s.width)
        directions = DIRECTIONS if s.rank else 1
        if s.rank:
            dt = B = C = new(*position, directions, s.rank + 2 * s.states)
        else:
            dt = new(*position, s.channels)
            B, C = (
                real(s.states, s.channels) if constant else new(*position, self.groups, s.states)
                for constant in (self.b_constant, self.c_constant)
            )
        return launch_code().Scan(
            x=new(*position, s.channels),
            dt_or_proj=dt,
            B=B,
            C=C,
            z=new(*position, s.channels) if self.gate else None,
            A=real(directions, s.states, s.channels),
            dt_weight=real(directions, s.rank, s.channels) if s.rank else None,
            dt_bias=real(directions, s.channels),
            skip=real(s.channels),
            begins=new(s.batch, s.width, dtype=torch.int8) if self.packed else None,
            softplus=self.softplus,
            groups=self.groups,
        )


def sequence(channels: int, states: int, length: int = 4096) -> Shape:
    """Return the shape of a sequence whose delta is given."""
    return Shape(1, 1, length, channels, states, 0)


MODEL_SCANS = [
    *(Scan(Shape(b, 128, 128, 192, n, 12)) for b in (1, 8) for n in (1, 4, 8, 16)),
    *(Scan(case.shape) for case in model_cases(768, 512)),
]

# ---------------------------------------------------------------- the launches of a scan


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
    """One launch of a variant, on a grid of so many programs."""

    variant: Variant
    programs: int
    arguments: dict[str, Any]

    @classmethod
    def of(cls, kernel: Any, programs: int, arguments: dict[str, Any]) -> Launch:
        """Return what a `launch.Launch` says to a compiler."""
        parameters = inspect.signature(kernel.fn).parameters
        options = {name: x for name, x in arguments.items() if name not in parameters}
        types, constants = {}, {}
        for name, parameter in parameters.items():
            value = arguments[name]
            if "constexpr" in str(parameter.annotation):
                constants[name] = value
            elif isinstance(value, Tensor):
                types[name] = "*" + TYPE_NAMES[value.dtype]
            else:
                types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        groups = (tuple(group.items()) for group in (types, constants, options))
        return cls(Variant(kernel.fn.__name__, *groups), programs, arguments)

    @property
    def directions_per_program(self) -> int:
        """Directions that a program does one after the other."""
        if "first_direction" not in self.arguments:
            return 1
        return len(range(self.arguments["first_direction"], self.arguments["directions"], 2))

    @property
    def share(self) -> float:
        """Share of the directions that this launch does."""
        if not {"direction", "first_direction"} & self.arguments.keys():
            return 1.0
        return self.directions_per_program / self.arguments["directions"]

    @property
    def steps(self) -> int:
        """Steps of the inner loop that all warps (programs) of the launch take together."""
        if self.variant.kernel == "state_passing":
            passes = math.ceil(self.arguments["chunks"] / self.variant.constant("CHUNKS"))
            return self.programs * passes
        positions = self.arguments["H"] * self.arguments["W"]
        return self.programs // self.arguments["chunks"] * positions * self.directions_per_program

    @property
    def elts(self) -> int:
        """(position, channel, state, direction) that the launch does; of the carry, chunks."""
        if self.variant.kernel == "state_passing":
            per_image = self.arguments["blocks"]
            features = self.variant.constant("N") * self.arguments["D"]
            return self.programs // per_image * self.arguments["chunks"] * features
        per_step = self.arguments["per_group"] * self.variant.constant("N")
        return self.steps // self.arguments["blocks"] * per_step


def record(scan: Scan) -> list[Launch]:
    """Return what the forward and the backward of a scan launch, in order."""
    launch, prepared = launch_code(), scan.prepared()
    state = prepared.A.new_empty(len(prepared.x), *prepared.A.shape)
    with launch.recorded() as launches:
        y, _, starts = launch.forward(prepared, state)
        launch.backward(prepared, starts, torch.empty_like(y), torch.empty_like(state))
    return [Launch.of(*one) for one in launches]


def variants(scans: Iterable[Scan]) -> list[Variant]:
    """Return what scans dispatch, each variant once, in the order of first use."""
    return list(dict.fromkeys(launch.variant for scan in scans for launch in record(scan)))


# ---------------------------------------------------------------- compiling


# Backend, architecture and lanes of a warp, as triton's GPUTarget takes them.
Target = tuple[str, int | str, int]
TARGETS: dict[str, Target] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
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
        loop: over positions; None for gfx942.
    """

    variant: Variant
    target: str
    registers: int
    stack: int
    spilled: int
    shared: int
    exps_in_ptx: int
    loop: Loop | None

    def per_step(self, count: str) -> float:
        """Return a count of `Loop` per step of a warp."""
        assert self.loop is not None
        return getattr(self.loop, count) / self.loop.steps

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


def source_of(variant: Variant, target: Target) -> Any:
    """Return the `triton.compiler.ASTSource` of a variant, as a launch makes it."""
    from triton.compiler import ASTSource

    function = getattr(launch_code(), variant.kernel)
    types = dict(variant.types)
    facts = [["tt.divisibility", 16]]
    if target[0] == "hip":
        facts.append(["tt.pointer_range", 32])  # so it is launched for tensors below 2 GiB
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    return ASTSource(
        fn=function,
        signature=signature,
        constexprs=dict(variant.constants),
        # Constants have an empty list: without it, triton's cache would hold another key.
        attrs={
            (index,): facts if kind.startswith("*") else []
            for index, kind in enumerate(signature.values())
            if kind.startswith("*") or kind == "constexpr"
        },
    )


def compiled(variant: Variant, target: Target) -> Any:
    """Return the variant as triton compiles it; a launch finds it in triton's cache."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = dict(variant.options)
    if target[0] == "hip":
        options.pop("maxnreg", None)  # a launch on AMD does not ask for it
    return triton.compile(source_of(variant, target), target=GPUTarget(*target), options=options)


def compile_variant(variant: Variant, target: str) -> Report:
    """Compile a variant for a target and read its machine code.

    Raises:
        RuntimeError: it does not compile.
    """
    try:
        found = compiled(variant, TARGETS[target])
    except Exception as error:
        raise RuntimeError(f"{variant} does not compile for {target}: {error}") from error
    shared = found.metadata.shared
    if TARGETS[target][0] == "hip":
        keys = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
        registers, stack, spilled = (
            int(re.findall(rf"\.{key}:\s*(\d+)", found.asm["amdgcn"])[0]) for key in keys
        )
        return Report(variant, target, registers, stack, spilled, shared, 0, None)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        usage = _nvidia_tool("cuobjdump", "-res-usage", file.name)
        sass = _nvidia_tool("nvdisasm", "-c", file.name)
    registers, stack = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0])
    spilled = len(re.findall(COUNTED["local"], sass))
    exps = len(re.findall(r"ex2\.approx", found.asm["ptx"]))
    loop = _step_loop(variant, sass)
    return Report(variant, target, registers, stack, spilled, shared, exps, loop)


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


def _step_loop(variant: Variant, sass: str) -> Loop:
    """Return the loop over positions.

    An assembler that unrolls a loop leaves another for the remaining steps. Of these the one with
    the most steps counts, which does nearly all of the work.
    """
    bodies = innermost_loops(sass)
    if variant.kernel == "chunk_scan_bwd":
        return loop_of(max(bodies, key=len), variant.constant("RECOMPUTE_STEPS"))
    loops = [loop_of(body, _steps(variant, body)) for body in bodies]
    return max(loops, key=lambda loop: (loop.steps, loop.instructions))


def _steps(variant: Variant, body: list[str]) -> int:
    """Return how many times an assembler has unrolled a loop, told from its exponentials.

    In fp64 these are long software; such loops are not unrolled, nor is that of the carry.
    """
    if variant.kernel == "state_passing" or variant.real == "fp64":
        return 1
    return max(1, round(_matching(body, COUNTED["exps"]) / exps_of_step(variant)))


def exps_of_step(variant: Variant) -> float:
    """Return exponentials per lane in one step: one per state, and those of softplus and gate.

    Of all kernels but chunk_scan_bwd.
    """
    block = variant.constant("BLOCK_D")
    per_channel = variant.constant("SOFTPLUS") + variant.constant("GATE")
    return variant.constant("BLOCK_N") * block / WARP + per_channel * max(1, block // WARP)


# ---------------------------------------------------------------- bytes and times

H200 = KNOWN_GPUS["NVIDIA H200"]
SCHEDULERS = 4  # of a multiprocessor, an instruction of a warp per clock each
ISSUE_SHARE = 0.75  # of the peak issue rate

# Arguments with an axis of directions. B and C of a map lie in the projections of dt.
PARAMETERS = {"A_ptr", "weight_ptr", "bias_ptr"}
OF_DIRECTIONS = {"dt_ptr", "B_ptr", "C_ptr", *PARAMETERS, "starts_ptr", "adjoints_ptr"}
OF_DIRECTIONS |= {"dA_ptr", "dbias_ptr"}
# With an axis of a direction and its reverse, which are done by launches of their own.
OF_PAIR = {"time_steps_ptr", "ddt_raw_ptr", "dB_ptr", "dC_ptr"}


def traffic(launch: Launch) -> int:
    """Return the bytes between memory and the caches in a launch: model from its arguments.

    Every tensor that a kernel reads or writes counts once per launch, or its share of the
    directions that the launch does: all else hits a cache. chunk_scan_bwd reads the time steps
    where it later puts their gradients.
    """
    variant, directions = launch.variant, launch.arguments["directions"]
    first = launch.arguments.get("direction", launch.arguments.get("first_direction", 0))
    is_last = first + 2 * launch.directions_per_program > directions
    read = {"x_ptr", "dt_ptr", "B_ptr", "C_ptr", "dy_ptr", *PARAMETERS}
    read |= {"skip_ptr", "first_ptr", "adjoints_ptr"}
    written = {"dB_ptr", "dC_ptr", "dA_ptr", "dbias_ptr", "ddt_raw_ptr"}
    of_chunk, start, windows = {"ends_ptr", "sums_ptr"}, {"starts_ptr"}, {"checkpoints_ptr"}
    is_carry = variant.kernel == "state_passing"
    read |= of_chunk if is_carry else start
    written |= start if is_carry else of_chunk
    if variant.kernel == "window_state_fwd":
        written |= windows
    else:
        read |= windows
    if variant.is_map:
        written.add("time_steps_ptr")
    else:
        written |= {"last_ptr", "dfirst_ptr"}
    if variant.constant("GATE"):
        read.add("z_ptr")
        written.add("dz_ptr")
    if first == 0:
        written.add("dskip_ptr")
    else:
        read.add("sum_ptr")
    written |= {"y_ptr", "dx_ptr"} if is_last else {"sum_ptr"}
    shares = dict.fromkeys(OF_DIRECTIONS, launch.share)
    shares |= dict.fromkeys(OF_PAIR, 1 / ((directions + 1) // 2))

    def total(names: set[str]) -> float:
        given = {name: launch.arguments[name] for name in names & launch.arguments.keys()}
        distinct = {id(tensor): (name, tensor) for name, tensor in given.items()}
        return sum(tensor.nbytes * shares.get(name, 1) for name, tensor in distinct.values())

    again = {"ddt_raw_ptr"} if variant.is_map else set()
    return round(total(read) + total(written) + total(again))


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
    variant, loop = report.variant, report.loop
    in_loop = ["-"] * 5
    if loop is not None:
        in_loop = [
            str(loop.local),
            f"{report.per_elt('instructions'):.1f}",
            f"{report.per_elt('exps'):.2f}",
            str(loop.wide_loads),
            str(report.warps),
        ]
    return [
        variant.kernel + _flags(variant),
        variant.io,
        str(variant.constant("N")),
        str(variant.constant("RANK") or "-"),
        str(variant.constant("BLOCK_D")),
        report.target,
        *map(str, (report.registers, report.stack, report.spilled, report.shared)),
        *in_loop,
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


NOTES = f"""\
Counted in machine code, and times PREDICTED from it: nothing was measured. Instructions and \
exponentials are per lane and elt (position, channel, state and direction), of the loop over \
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
    maps = list(dict.fromkeys(scan for scan in scans if scan.shape.rank))
    if of and maps:
        predicted = [(scan.shape, record(scan)) for scan in maps]
        parts += [
            "## Predicted times, µs",
            _table(SCAN_COLUMNS, [_scan_row(*one, of) for one in predicted]),
            "## By kernel, forward and backward, µs",
            _table(LAUNCH_COLUMNS, [row for one in predicted for row in _launch_rows(*one, of)]),
        ]
    return "\n\n".join(parts) + "\n"


SCAN_COLUMNS = ("shape", "N", "forward", "floor", "both", "floor", "fill fwd", "fill bwd")
LAUNCH_COLUMNS = ("shape", "N", "kernel", "launches", "bytes/elt", "issue", "exp unit", "memory")
Cells = tuple[str | float, ...]


def _table(columns: Sequence[str], rows: list[Cells]) -> str:
    """Return a table; floats are rounded to one digit after the point below 10."""
    cells = (
        [f"{x:.{int(x < 10)}f}" if isinstance(x, float) else str(x) for x in row] for row in rows
    )
    return markdown_table(columns, cells, figures=len(columns) - 1)


def _scan_row(shape: Shape, launches: list[Launch], of: dict[Variant, Report]) -> Cells:
    outputs = [launch.variant.kernel == "chunk_scan_fwd" for launch in launches]
    begin = len(outputs) - outputs[::-1].index(True)  # of the backward
    forward, backward = (
        1e6 * sum(max(predict(launch, of[launch.variant])) for launch in half)
        for half in (launches[:begin], launches[begin:])
    )
    floors = [1e6 * floor_seconds(shape, mode, 4, H200) for mode in (FORWARD, BOTH)]
    fills = [
        last.programs / (H200.sms * of[last.variant].warps)
        for last in (launches[begin - 1], launches[-1])
    ]
    return (*_names(shape), forward, floors[0], forward + backward, floors[1], *fills)


def _launch_rows(
    shape: Shape, launches: list[Launch], of: dict[Variant, Report]
) -> Iterator[Cells]:
    for kernel in dict.fromkeys(launch.variant.kernel for launch in launches):
        own = [launch for launch in launches if launch.variant.kernel == kernel]
        times = [predict(launch, of[launch.variant]) for launch in own]
        moved = sum(map(traffic, own)) / sum(launch.elts for launch in own)
        sums = (1e6 * sum(parts) for parts in zip(*times, strict=True))
        yield (*_names(shape), f"`{kernel}`", len(own), moved, *sums)


def _names(shape: Shape) -> tuple[str, str]:
    sizes = f"B{shape.batch} {shape.height}x{shape.width} D{shape.channels} R{shape.rank}"
    return sizes, str(shape.states)


def main(argv: list[str] | None = None) -> int:
    # The interpreter must be off before the kernels are imported in the pool.
    os.environ.pop("TRITON_INTERPRET", None)
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    add("--jobs", type=count, default=1, help="processes (default: 1)")
    add("--markdown", metavar="FILE", type=output, help="write the tables here")
    args = parser.parse_args(argv)

    reports = compile_all(variants(MODEL_SCANS), args.targets, args.jobs)
    text = page(MODEL_SCANS, reports, shlex.join(["python", "tools/compile_kernels.py", *argv]))
    if args.markdown:
        write_atomically(args.markdown, text.encode())
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

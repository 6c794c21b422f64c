"""Compiled kernels: registers, spills, exponentials, wide loads; and what is dispatched.

Triton compiles in a process of its own: the one of the tests may have the interpreter on.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cmamba_ref.ops import selective_scan, selective_scan_2d
from cmamba_ref.testing import scan_2d_arguments, scan_arguments
from tools import compile_kernels
from tools.compile_kernels import (
    TARGETS,
    Launch,
    Loop,
    MapScan,
    Report,
    SequenceScan,
    Variant,
    exps_of_step,
    innermost_loops,
    loop_of,
    record,
    recording,
    traffic,
    variants,
)

FORWARD = ("chunk_state_fwd", "state_passing", "chunk_scan_fwd", "chunk_state_bwd")
# Spilled registers, and bytes of stack per lane in use, at most. Outside their loops ptxas parks a
# register or two of the other kernels, where that lets more warps run; chunk_scan_bwd holds more
# than there are registers. By compute type; raise one only with a measured gain.
FORWARD_SPILL = {"fp32": 0, "fp64": 16}  # loads and stores in the loop
FORWARD_STACK = {"fp32": 32, "fp64": 128}
GRADIENT_STACK = {"fp32": 1024, "fp64": 3072}


def compiled(root: Path, scans: str, jobs: int) -> list[Report]:
    """Reports of the tool for all targets, from a process without triton's interpreter."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    command = ["tools/compile_kernels.py", "--scans", scans, "--jobs", str(jobs), "--json"]
    result = subprocess.run(
        [sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return [_report(entry) for entry in json.loads(result.stdout)["reports"]]


def _report(entry: dict[str, Any]) -> Report:
    variant = Variant(
        entry["variant"]["kernel"],
        *(tuple(entry["variant"][group].items()) for group in ("types", "constants", "options")),
    )
    loops = tuple(Loop(**loop) for loop in entry["loops"])
    fields = ("target", "registers", "stack", "spilled", "shared", "exps_in_ptx")
    return Report(variant, *(entry[name] for name in fields), loops)


@pytest.fixture(
    scope="module", params=["quick", pytest.param("all", marks=pytest.mark.slow)], ids=str
)
def reports(request: pytest.FixtureRequest, root: Path, require_triton: ModuleType) -> list[Report]:
    """QUICK_SCANS (54 variants and targets, a minute), or `all_scans` (an hour)."""
    return compiled(root, request.param, jobs=1 if request.param == "quick" else 2)


def on_cuda(reports: Iterable[Report]) -> list[Report]:
    return [report for report in reports if TARGETS[report.target].backend == "cuda"]


def failing(reports: Iterable[Report], found: Any) -> list[str]:
    """What is wrong, one line for each report for which `found` gives something true."""
    return [
        f"{report.target} {report.variant}: {value}"
        for report in reports
        if (value := found(report))
    ]


def test_all_kernels_compile_for_all_targets(reports: list[Report]) -> None:
    kernels = {(report.variant.kernel, report.target) for report in reports}
    assert kernels == {(k, t) for k in compile_kernels.KERNELS for t in TARGETS}


def test_registers_suffice(reports: list[Report]) -> None:
    limits = {"sm_80": 255, "sm_90": 255, "gfx942": 512}
    assert not failing(reports, lambda r: r.registers > limits[r.target] and r.registers)


def test_forward_does_not_spill_in_its_loops(reports: list[Report]) -> None:
    def spill(report: Report) -> str:
        if report.variant.kernel not in FORWARD:
            return ""
        if report.target == "gfx942":
            return f"{report.spilled} registers" if report.spilled else ""
        in_loop = sum(loop.local for loop in report.loops)
        if in_loop > FORWARD_SPILL[report.variant.real]:
            return f"{in_loop} times in the loop"
        over = report.stack > FORWARD_STACK[report.variant.real]
        return f"{report.stack} bytes of stack" if over else ""

    assert not failing(reports, spill)


def test_scan_gradients_spills_no_more_than_recorded(reports: list[Report]) -> None:
    def spill(report: Report) -> str:
        over = report.stack > GRADIENT_STACK[report.variant.real]
        spills = report.variant.kernel not in FORWARD and over
        return f"{report.stack} bytes of stack" if spills else ""

    assert not failing(reports, spill)


def test_forward_takes_one_exponential_per_state(reports: list[Report]) -> None:
    """And those of softplus and gate, once per channel; before ptxas unrolls and after it."""

    def excess(report: Report) -> str:
        variant, (loop, *_) = report.variant, report.loops
        if (
            variant.kernel not in FORWARD
            or variant.kernel == "state_passing"
            or variant.real != "fp32"
        ):
            return ""
        expected = exps_of_step(variant)
        if report.exps_in_ptx > expected:
            return f"{report.exps_in_ptx} in ptx, not {expected}"
        return f"{loop.exps} in {loop.steps} steps" if loop.exps > loop.steps * expected else ""

    assert not failing(on_cuda(reports), excess)


def test_B_and_C_are_loaded_128_bits_at_a_time(reports: list[Report]) -> None:
    """Where N states fill whole vectors and the projections leave them aligned."""
    sizes = {"fp32": 4, "bf16": 2, "fp64": 8}
    read = {"chunk_state_fwd": "B", "chunk_state_bwd": "C", "chunk_scan_fwd": "BC"}

    def missing(report: Report) -> str:
        variant, (loop, *_) = report.variant, report.loops
        varying = [
            name
            for name in read.get(variant.kernel, "")
            if not variant.constant(f"{name}_CONSTANT")
        ]
        size = sizes[variant.io]
        n, rank = variant.constant("N") * size, variant.constant("RANK") * size
        if n % 16 or rank % 16:
            return ""
        expected = len(varying) * n // 16
        found = loop.wide_loads / loop.steps
        return f"{found} loads of 128 bits, not {expected}" if found < expected else ""

    assert not failing(on_cuda(reports), missing)


# What is compiled is what is dispatched.


def of_kernels(launches: Iterable[Launch]) -> set[Variant]:
    return {launch.variant for launch in launches}


def test_public_scans_dispatch_what_is_recorded(require_triton: ModuleType) -> None:
    """The same kernels, types, constants and options as the descriptions of scans give."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases: list[tuple[Any, dict[str, Any], MapScan | SequenceScan]] = [
        (
            selective_scan_2d,
            scan_2d_arguments(
                batch=2, height=9, width=70, channels=33, n=5, rank=7, dtype=torch.bfloat16
            ),
            MapScan(5, 7, 33, "bf16", images=2, height=9, width=70),
        ),
        (
            selective_scan,
            scan_arguments(
                batch=1, length=70, channels=48, groups=3, n=4, b_form="grouped", c_form="grouped"
            ),
            SequenceScan(4, 48, "fp64", groups=3, gate=True, length=70, images=1),
        ),
    ]
    for scan, arguments, described in cases:
        moved = {
            name: value.detach().to(device).requires_grad_() if torch.is_tensor(value) else value
            for name, value in arguments.items()
        }
        with recording() as launches:
            scan(**moved, backend="triton").sum().backward()
        assert of_kernels(launches) == of_kernels(record(described))


@pytest.mark.parametrize(
    "scan",
    [
        MapScan(16, 12, 192),
        MapScan(1, 1, 1, "fp16", height=1, width=1),
        MapScan(32, 64, 20, "fp64", images=3),
        MapScan(5, 7, 33, images=4096, height=8, width=8),
        SequenceScan(16, 384, "bf16", groups=3, gate=True),
        SequenceScan(32, 48, "fp64", b_constant=True, c_constant=True, softplus=False),
        SequenceScan(2, 1000, "fp16", images=0x10000, length=1),
    ],
    ids=str,
)
def test_run_time_sizes_have_32_bits(
    require_triton: ModuleType, scan: MapScan | SequenceScan
) -> None:
    types = {kind for variant in variants([scan]) for _, kind in variant.types}
    assert {kind for kind in types if not kind.startswith("*")} == {"i32"}


def test_all_has_every_kind_of_variant(require_triton: ModuleType) -> None:
    """Every block, flag and type of every kernel, and N and R of every power of two."""
    found = variants(compile_kernels.all_scans())
    for kernel in compile_kernels.KERNELS:
        own = [variant for variant in found if variant.kernel == kernel]
        assert {variant.real for variant in own} == {"fp32", "fp64"}
        if kernel == "state_passing":
            continue
        assert {variant.io for variant in own} == {"fp32", "bf16", "fp64"}
        assert {variant.constant("BLOCK_N") for variant in own} == {1, 2, 4, 8, 16, 32}
        assert {variant.constant("BLOCK_R") for variant in own} == {1, 4, 8, 16, 32, 64}
        assert {variant.constant("BLOCK_D") for variant in own} >= {32, 64, 128}
        for flag in ("GATE", "SOFTPLUS", "ALIGNED", "B_CONSTANT", "C_CONSTANT"):
            values = {value for variant in own for name, value in variant.constants if name == flag}
            assert values in (set(), {False, True})


# Reading and models.

SASS_TEXT = """
        /*0000*/                   MUFU.EX2 R0, R1 ;
.L_x_1:
        /*0010*/                   S2R R5, SR_CTAID.X ;
.L_x_0:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   MUFU.EX2 R0, R1 ;
        /*0040*/                   STL [R1], R28 ;
        /*0050*/               @P3 BRA `(.L_x_0) ;
        /*0060*/               @P2 BRA `(.L_x_1) ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2);
"""


def test_the_innermost_loop_is_read_off_sass() -> None:
    (body,) = innermost_loops(SASS_TEXT)
    assert loop_of(body, 1) == Loop(
        steps=1, instructions=4, exps=1, special=1, wide_loads=1, local=1
    )


@pytest.mark.parametrize(
    ("registers", "warps"), [(16, 32), (64, 32), (65, 28), (128, 16), (168, 12), (255, 8)]
)
def test_warps_by_registers(require_triton: ModuleType, registers: int, warps: int) -> None:
    variant = record(MapScan(1, 1, 32))[0].variant
    assert Report(variant, "sm_90", registers, 0, 0, 0, 0, ()).warps == warps


def test_work_and_bytes_of_a_scan(require_triton: ModuleType) -> None:
    scan = MapScan(n=4, rank=12, channels=192)
    launches = [launch for launch in record(scan) if launch.variant.kernel == "chunk_scan_fwd"]
    positions = scan.height * scan.width
    elts = 4 * positions * scan.channels * scan.n
    assert sum(launch.elts for launch in launches) == elts
    blocks = scan.channels // launches[0].variant.constant("BLOCK_D")
    assert sum(launch.steps for launch in launches) == 4 * positions * blocks
    # x, the sum over directions in and y out, and half of the projections; then what chunks add.
    first, last = map(traffic, launches)
    whole, projections = 4 * positions * scan.channels, 4 * positions * 4 * (12 + 8)
    assert last - first == whole
    assert 2 * whole + projections / 2 < first < 1.2 * (2 * whole + projections / 2)


def test_the_interpreter_is_refused(
    require_triton: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    variant = record(MapScan(1, 1, 32))[0].variant
    with pytest.raises(RuntimeError, match="`TRITON_INTERPRET` must be unset"):
        compile_kernels.compile_variant(variant, "sm_90")

"""Compiled kernels: registers, spills, exponentials, wide loads; what is compiled is what runs.

Triton compiles in processes of its own: the one of the tests may have the interpreter on.
"""

from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, product
from multiprocessing import get_context
from types import ModuleType
from typing import Any

import pytest
import torch
from profile_scan import Shape

from cmamba_ref.ops import selective_scan, selective_scan_2d
from cmamba_ref.testing import scan_2d_arguments, scan_arguments
from tools import compile_kernels
from tools.compile_kernels import (
    TARGETS,
    Launch,
    Loop,
    Report,
    Scan,
    exps_of_step,
    innermost_loops,
    launch_code,
    loop_of,
    record,
    sequence,
    traffic,
    variants,
)

FORWARD = (
    *("chunk_state_fwd", "state_passing", "chunk_scan_fwd", "chunk_state_bwd", "window_state_fwd"),
)
KERNELS = (*FORWARD, "chunk_scan_bwd")
# Spilled registers, and bytes of stack per lane in use, at most. Outside their loops ptxas parks a
# register or two of the other kernels, where that lets more warps run; chunk_scan_bwd holds more
# than there are registers. By compute type; raise one only with a measured gain.
FORWARD_SPILL = {"fp32": 0, "fp64": 16}  # loads and stores in the loop
FORWARD_STACK = {"fp32": 32, "fp64": 128}
GRADIENT_STACK = {"fp32": 1024, "fp64": 3072}


# Every kernel; both kinds of scan; sizes that fill their power of two and sizes that do not.
QUICK_SCANS = [
    Scan(Shape(1, 128, 128, 192, 16, 12)),
    Scan(Shape(1, 128, 128, 100, 3, 20), "bf16"),
    Scan(sequence(40, 8), gate=True, softplus=False, c_constant=True),
    Scan(sequence(40, 8), packed=True),
]


def all_scans() -> list[Scan]:
    """Return scans of every type, flag and block of channels, and N and R of every kind.

    A kernel sees N and R as a power of two and a mask: 3, 12 and 20 are there for the masks.
    """
    maps = [(d, n, r, "fp32") for n, r, d in product((1, 3, 8, 16, 32), (1, 12), (128, 40, 20))]
    types = ("fp32", "bf16", "fp64")
    maps += [(100, n, r, t) for n, r, t in product((2, 12, 32), (8, 20, 64), types)]
    flags = list(product((False, True), repeat=4))
    return [
        *(Scan(Shape(1, 128, 128, *sizes), dtype) for *sizes, dtype in maps),
        *(
            Scan(sequence(100, n), dtype, 1, *flag)
            for n, dtype, flag in product((2, 8, 32), types, flags)
        ),
        *(Scan(sequence(d, n)) for n in (4, 16) for d in (128, 64, 32, 40, 20)),
        *compile_kernels.MODEL_SCANS,
        *QUICK_SCANS,
    ]


@pytest.fixture(
    scope="module", params=["quick", pytest.param("all", marks=pytest.mark.slow)], ids=str
)
def reports(request: pytest.FixtureRequest, require_triton: ModuleType) -> list[Report]:
    """Of QUICK_SCANS (54 variants and targets, a minute), or of `all_scans` (an hour)."""
    scans, jobs = (QUICK_SCANS, 1) if request.param == "quick" else (all_scans(), 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        return compile_kernels.compile_all(variants(scans), list(TARGETS), jobs)


def on_cuda(reports: Iterable[Report]) -> list[Report]:
    return [report for report in reports if TARGETS[report.target][0] == "cuda"]


def failing(reports: Iterable[Report], found: Any) -> list[str]:
    """One line for each report for which `found` returns something true."""
    return [
        f"{report.target} {report.variant}: {value}"
        for report in reports
        if (value := found(report))
    ]


def test_all_kernels_compile_for_all_targets_within_their_registers(reports: list[Report]) -> None:
    kernels = {(report.variant.kernel, report.target) for report in reports}
    assert kernels == {(kernel, target) for kernel in KERNELS for target in TARGETS}
    limits = {"sm_80": 255, "sm_90": 255, "gfx942": 512}
    assert not failing(reports, lambda r: r.registers > limits[r.target] and r.registers)


def other_keys(scans: list[Scan]) -> list[str]:
    """Launches whose key in triton's cache is not that of what is compiled ahead of time."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    found = []
    for target, launch in product(("sm_90", "gfx942"), chain.from_iterable(map(record, scans))):
        backend = make_backend(GPUTarget(*TARGETS[target]))
        kernel = getattr(launch_code(), launch.variant.kernel)
        given = dict(launch.arguments)
        if target == "gfx942":
            given.pop("maxnreg", None)
        # What `JITFunction.run` does before it compiles.
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        options = {name: x for name, x in given.items() if name not in kernel.arg_names}
        packed = kernel._pack_args(backend, options, *bind(**given))
        ours = compile_kernels.source_of(launch.variant, TARGETS[target])
        if ASTSource(kernel, *packed[1:]).hash() != ours.hash():
            found.append(f"{target} {launch.variant}")
    return found


def test_launches_find_what_was_compiled_ahead(
    monkeypatch: pytest.MonkeyPatch, require_triton: ModuleType
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(other_keys, QUICK_SCANS).result() == []


def test_forward_does_not_spill_in_its_loops(reports: list[Report]) -> None:
    def spill(report: Report) -> str:
        if report.variant.kernel not in FORWARD:
            return ""
        if report.target == "gfx942":
            return f"{report.spilled} registers" if report.spilled else ""
        assert report.loop is not None
        if report.loop.local > FORWARD_SPILL[report.variant.real]:
            return f"{report.loop.local} times in the loop"
        over = report.stack > FORWARD_STACK[report.variant.real]
        return f"{report.stack} bytes of stack" if over else ""

    assert not failing(reports, spill)


def test_scan_gradients_spills_no_more_than_recorded(reports: list[Report]) -> None:
    def spill(report: Report) -> str:
        over = report.stack > GRADIENT_STACK[report.variant.real]
        spills = report.variant.kernel not in FORWARD and over
        return f"{report.stack} bytes of stack" if spills else ""

    assert not failing(reports, spill)


def test_scan_gradients_leaves_room_for_twelve_warps(reports: list[Report]) -> None:
    """On a multiprocessor of NVIDIA's, of which an H100's and an H200's are counted."""

    def too_few(report: Report) -> str:
        is_main = report.variant.kernel == "chunk_scan_bwd" and report.target == "sm_90"
        return f"{report.warps} warps" if is_main and report.warps < 12 else ""

    assert not failing(reports, too_few)


def test_forward_takes_one_exponential_per_state(reports: list[Report]) -> None:
    """And those of softplus and gate, once per channel; before ptxas unrolls and after it."""

    def excess(report: Report) -> str:
        variant, loop = report.variant, report.loop
        assert loop is not None
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
    read = {"chunk_state_fwd": "B", "window_state_fwd": "B", "chunk_state_bwd": "C"}
    read["chunk_scan_fwd"] = "BC"

    def missing(report: Report) -> str:
        variant, loop = report.variant, report.loop
        assert loop is not None
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


def test_public_scans_dispatch_what_is_recorded(require_triton: ModuleType) -> None:
    """The same kernels, types, constants and options as the descriptions of scans give."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases: list[tuple[Any, dict[str, Any], Scan]] = [
        (
            selective_scan_2d,
            scan_2d_arguments(
                batch=2, height=9, width=70, channels=33, n=5, rank=7, dtype=torch.bfloat16
            ),
            Scan(Shape(2, 9, 70, 33, 5, 7), "bf16"),
        ),
        (
            selective_scan,
            scan_arguments(
                batch=1, length=70, channels=48, groups=3, n=4, b_form="grouped", c_form="grouped"
            ),
            Scan(sequence(48, 4, 70), "fp64", groups=3, gate=True),
        ),
    ]
    for scan, arguments, described in cases:
        moved = {
            name: value.detach().to(device).requires_grad_() if torch.is_tensor(value) else value
            for name, value in arguments.items()
        }
        with launch_code().recorded() as launches:
            scan(**moved, backend="triton").sum().backward()
        assert {Launch.of(*one).variant for one in launches} == set(variants([described]))


@pytest.mark.parametrize(
    "scan",
    [
        Scan(Shape(1, 128, 128, 192, 16, 12)),
        Scan(Shape(1, 1, 1, 1, 1, 1), "fp16"),
        Scan(Shape(3, 128, 128, 20, 32, 64), "fp64"),
        Scan(Shape(4096, 8, 8, 33, 5, 7)),
        Scan(sequence(384, 16), "bf16", groups=3, gate=True),
        Scan(sequence(48, 32), "fp64", b_constant=True, c_constant=True, softplus=False),
        Scan(Shape(0x10000, 1, 1, 1000, 2, 0), "fp16"),
    ],
    ids=str,
)
def test_run_time_sizes_have_32_bits(require_triton: ModuleType, scan: Scan) -> None:
    types = {kind for variant in variants([scan]) for _, kind in variant.types}
    assert {kind for kind in types if not kind.startswith("*")} == {"i32"}


def test_all_has_every_kind_of_variant(require_triton: ModuleType) -> None:
    """Every block, flag and type of every kernel, and N and R of every power of two."""
    found = variants(all_scans())
    for kernel in KERNELS:
        own = [variant for variant in found if variant.kernel == kernel]
        assert {variant.real for variant in own} == {"fp32", "fp64"}
        if kernel == "state_passing":
            continue
        assert {variant.io for variant in own} == {"fp32", "bf16", "fp64"}
        assert {variant.constant("BLOCK_N") for variant in own} == {1, 2, 4, 8, 16, 32}
        if kernel != "chunk_scan_bwd":  # which finds dt formed
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
    variant = record(Scan(Shape(1, 128, 128, 32, 1, 1)))[0].variant
    assert Report(variant, "sm_90", registers, 0, 0, 0, 0, None).warps == warps


def test_work_and_bytes_of_a_scan(require_triton: ModuleType) -> None:
    shape = Shape(1, 128, 128, 192, 4, 12)
    launches = [
        launch for launch in record(Scan(shape)) if launch.variant.kernel == "chunk_scan_fwd"
    ]
    positions = shape.height * shape.width
    assert sum(launch.elts for launch in launches) == shape.elts
    blocks = shape.channels // launches[0].variant.constant("BLOCK_D")
    assert sum(launch.steps for launch in launches) == 4 * positions * blocks
    # x, the sum over directions in and y out, and half of the projections; then what chunks add.
    first, last = map(traffic, launches)
    whole, projections = 4 * positions * shape.channels, 4 * positions * 4 * (12 + 8)
    assert last - first == whole
    assert 2 * whole + projections / 2 < first < 1.3 * (2 * whole + projections / 2)

"""Whole scans, forward and backward: the kernels in their order, on prepared tensors.

Both scans are one problem here. A map with its projections has K = 4 directions and forms dt in the
kernels (R > 0); a sequence is a map of one row with K = 1 direction whose delta is given (R = 0).
A and the states have channels last, so that the lanes of a warp read neighbours.
"""

# The checker does not know that a kernel's constexpr parameters take plain values.
# pyright: reportArgumentType=false

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .chunk_scan_bwd import chunk_scan_bwd, chunk_state_bwd, window_state_fwd
from .chunk_scan_fwd import chunk_scan_fwd, chunk_state_fwd, state_passing
from .tiling import CARRY_BLOCK, Plan, block_count, constants, plan


class Scan(NamedTuple):
    """A scan to be done. "C" marks the compute type, fp32 or fp64; all else has the I/O type.

    Tensors are contiguous and start at a multiple of 16 bytes. The batch is not empty.
    """

    x: Tensor  # [B, H, W, D]
    dt_or_proj: Tensor  # projections [B, H, W, 4, R + 2N], or delta [B, H, W, D]
    B: Tensor  # the projections, [B, H, W, G, N], or constant [N, D] (C)
    C: Tensor  # as B
    z: Tensor | None  # gate [B, H, W, D]
    A: Tensor  # [K, N, D] (C)
    dt_weight: Tensor | None  # [K, R, D] (C), or None where delta is given
    dt_bias: Tensor  # [K, D] (C)
    skip: Tensor  # sum over directions [D] (C)
    begins: Tensor | None  # int8 [B, L], 1 where another sequence begins, of a sequence only
    softplus: bool
    groups: int

    @property
    def rank(self) -> int:
        return 0 if self.dt_weight is None else self.dt_weight.shape[1]

    @property
    def is_packed(self) -> bool:
        return self.begins is not None

    @property
    def pairs(self) -> int:
        """Launches of a kernel that does a direction and its reverse."""
        return (self.A.shape[0] + 1) // 2

    def plan(self) -> Plan:
        images, height, width, channels = self.x.shape
        return plan(
            images,
            height * width,
            channels,
            self.groups,
            self.A.shape[1],
            self.rank,
            self.A.dtype,
        )


class Gradients(NamedTuple):
    """Gradients of a scan's arguments, with their shapes and types."""

    x: Tensor
    dt: Tensor  # of the projections, B and C among them, or of delta
    B: Tensor | None  # None where they lie in the projections
    C: Tensor | None
    z: Tensor | None
    A: Tensor
    dt_weight: Tensor | None
    dt_bias: Tensor
    skip: Tensor
    first: Tensor  # of the state before the first position


class Launch(NamedTuple):
    """One launch of a kernel on a one-dimensional grid, with all arguments by name."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]


_recorded: list[Launch] | None = None


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within the block no kernel runs; the list takes the launches of this process instead."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def _launch(kernel: Any, programs: int, **arguments: Any) -> None:
    if _recorded is None:
        kernel[(programs,)](**arguments)
    else:
        _recorded.append(Launch(kernel, programs, arguments))


def _arguments(scan: Scan, plan: Plan, block: int) -> dict[str, Any]:
    """What every scanning kernel takes: parameters, run-time sizes, compile-time sizes."""
    _, height, width, channels = scan.x.shape
    per_group = channels // scan.groups
    return {
        "dt_ptr": scan.dt_or_proj,
        "A_ptr": scan.A,
        "bias_ptr": scan.dt_bias,
        "begins_ptr": scan.begins if scan.is_packed else scan.A,
        "PACKED": scan.is_packed,
        "H": height,
        "W": width,
        "per_group": per_group,
        "groups": scan.groups,
        "directions": scan.A.shape[0],
        "chunks": plan.chunks,
        "chunk_length": min(plan.chunk_length, height * width),
        "blocks": block_count(per_group, block),
        "N": scan.A.shape[1],
        "BLOCK_N": plan.states,
        "RANK": scan.rank,
        "BLOCK_D": block,
        "SOFTPLUS": scan.softplus,
        **LAUNCH_OPTIONS,
    }


# One warp per program, so that a lane keeps its channels; products are added in one rounding.
LAUNCH_OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}


def _dt_weight(scan: Scan, plan: Plan) -> dict[str, Any]:
    """For the kernels that form dt from projections; one that is not read stands for it."""
    weight = scan.dt_bias if scan.dt_weight is None else scan.dt_weight
    return {"weight_ptr": weight, "BLOCK_R": plan.ranks}


def _register_limit() -> dict[str, int]:
    """The option of the compiler for chunk_scan_bwd; AMD's does not have it."""
    return {} if torch.version.hip else {"maxnreg": constants().backward_registers}


def _gate(scan: Scan) -> dict[str, Any]:
    return {"z_ptr": scan.x if scan.z is None else scan.z, "GATE": scan.z is not None}


def _constant(matrix: Tensor) -> bool:
    return matrix.dim() == 2


def _per_chunk(of_image: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """Room for states `[B, K, chunks, N, D]` like `of_image` `[B, K, N, D]`, and for sums over
    steps `[B, K, chunks, D]`."""
    images, directions, n, channels = of_image.shape
    return (
        of_image.new_empty(images, directions, chunks, n, channels),
        of_image.new_empty(images, directions, chunks, channels),
    )


def _carried(
    ends: Tensor, sums: Tensor, A: Tensor, first: Tensor, *, adjoint: bool, packed: bool
) -> Tensor:
    """State or adjoint that enters each chunk `[B, K, chunks, N, D]`, from those of `first`."""
    images, directions, chunks, n, channels = ends.shape
    starts = torch.empty_like(ends)
    blocks = block_count(n * channels, CARRY_BLOCK)
    _launch(
        state_passing,
        images * directions * blocks,
        ends_ptr=ends,
        sums_ptr=sums,
        A_ptr=A,
        first_ptr=first,
        starts_ptr=starts,
        D=channels,
        directions=directions,
        chunks=chunks,
        blocks=blocks,
        N=n,
        CHUNKS=constants().carry_chunks,
        BLOCK_D=CARRY_BLOCK,
        PACKED=packed,
        ADJOINT=adjoint,
        **LAUNCH_OPTIONS,
    )
    return starts


def forward(scan: Scan, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run a scan.

    Args:
        first: state before the first position `[B, K, N, D]`, compute type.

    Returns:
        y `[B, H, W, D]`, I/O type; the last state of a sequence `[B, N, D]`; the state before each
        chunk `[B, K, chunks, N, D]`, which the backward needs.
    """
    images, height, width, channels = scan.x.shape
    directions, n = scan.A.shape[:2]
    acc_dtype, plan = scan.A.dtype, scan.plan()
    arguments = _arguments(scan, plan, plan.block)
    programs = images * plan.chunks * scan.groups * arguments["blocks"]
    inputs = {"x_ptr": scan.x, "B_ptr": scan.B, "B_CONSTANT": _constant(scan.B)}
    inputs |= _dt_weight(scan, plan)

    starts = first.unsqueeze(2)
    if plan.chunks > 1:
        ends, sums = _per_chunk(first, plan.chunks)
        _launch(
            chunk_state_fwd,
            programs * directions,
            ends_ptr=ends,
            sums_ptr=sums,
            **inputs,
            **arguments,
        )
        starts = _carried(ends, sums, scan.A, first, adjoint=False, packed=scan.is_packed)

    y = torch.empty_like(scan.x)
    total = y if y.dtype == acc_dtype else torch.empty_like(y, dtype=acc_dtype)
    last = first.new_zeros(images, n, channels)  # of a map it stays zero
    for first_direction in range(scan.pairs):
        _launch(
            chunk_scan_fwd,
            programs,
            C_ptr=scan.C,
            C_CONSTANT=_constant(scan.C),
            skip_ptr=scan.skip,
            starts_ptr=starts,
            sum_ptr=total,
            y_ptr=y,
            last_ptr=last,
            first_direction=first_direction,
            **inputs,
            **_gate(scan),
            **arguments,
        )
    return y, last, starts


def _entering_adjoints(scan: Scan, plan: Plan, grad_y: Tensor, grad_last: Tensor) -> Tensor:
    """Adjoint that enters each chunk from the steps after it `[B, K, chunks, N, D]`."""
    if plan.chunks == 1:
        return grad_last.unsqueeze(2)
    images, directions = grad_last.shape[:2]
    arguments = _arguments(scan, plan, plan.block)
    ends, sums = _per_chunk(grad_last, plan.chunks)
    programs = images * directions * plan.chunks * scan.groups * arguments["blocks"]
    _launch(
        chunk_state_bwd,
        programs,
        C_ptr=scan.C,
        C_CONSTANT=_constant(scan.C),
        dy_ptr=grad_y,
        ends_ptr=ends,
        sums_ptr=sums,
        **_gate(scan),
        **_dt_weight(scan, plan),
        **arguments,
    )
    return _carried(ends, sums, scan.A, grad_last, adjoint=True, packed=scan.is_packed)


def backward(scan: Scan, starts: Tensor, grad_y: Tensor, grad_last: Tensor) -> Gradients:
    """Gradients of a scan.

    Args:
        starts: the third result of `forward`; its shape is not read.
        grad_y: gradient of y `[B, H, W, D]`, prepared like the arguments of the scan.
        grad_last: gradient of the state after the last position `[B, K, N, D]`, compute type.
    """
    images, height, width, channels = scan.x.shape
    directions, n = scan.A.shape[:2]
    acc_dtype, plan = scan.A.dtype, scan.plan()
    of_windows = _arguments(scan, plan, plan.block)
    arguments = _arguments(scan, plan, plan.backward_block)
    blocks, position = arguments["blocks"], (images, height, width)
    in_pair = (directions + 1) // 2
    recompute_steps = constants().recompute_steps
    windows = block_count(arguments["chunk_length"], recompute_steps)

    checkpoints = starts.new_empty(images, plan.chunks, windows, n, channels)
    grad_x = torch.empty_like(scan.x)
    total = grad_x if grad_x.dtype == acc_dtype else torch.empty_like(grad_x, dtype=acc_dtype)
    grad_z = None if scan.z is None else torch.empty_like(scan.z)
    A_per_chunk, bias_per_chunk = _per_chunk(grad_last, plan.chunks)
    skip_per_chunk = starts.new_empty(images, plan.chunks, channels)
    grad_first = starts.new_zeros(images, n, channels)  # of a map it stays zero
    of_projection = (blocks, in_pair, *position, scan.groups, n)
    of_constant = (images, plan.chunks, n, channels)
    grad_B = starts.new_empty(of_constant if _constant(scan.B) else of_projection)
    grad_C = starts.new_empty(of_constant if _constant(scan.C) else of_projection)
    grad_dt_raw = starts.new_empty(
        in_pair, *position, channels, dtype=acc_dtype if scan.rank else scan.dt_or_proj.dtype
    )
    grad_dt = torch.empty_like(scan.dt_or_proj) if scan.rank else grad_dt_raw[0]
    grad_weight = None if scan.dt_weight is None else torch.empty_like(scan.dt_weight)

    adjoints = _entering_adjoints(scan, plan, grad_y, grad_last)
    programs = images * plan.chunks * scan.groups
    for first_direction in range(scan.pairs):
        for direction in range(first_direction, directions, 2):
            shared = {
                "x_ptr": scan.x,
                "B_ptr": scan.B,
                "checkpoints_ptr": checkpoints,
                "direction": direction,
                "images": images,
                "B_CONSTANT": _constant(scan.B),
                "RECOMPUTE_STEPS": recompute_steps,
            }
            _launch(
                window_state_fwd,
                programs * of_windows["blocks"],
                starts_ptr=starts,
                time_steps_ptr=grad_dt_raw,
                **shared,
                **_dt_weight(scan, plan),
                **of_windows,
            )
            _launch(
                chunk_scan_bwd,
                programs * blocks,
                C_ptr=scan.C,
                dy_ptr=grad_y,
                skip_ptr=scan.skip,
                adjoints_ptr=adjoints,
                sum_ptr=total,
                dx_ptr=grad_x,
                ddt_raw_ptr=grad_dt_raw,
                dB_ptr=grad_B,
                dC_ptr=grad_C,
                dz_ptr=scan.x if grad_z is None else grad_z,
                dA_ptr=A_per_chunk,
                dbias_ptr=bias_per_chunk,
                dskip_ptr=skip_per_chunk,
                dfirst_ptr=grad_first,
                C_CONSTANT=_constant(scan.C),
                ALIGNED=plan.aligned,
                **_gate(scan),
                **shared,
                **arguments,
                **_register_limit(),
            )
        if grad_weight is not None:
            pair = slice(first_direction, None, 2)
            grad_dt[:, :, :, pair], grad_weight[pair] = _projection_gradients(
                scan, pair, grad_dt_raw, grad_B, grad_C
            )

    return Gradients(
        grad_x,
        grad_dt,
        None if scan.rank else _summed(grad_B, scan.B),
        None if scan.rank else _summed(grad_C, scan.C),
        grad_z,
        A_per_chunk.sum((0, 2)),
        grad_weight,
        bias_per_chunk.sum((0, 2)),
        skip_per_chunk.sum((0, 1)),
        grad_first,
    )


def _summed(partial: Tensor, like: Tensor) -> Tensor:
    """Gradient of B or C of a sequence from what the programs left."""
    return partial.sum((0, 1)).to(like.dtype)


def _projection_gradients(
    scan: Scan, pair: slice, grad_dt_raw: Tensor, grad_B: Tensor, grad_C: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the projections `[B, H, W, P, R + 2N]` and dt_weight `[P, R, D]` of a pair."""
    assert scan.dt_weight is not None
    weight = scan.dt_weight[pair]
    r = scan.dt_or_proj[:, :, :, pair, : scan.rank].movedim(3, 0).to(weight.dtype)
    grad_r = torch.einsum("pbhwd,prd->bhwpr", grad_dt_raw, weight)
    # One product per line, then a sum: a product over all positions would round more.
    grad_weight = (r.flatten(1, 2).mT @ grad_dt_raw.flatten(1, 2)).sum(1)
    grad_B = grad_B.sum(0).squeeze(-2).movedim(0, 3)
    grad_C = grad_C.sum(0).squeeze(-2).movedim(0, 3)
    return torch.cat((grad_r, grad_B, grad_C), dim=-1).to(scan.dt_or_proj.dtype), grad_weight

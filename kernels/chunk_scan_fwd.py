"""Forward kernels: what each chunk adds to the state, the carry between chunks, the outputs.

`chunk_state_fwd` and `state_passing` run only where the sequence is cut into chunks;
`chunk_scan_fwd` then starts every chunk from the right state. All sizes but N and R are run-time
values that the compiler does not specialise on, so that few variants exist.
"""

# The checker knows Python, not Triton's language.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportArgumentType=false

import triton
import triton.language as tl

from .primitives import (
    LOG2_E,
    channels_of,
    decay_of,
    infinite_at_begin,
    load_channels,
    load_dt_raw,
    load_parameters,
    load_projection,
    load_states,
    sigmoid,
    split_program,
    start_walk,
    store_states,
    time_step,
    walk,
)

SIZES = ("H", "W", "per_group", "groups", "directions", "chunks", "chunk_length", "blocks")


@triton.jit(do_not_specialize=SIZES)
def chunk_state_fwd(
    x_ptr,  # [images, H, W, D]
    dt_ptr,  # projections [images, H, W, 4, RANK + 2N], or delta [images, H, W, D]
    B_ptr,  # projections, [images, H, W, groups, N], or with B_CONSTANT [N, D]
    A_ptr,  # [directions, N, D]
    weight_ptr,  # [directions, RANK, D]
    bias_ptr,  # [directions, D]
    begins_ptr,  # [images, H, W], not 0 where another sequence begins, read with PACKED
    ends_ptr,  # out: [images, directions, chunks, N, D]
    sums_ptr,  # out: [images, directions, chunks, D]
    H,
    W,
    per_group,
    groups,
    directions,
    chunks,
    chunk_length,
    blocks,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr,
    B_CONSTANT: tl.constexpr,
):
    """The state that each chunk reaches from zero, and the sum of its time steps."""
    acc_dtype: tl.constexpr = A_ptr.dtype.element_ty
    image_direction, chunk, group, block = split_program(chunks, groups, blocks)
    image, direction = image_direction // directions, image_direction % directions
    D = groups * per_group
    channels, mask = channels_of(group, block, per_group, BLOCK_D)
    base = image.to(tl.int64) * H * W

    A, bias, weight = load_parameters(
        A_ptr, weight_ptr, bias_ptr, direction, channels, mask, D, N, BLOCK_N, RANK, BLOCK_R
    )
    if B_CONSTANT:
        B = load_states(B_ptr, 0, channels, mask, D, N, BLOCK_N)

    h = tl.zeros((BLOCK_N, BLOCK_D), acc_dtype)
    total = tl.zeros((BLOCK_D,), acc_dtype)
    position, left = start_walk(0, chunk, chunk_length, H, W, direction)
    for _ in tl.range(0, tl.minimum(chunk_length, H * W - chunk * chunk_length)):
        row = base + position
        x = load_channels(x_ptr, row, channels, mask, D, acc_dtype)
        dt_raw = load_dt_raw(
            dt_ptr, row, direction, channels, mask, D, weight, bias, RANK, BLOCK_R, N
        )
        dt = time_step(dt_raw, SOFTPLUS)
        if not B_CONSTANT:
            B = load_projection(
                B_ptr, row, direction, group, groups, RANK, RANK, N, BLOCK_N, acc_dtype
            )[:, None]
        h = decay_of(dt, A, begins_ptr, row, PACKED) * h + (dt * x)[None, :] * B
        total += infinite_at_begin(dt, begins_ptr, row, PACKED)
        position, left = walk(position, left, H, W, direction, False)

    index = image_direction * chunks + chunk
    store_states(ends_ptr, index, h, channels, mask, D, N, BLOCK_N)
    tl.store(sums_ptr + index.to(tl.int64) * D + channels, total, mask=mask)


@triton.jit
def _after_both(decay_1, state_1, decay_2, state_2):
    """Two stretches of the recurrence as one: decay, then what is added."""
    return decay_1 * decay_2, decay_2 * state_1 + state_2


@triton.jit(do_not_specialize=("D", "directions", "chunks", "blocks"))
def state_passing(
    ends_ptr,  # [images, directions, chunks, N, D]
    sums_ptr,  # [images, directions, chunks, D]
    A_ptr,  # [directions, N, D]
    first_ptr,  # [images, directions, N, D]
    starts_ptr,  # out: [images, directions, chunks, N, D]
    D,
    directions,
    chunks,
    blocks,
    N: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACKED: tl.constexpr,
    ADJOINT: tl.constexpr,
):
    """The state that enters each chunk, from the one that enters the first.

    A chunk's decay needs no product over its steps: it is exp(A times the sum of dt), or 0 where
    that sum is infinite (see `infinite_at_begin`). N and D are one axis of features here, of which
    BLOCK_D make a program; CHUNKS chunks are scanned together. With ADJOINT the states are
    adjoints, which enter a chunk where its direction leaves it.
    """
    image_direction = tl.program_id(0) // blocks
    direction = image_direction % directions
    feature = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = feature < N * D
    j = tl.arange(0, CHUNKS)
    base = image_direction.to(tl.int64) * chunks
    backwards = (direction >= 2) != ADJOINT

    A = tl.load(A_ptr + direction * N * D + feature, mask=mask, other=0.0) * LOG2_E
    state = tl.load(
        first_ptr + image_direction.to(tl.int64) * N * D + feature, mask=mask, other=0.0
    )
    entry = base + tl.where(backwards, chunks - 1, 0)
    tl.store(starts_ptr + entry * (N * D) + feature, state, mask=mask)
    for start in tl.range(0, chunks, CHUNKS):
        rank = start + j
        chunk = base + tl.where(backwards, chunks - 1 - rank, rank)
        both = (rank < chunks)[:, None] & mask[None, :]
        sums = tl.load(sums_ptr + chunk[:, None] * D + (feature % D)[None, :], mask=both, other=0.0)
        ends = tl.load(ends_ptr + chunk[:, None] * (N * D) + feature[None, :], mask=both, other=0.0)
        decay = tl.exp2(A[None, :] * sums)
        if PACKED:
            decay = tl.where(sums == float("inf"), 0.0, decay)
        decay, added = tl.associative_scan((decay, ends), 0, _after_both)
        after = decay * state[None, :] + added

        # What leaves one chunk enters the next one, so the results go one place further.
        following = base + tl.where(backwards, chunks - 2 - rank, rank + 1)
        places = starts_ptr + following[:, None] * (N * D) + feature[None, :]
        tl.store(places, after, mask=(rank + 1 < chunks)[:, None] & mask[None, :])
        state = tl.sum(tl.where((j == CHUNKS - 1)[:, None], after, 0.0), 0)


@triton.jit(do_not_specialize=(*SIZES, "first_direction"))
def chunk_scan_fwd(
    x_ptr,  # [images, H, W, D]
    dt_ptr,  # projections [images, H, W, 4, RANK + 2N], or delta [images, H, W, D]
    B_ptr,  # projections, [images, H, W, groups, N], or with B_CONSTANT [N, D]
    C_ptr,  # as B
    z_ptr,  # gate [images, H, W, D], read with GATE
    A_ptr,  # [directions, N, D]
    weight_ptr,  # [directions, RANK, D]
    bias_ptr,  # [directions, D]
    begins_ptr,  # [images, H, W], not 0 where another sequence begins, read with PACKED
    skip_ptr,  # [D]
    starts_ptr,  # [images, directions, chunks, N, D]
    sum_ptr,  # in and out: sum over directions [images, H, W, D] in A's type
    y_ptr,  # out: [images, H, W, D], written by the last direction
    last_ptr,  # out: [images, N, D], written with RANK 0
    H,
    W,
    per_group,
    groups,
    directions,
    chunks,
    chunk_length,
    blocks,
    first_direction,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr,
    GATE: tl.constexpr,
    B_CONSTANT: tl.constexpr,
    C_CONSTANT: tl.constexpr,
):
    """The outputs of a direction and of its reverse, over the same chunk, added in this order.

    One launch per pair of directions, rows first, so that every output is summed by one program at
    a time and always in the same order: nothing is atomic, and results repeat bit for bit.
    """
    acc_dtype: tl.constexpr = A_ptr.dtype.element_ty
    image, chunk, group, block = split_program(chunks, groups, blocks)
    D = groups * per_group
    channels, mask = channels_of(group, block, per_group, BLOCK_D)
    base = image.to(tl.int64) * H * W
    skip = load_channels(skip_ptr, 0, channels, mask, D, acc_dtype)
    if B_CONSTANT:
        B = load_states(B_ptr, 0, channels, mask, D, N, BLOCK_N)
    if C_CONSTANT:
        C = load_states(C_ptr, 0, channels, mask, D, N, BLOCK_N)

    steps = tl.minimum(chunk_length, H * W - chunk * chunk_length)
    tl.assume(steps > 0)  # or the predicate of an empty loop costs a spill
    for direction in tl.range(first_direction, directions, 2):
        is_last = direction == directions - 1
        skip_now = tl.where(direction == 0, skip, 0.0)
        A, bias, weight = load_parameters(
            A_ptr, weight_ptr, bias_ptr, direction, channels, mask, D, N, BLOCK_N, RANK, BLOCK_R
        )
        index = (image * directions + direction) * chunks + chunk
        h = load_states(starts_ptr, index, channels, mask, D, N, BLOCK_N)

        position, left = start_walk(0, chunk, chunk_length, H, W, direction)
        for _ in tl.range(0, steps):
            row = base + position
            x = load_channels(x_ptr, row, channels, mask, D, acc_dtype)
            dt_raw = load_dt_raw(
                dt_ptr, row, direction, channels, mask, D, weight, bias, RANK, BLOCK_R, N
            )
            dt = time_step(dt_raw, SOFTPLUS)
            if not B_CONSTANT:
                B = load_projection(
                    B_ptr, row, direction, group, groups, RANK, RANK, N, BLOCK_N, acc_dtype
                )[:, None]
            if not C_CONSTANT:
                C = load_projection(
                    C_ptr, row, direction, group, groups, RANK + N, RANK, N, BLOCK_N, acc_dtype
                )[:, None]
            h = decay_of(dt, A, begins_ptr, row, PACKED) * h + (dt * x)[None, :] * B
            y = tl.sum(h * C, 0) + skip_now * x
            y += load_channels(sum_ptr, row, channels, mask & (direction > 0), D, acc_dtype)
            tl.store(sum_ptr + row * D + channels, y, mask=mask & (direction < directions - 1))
            if GATE:
                z = load_channels(z_ptr, row, channels, mask, D, acc_dtype)
                y = y * z * sigmoid(z)
            tl.store(
                y_ptr + row * D + channels,
                y.to(y_ptr.dtype.element_ty),
                mask=mask & is_last,
            )
            position, left = walk(position, left, H, W, direction, False)

        # The reverse reads the sums that other lanes may have written.
        tl.debug_barrier()
        if RANK == 0:
            is_end = mask & (chunk == chunks - 1)
            store_states(last_ptr, image, h, channels, is_end, D, N, BLOCK_N)

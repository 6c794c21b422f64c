"""Backward kernels: adjoints between chunks, checkpoints within them, and the gradients.

With g the adjoint that arrives from the steps after t, the recurrence is read backwards:

    dh_t = g + C_t dy_t            g <- exp(dt_t A) dh_t

`chunk_state_bwd` and `state_passing` (with ADJOINT) find the adjoint that enters each chunk.
Then, for one direction after the other, `window_state_fwd` repeats the forward and keeps the state
before every window of RECOMPUTE_STEPS steps, and `chunk_scan_bwd` goes through the windows last to
first, repeats each with its states in registers and reads it backwards. Sums over channels and over
chunks are left in partial results, one per program, that the caller adds: no atomics, so two runs
give the same bits.
"""

# The checker knows Python, not Triton's language.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportArgumentType=false

import triton
import triton.language as tl

from .chunk_scan_fwd import SIZES
from .primitives import (
    LN_2,
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
    softplus_slope,
    split_program,
    start_walk,
    store_states,
    time_step,
    walk,
)


@triton.jit(do_not_specialize=SIZES)
def chunk_state_bwd(
    dt_ptr,  # projections [images, H, W, 4, RANK + 2N], or delta [images, H, W, D]
    C_ptr,  # projections, [images, H, W, groups, N], or with C_CONSTANT [N, D]
    z_ptr,  # gate [images, H, W, D], read with GATE
    dy_ptr,  # [images, H, W, D]
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
    GATE: tl.constexpr,
    C_CONSTANT: tl.constexpr,
):
    """The adjoint that each chunk passes to the one before it when none arrives, and sum of dt."""
    acc_dtype: tl.constexpr = A_ptr.dtype.element_ty
    image_direction, chunk, group, block = split_program(chunks, groups, blocks)
    image, direction = image_direction // directions, image_direction % directions
    D = groups * per_group
    channels, mask = channels_of(group, block, per_group, BLOCK_D)
    base = image.to(tl.int64) * H * W

    A, bias, weight = load_parameters(
        A_ptr, weight_ptr, bias_ptr, direction, channels, mask, D, N, BLOCK_N, RANK, BLOCK_R
    )
    if C_CONSTANT:
        C = load_states(C_ptr, 0, channels, mask, D, N, BLOCK_N)

    g = tl.zeros((BLOCK_N, BLOCK_D), acc_dtype)
    total = tl.zeros((BLOCK_D,), acc_dtype)
    steps = tl.minimum(chunk_length, H * W - chunk * chunk_length)
    position, left = start_walk(steps - 1, chunk, chunk_length, H, W, direction)
    for _ in tl.range(0, steps):
        row = base + position
        dy = load_channels(dy_ptr, row, channels, mask, D, acc_dtype)
        if GATE:
            z = load_channels(z_ptr, row, channels, mask, D, acc_dtype)
            dy = dy * z * sigmoid(z)
        dt_raw = load_dt_raw(
            dt_ptr, row, direction, channels, mask, D, weight, bias, RANK, BLOCK_R, N
        )
        dt = time_step(dt_raw, SOFTPLUS)
        if not C_CONSTANT:
            C = load_projection(
                C_ptr, row, direction, group, groups, RANK + N, RANK, N, BLOCK_N, acc_dtype
            )[:, None]
        g = decay_of(dt, A, begins_ptr, row, PACKED) * (g + dy[None, :] * C)
        total += infinite_at_begin(dt, begins_ptr, row, PACKED)
        position, left = walk(position, left, H, W, direction, True)

    index = image_direction * chunks + chunk
    store_states(ends_ptr, index, g, channels, mask, D, N, BLOCK_N)
    tl.store(sums_ptr + index.to(tl.int64) * D + channels, total, mask=mask)


@triton.jit(do_not_specialize=(*SIZES, "direction", "images"))
def window_state_fwd(
    x_ptr,  # [images, H, W, D]
    dt_ptr,  # projections [images, H, W, 4, RANK + 2N], or delta [images, H, W, D]
    B_ptr,  # projections, [images, H, W, groups, N], or with B_CONSTANT [N, D]
    A_ptr,  # [directions, N, D]
    weight_ptr,  # [directions, RANK, D]
    bias_ptr,  # [directions, D]
    begins_ptr,  # [images, H, W], not 0 where another sequence begins, read with PACKED
    starts_ptr,  # [images, directions, chunks, N, D]
    checkpoints_ptr,  # out: [images, chunks, windows, N, D]
    time_steps_ptr,  # out: dt [pair, images, H, W, D], with RANK > 0
    H,
    W,
    per_group,
    groups,
    directions,
    chunks,
    chunk_length,
    blocks,
    direction,
    images,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RECOMPUTE_STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr,
    B_CONSTANT: tl.constexpr,
):
    """The forward of a direction once more: the state before every window, and dt."""
    acc_dtype: tl.constexpr = A_ptr.dtype.element_ty
    image, chunk, group, block = split_program(chunks, groups, blocks)
    D = groups * per_group
    channels, mask = channels_of(group, block, per_group, BLOCK_D)
    base = image.to(tl.int64) * H * W
    pair_base = (direction // 2 * images + image).to(tl.int64) * H * W

    A, bias, weight = load_parameters(
        A_ptr, weight_ptr, bias_ptr, direction, channels, mask, D, N, BLOCK_N, RANK, BLOCK_R
    )
    if B_CONSTANT:
        B = load_states(B_ptr, 0, channels, mask, D, N, BLOCK_N)

    index = (image * directions + direction) * chunks + chunk
    h = load_states(starts_ptr, index, channels, mask, D, N, BLOCK_N)
    checkpoint = (image * chunks + chunk) * tl.cdiv(chunk_length, RECOMPUTE_STEPS)
    position, left = start_walk(0, chunk, chunk_length, H, W, direction)
    steps = tl.minimum(chunk_length, H * W - chunk * chunk_length)
    for first in tl.range(0, steps, RECOMPUTE_STEPS):
        store_states(checkpoints_ptr, checkpoint, h, channels, mask, D, N, BLOCK_N)
        checkpoint += 1
        for _ in tl.range(0, tl.minimum(RECOMPUTE_STEPS, steps - first)):
            row = base + position
            x = load_channels(x_ptr, row, channels, mask, D, acc_dtype)
            dt_raw = load_dt_raw(
                dt_ptr, row, direction, channels, mask, D, weight, bias, RANK, BLOCK_R, N
            )
            dt = time_step(dt_raw, SOFTPLUS)
            if RANK > 0:
                tl.store(time_steps_ptr + (pair_base + position) * D + channels, dt, mask=mask)
            if not B_CONSTANT:
                B = load_projection(
                    B_ptr, row, direction, group, groups, RANK, RANK, N, BLOCK_N, acc_dtype
                )[:, None]
            h = decay_of(dt, A, begins_ptr, row, PACKED) * h + (dt * x)[None, :] * B
            position, left = walk(position, left, H, W, direction, False)


@triton.jit(do_not_specialize=(*SIZES, "direction", "images"))
def chunk_scan_bwd(
    x_ptr,  # [images, H, W, D]
    dt_ptr,  # projections [images, H, W, 4, RANK + 2N], or delta [images, H, W, D]
    B_ptr,  # projections, [images, H, W, groups, N], or with B_CONSTANT [N, D]
    C_ptr,  # as B
    z_ptr,  # gate [images, H, W, D], read with GATE
    dy_ptr,  # [images, H, W, D]
    A_ptr,  # [directions, N, D]
    bias_ptr,  # [directions, D]
    begins_ptr,  # [images, H, W], not 0 where another sequence begins, read with PACKED
    skip_ptr,  # [D]
    checkpoints_ptr,  # state before every window [images, chunks, windows, N, D]
    adjoints_ptr,  # entering each chunk [images, directions, chunks, N, D]
    sum_ptr,  # in and out: sum of dx over directions [images, H, W, D] in A's type
    dx_ptr,  # out: [images, H, W, D], written by the last direction
    ddt_raw_ptr,  # [pair, images, H, W, D], in: dt with RANK > 0, out: gradient before softplus
    dB_ptr,  # out: [blocks, pair, images, H, W, groups, N], or [images, chunks, N, D]
    dC_ptr,  # out: as dB
    dz_ptr,  # out: [images, H, W, D], with GATE
    dA_ptr,  # out: [images, directions, chunks, N, D]
    dbias_ptr,  # out: [images, directions, chunks, D]
    dskip_ptr,  # out: [images, chunks, D], written by the first direction
    dfirst_ptr,  # out: gradient of the initial state [images, N, D], with RANK 0
    H,
    W,
    per_group,
    groups,
    directions,
    chunks,
    chunk_length,
    blocks,
    direction,
    images,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RECOMPUTE_STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr,
    GATE: tl.constexpr,
    B_CONSTANT: tl.constexpr,
    C_CONSTANT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """All gradients of a direction, over a chunk."""
    acc_dtype: tl.constexpr = A_ptr.dtype.element_ty
    if ALIGNED:
        # Lets the compiler see a multiple of 16. A lane may then own four neighbouring channels,
        # and fewer lanes take part in a sum over channels.
        per_group = per_group // 16 * 16
    image, chunk, group, block = split_program(chunks, groups, blocks)
    D = groups * per_group
    channels, mask = channels_of(group, block, per_group, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    base = image.to(tl.int64) * H * W
    skip = load_channels(skip_ptr, 0, channels, mask, D, acc_dtype)
    if B_CONSTANT:
        B = load_states(B_ptr, 0, channels, mask, D, N, BLOCK_N)
        dB_sum = tl.zeros((BLOCK_N, BLOCK_D), acc_dtype)
    if C_CONSTANT:
        C = load_states(C_ptr, 0, channels, mask, D, N, BLOCK_N)
        dC_sum = tl.zeros((BLOCK_N, BLOCK_D), acc_dtype)

    is_first = direction == 0
    pair_image = direction // 2 * images + image
    pair_base = pair_image.to(tl.int64) * H * W
    shares = ((block * ((directions + 1) // 2 * images)) + pair_image).to(tl.int64) * H * W
    A = load_states(A_ptr, direction, channels, mask, D, N, BLOCK_N) * LOG2_E
    bias = load_channels(bias_ptr, direction, channels, mask, D, acc_dtype)
    index = (image * directions + direction) * chunks + chunk
    steps = tl.minimum(chunk_length, H * W - chunk * chunk_length)
    windows = tl.cdiv(steps, RECOMPUTE_STEPS)
    checkpoint = (image * chunks + chunk) * tl.cdiv(chunk_length, RECOMPUTE_STEPS) + windows

    g = load_states(adjoints_ptr, index, channels, mask, D, N, BLOCK_N)
    dA = tl.zeros((BLOCK_N, BLOCK_D), acc_dtype)
    dbias = tl.zeros((BLOCK_D,), acc_dtype)
    dskip = tl.zeros((BLOCK_D,), acc_dtype)
    for i in tl.range(0, windows):
        window = windows - 1 - i
        checkpoint -= 1
        h = load_states(checkpoints_ptr, checkpoint, channels, mask, D, N, BLOCK_N)
        position, left = start_walk(window * RECOMPUTE_STEPS, chunk, chunk_length, H, W, direction)
        positions = ()
        time_steps = ()
        states = ()
        for j in tl.static_range(RECOMPUTE_STEPS):
            # Steps beyond the end of the chunk stand at its last position, with dt and dy 0.
            inside = window * RECOMPUTE_STEPS + j < steps
            row = base + position
            if RANK > 0:
                dt = load_channels(ddt_raw_ptr, pair_base + position, channels, mask, D, acc_dtype)
            else:
                dt_raw = load_channels(dt_ptr, row, channels, mask, D, acc_dtype) + bias
                dt = time_step(dt_raw, SOFTPLUS)
            dt = tl.where(inside, dt, 0.0)
            positions = positions + (position,)
            time_steps = time_steps + (dt,)
            states = states + (h,)
            if j < RECOMPUTE_STEPS - 1:
                x = load_channels(x_ptr, row, channels, mask, D, acc_dtype)
                if not B_CONSTANT:
                    B = load_projection(
                        B_ptr, row, direction, group, groups, RANK, RANK, N, BLOCK_N, acc_dtype
                    )[:, None]
                h = decay_of(dt, A, begins_ptr, row, PACKED) * h + (dt * x)[None, :] * B
                next_position, next_left = walk(position, left, H, W, direction, False)
                goes_on = window * RECOMPUTE_STEPS + j + 1 < steps
                position = tl.where(goes_on, next_position, position)
                left = tl.where(goes_on, next_left, left)

        for j in tl.static_range(RECOMPUTE_STEPS - 1, -1, -1):
            inside = window * RECOMPUTE_STEPS + j < steps
            position, dt = positions[j], time_steps[j]
            row = base + position
            x = load_channels(x_ptr, row, channels, mask, D, acc_dtype)
            dy = load_channels(dy_ptr, row, channels, mask & inside, D, acc_dtype)
            if not B_CONSTANT:
                B = load_projection(
                    B_ptr, row, direction, group, groups, RANK, RANK, N, BLOCK_N, acc_dtype
                )[:, None]
            if not C_CONSTANT:
                C = load_projection(
                    C_ptr, row, direction, group, groups, RANK + N, RANK, N, BLOCK_N, acc_dtype
                )[:, None]
            decay = decay_of(dt, A, begins_ptr, row, PACKED)
            if PACKED:  # a step beyond the end hands the adjoint on
                decay = tl.where(inside, decay, 1.0)
            decayed = decay * states[j]
            input = dt * x
            h = decayed + input[None, :] * B
            if GATE:
                z = load_channels(z_ptr, row, channels, mask, D, acc_dtype)
                gate = sigmoid(z)
                y = tl.sum(h * C, 0) + skip * x
                dz = dy * y * gate * (1.0 + z * (1.0 - gate))
                tl.store(
                    dz_ptr + row * D + channels,
                    dz.to(dz_ptr.dtype.element_ty),
                    mask=mask & inside,
                )
                dy = dy * z * gate

            dh = g + dy[None, :] * C
            dinput = tl.sum(dh * B, 0)
            ddecay = dh * decayed
            dA += ddecay * dt[None, :]
            ddt = dinput * x + tl.sum(ddecay * A, 0) * LN_2
            if SOFTPLUS:
                ddt *= softplus_slope(dt)
            ddt = tl.where(inside, ddt, 0.0)
            dbias += ddt
            tl.store(
                ddt_raw_ptr + (pair_base + position) * D + channels,
                ddt.to(ddt_raw_ptr.dtype.element_ty),
                mask=mask & inside,
            )

            dx = dinput * dt + tl.where(is_first, skip, 0.0) * dy
            dskip += dy * x
            dx += load_channels(
                sum_ptr, row, channels, mask & inside & (direction > 0), D, acc_dtype
            )
            not_last = inside & (direction < directions - 1)
            tl.store(sum_ptr + row * D + channels, dx, mask=mask & not_last)
            last = inside & (direction == directions - 1)
            tl.store(dx_ptr + row * D + channels, dx.to(dx_ptr.dtype.element_ty), mask=mask & last)

            if B_CONSTANT:
                dB_sum += dh * input[None, :]
            else:
                tl.store(
                    dB_ptr + ((shares + position) * groups + group) * N + n,
                    tl.sum(dh * input[None, :], 1),
                    mask=(n < N) & inside,
                )
            if C_CONSTANT:
                dC_sum += h * dy[None, :]
            else:
                tl.store(
                    dC_ptr + ((shares + position) * groups + group) * N + n,
                    tl.sum(h * dy[None, :], 1),
                    mask=(n < N) & inside,
                )
            g = decay * dh

    store_states(dA_ptr, index, dA, channels, mask, D, N, BLOCK_N)
    tl.store(dbias_ptr + index.to(tl.int64) * D + channels, dbias, mask=mask)
    tl.store(
        dskip_ptr + (image * chunks + chunk).to(tl.int64) * D + channels,
        dskip,
        mask=mask & is_first,
    )
    if RANK == 0:
        store_states(dfirst_ptr, image, g, channels, mask & (chunk == 0), D, N, BLOCK_N)
    if B_CONSTANT:
        store_states(dB_ptr, image * chunks + chunk, dB_sum, channels, mask, D, N, BLOCK_N)
    if C_CONSTANT:
        store_states(dC_ptr, image * chunks + chunk, dC_sum, channels, mask, D, N, BLOCK_N)

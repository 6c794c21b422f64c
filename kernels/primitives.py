"""What the kernels are made of: softplus, the walk over a map, and the loads of one position.

Conventions of all kernels. A program is one warp (one wavefront) and serves one image b, one chunk
c of the scan order and one block of channels; its state is `[N, BLOCK_D]`, channels across lanes,
so that the sums over N need no exchange between lanes. Exponentials have base 2. Directions 0 and 2
visit the map row by row, 1 and 3 column by column; 2 and 3 walk backwards. `mask` says which
channels of the block exist; dt before the softplus is `dt_raw`.
"""

# The checker knows Python, not Triton's language.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _log1p(e, TERMS: tl.constexpr):
    """log(1 + e) for 0 <= e <= 1, accurate relative to itself also for tiny e.

    2 artanh(s) with s = e / (2 + e) <= 1/3, as its Taylor series in s². log(1 + e) computed as it
    is written loses all digits of a small e, which is where dt lives.
    """
    s = e / (e + 2.0)
    square = s * s
    total = square * 0.0 + 1.0 / (2 * TERMS - 1)
    for i in tl.static_range(TERMS - 2, -1, -1):
        total = total * square + 1.0 / (2 * i + 1)
    return 2.0 * s * total


@triton.jit
def softplus(x):
    """log(1 + exp(x)) in x's type, fp32 or fp64."""
    # (1/9)^8 / 17 is below fp32's rounding, (1/9)^17 / 35 below fp64's.
    TERMS: tl.constexpr = 17 if x.dtype == tl.float64 else 8
    return tl.maximum(x, 0.0) + _log1p(tl.exp2(-tl.abs(x) * LOG2_E), TERMS)


@triton.jit
def softplus_slope(y):
    """The derivative of softplus where its value is y: 1 - exp(-y), with all digits of a tiny y."""
    # Taylor's series below 1/2, where 0.5^8 / 9! is below fp32's rounding and 0.5^14 / 15! below
    # fp64's.
    TERMS: tl.constexpr = 14 if y.dtype == tl.float64 else 8
    total = y * 0.0 + 1.0
    for i in tl.static_range(TERMS, 1, -1):
        total = 1.0 - total * y * (1.0 / i)
    return tl.where(y < 0.5, total * y, 1.0 - tl.exp2(-y * LOG2_E))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without overflow."""
    e = tl.exp2(-tl.abs(x) * LOG2_E)
    return tl.where(x >= 0, 1.0, e) / (e + 1.0)


@triton.jit
def split_program(chunks, groups, blocks):
    """This program's (image and direction, chunk, group, block within the group).

    Blocks run fastest, so that programs that read the same projections run together.
    """
    p = tl.program_id(0)
    block = p % blocks
    p = p // blocks
    group = p % groups
    p = p // groups
    return p // chunks, p % chunks, group, block


@triton.jit
def channels_of(group, block, per_group, BLOCK_D: tl.constexpr):
    """Channels `[BLOCK_D]` of a block, and which of them exist. A block lies within one group."""
    within = block * BLOCK_D + tl.arange(0, BLOCK_D)
    return group * per_group + within, within < per_group


@triton.jit
def start_walk(step, chunk, chunk_length, H, W, direction):
    """The raster position at a step of a chunk, and how far it is from the turn to the next line.

    A chunk is a run of the row-major or column-major order, numbered from its begin; a backward
    direction enters it at its end. Returns (position, steps left in this line).
    """
    along_columns = direction % 2 == 1
    length = tl.where(along_columns, H, W)
    stop = tl.minimum(chunk * chunk_length + chunk_length, H * W)
    t = tl.where(direction >= 2, stop - 1 - step, chunk * chunk_length + step)
    line = t // length
    offset = t - line * length
    position = tl.where(along_columns, offset * W + line, t)
    return position, tl.where(direction >= 2, offset, length - 1 - offset)


@triton.jit
def walk(position, left, H, W, direction, BACK: tl.constexpr):
    """The next position of the direction and the steps then left; with BACK the one before."""
    along_columns = direction % 2 == 1
    length = tl.where(along_columns, H, W)
    sign = tl.where((direction >= 2) != BACK, -1, 1)
    # From the end of a column to the begin of the next one; rows follow each other in memory.
    turn = tl.where(along_columns, 1 - (H - 1) * W, 1)
    along = tl.where(along_columns, W, 1)
    if BACK:
        at_turn = left == length - 1
        left = tl.where(at_turn, 0, left + 1)
    else:
        at_turn = left == 0
        left = tl.where(at_turn, length - 1, left - 1)
    return position + sign * tl.where(at_turn, turn, along), left


@triton.jit
def load_states(pointer, index, channels, mask, D, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row `index` of a tensor `[rows, N, D]` as `[BLOCK_N, BLOCK_D]`, zero where nothing is."""
    n = tl.arange(0, BLOCK_N)
    offsets = (tl.cast(index, tl.int64) * N + n[:, None]) * D + channels[None, :]
    return tl.load(pointer + offsets, mask=(n < N)[:, None] & mask[None, :], other=0.0)


@triton.jit
def store_states(pointer, index, x, channels, mask, D, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """The inverse of `load_states`."""
    n = tl.arange(0, BLOCK_N)
    offsets = (tl.cast(index, tl.int64) * N + n[:, None]) * D + channels[None, :]
    tl.store(pointer + offsets, x, mask=(n < N)[:, None] & mask[None, :])


@triton.jit
def load_channels(pointer, row, channels, mask, D, acc_dtype: tl.constexpr):
    """One position `[BLOCK_D]` of a tensor `[rows, D]`."""
    return tl.load(pointer + row * D + channels, mask=mask, other=0.0).to(acc_dtype)


@triton.jit
def load_projection(
    pointer,
    row,
    direction,
    group,
    groups,
    OFFSET: tl.constexpr,
    RANK: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    acc_dtype: tl.constexpr,
):
    """B or C of one position `[BLOCK_N]`.

    They lie in the projections `[rows, 4, RANK + 2N]`, from OFFSET on, where dt is formed from
    those (RANK > 0), else in a tensor of their own `[rows, groups, N]`.
    """
    n = tl.arange(0, BLOCK_N)
    if RANK > 0:
        WIDTH: tl.constexpr = RANK + 2 * N
        begin = row * (4 * WIDTH) + direction * WIDTH + OFFSET
    else:
        begin = row * (groups * N) + group * N
    if N == BLOCK_N:
        return tl.load(pointer + begin + n).to(acc_dtype)
    return tl.load(pointer + begin + n, mask=n < N, other=0.0).to(acc_dtype)


@triton.jit
def load_dt_weight(
    pointer, direction, channels, mask, D, RANK: tl.constexpr, BLOCK_R: tl.constexpr
):
    """dt_weight `[4, RANK, D]` of a direction as `[BLOCK_R, BLOCK_D]`."""
    r = tl.arange(0, BLOCK_R)
    offsets = (direction * RANK + r[:, None]).to(tl.int64) * D + channels[None, :]
    return tl.load(pointer + offsets, mask=(r < RANK)[:, None] & mask[None, :], other=0.0)


@triton.jit
def load_parameters(
    A_ptr,
    weight_ptr,
    bias_ptr,
    direction,
    channels,
    mask,
    D,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A for base 2 `[BLOCK_N, BLOCK_D]`, dt_bias `[BLOCK_D]` and dt_weight `[BLOCK_R, BLOCK_D]`.

    With RANK 0 there is no dt_weight, and something that nobody reads stands for it.
    """
    acc_dtype: tl.constexpr = A_ptr.dtype.element_ty
    A = load_states(A_ptr, direction, channels, mask, D, N, BLOCK_N) * LOG2_E
    bias = load_channels(bias_ptr, direction, channels, mask, D, acc_dtype)
    weight = bias
    if RANK > 0:
        weight = load_dt_weight(weight_ptr, direction, channels, mask, D, RANK, BLOCK_R)
    return A, bias, weight


@triton.jit
def load_dt_raw(
    pointer,
    row,
    direction,
    channels,
    mask,
    D,
    weight,
    bias,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    N: tl.constexpr,
):
    """weight r + bias `[BLOCK_D]` from projections `[rows, 4, RANK + 2N]`, or delta + bias.

    With RANK 0 the pointer is that of delta `[rows, D]`.
    """
    if RANK > 0:
        WIDTH: tl.constexpr = RANK + 2 * N
        r = tl.arange(0, BLOCK_R)
        begin = row * (4 * WIDTH) + direction * WIDTH
        values = tl.load(pointer + begin + r, mask=r < RANK, other=0.0).to(bias.dtype)
        return tl.sum(values[:, None] * weight, 0) + bias
    return load_channels(pointer, row, channels, mask, D, bias.dtype) + bias


@triton.jit
def decay_of(dt, A, begins_ptr, row, PACKED: tl.constexpr):
    """exp(dt A) `[BLOCK_N, BLOCK_D]`; with PACKED, 0 where another sequence begins."""
    decay = tl.exp2(dt[None, :] * A)
    if PACKED:
        decay = tl.where(tl.load(begins_ptr + row) != 0, 0.0, decay)
    return decay


@triton.jit
def infinite_at_begin(dt, begins_ptr, row, PACKED: tl.constexpr):
    """dt, with PACKED infinite where another sequence begins: a sum then tells of any."""
    if PACKED:
        dt = tl.where(tl.load(begins_ptr + row) != 0, float("inf"), dt)
    return dt


@triton.jit
def time_step(dt_raw, SOFTPLUS: tl.constexpr):
    """dt from `dt_raw`."""
    if SOFTPLUS:
        return softplus(dt_raw)
    return dt_raw

"""One block of a scan, forward and backward: the engine under the chunked backend.

The recurrence `h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t`, `y_t = <C_t, h_t>` is sequential in t and
element-wise in everything else. Three decisions make that fast without a compiled kernel:

1. *Blocks.* The sequence is cut into blocks whose decays and states fit in cache. All that is not
   sequential (exp, the outer products, the sum over N) is done for a whole block in one call; the
   recurrence itself is one in-place `addcmul_` per step. Nothing of size L * D * N ever exists.
2. *Chunks.* Where one position is too small to fill a call, a block is cut into equal chunks
   that advance side by side. A first sweep finds what each chunk adds to its end state, a short
   loop carries the states from chunk to chunk, and the second sweep starts where it should.
3. *Recomputation.* The forward keeps the state at the start of every block. The backward visits
   the blocks last to first, repeats the forward of each, then sweeps back through it.

Axes: L positions, N states, S batch, G groups, D channels of a group. A block of chunks * steps
positions is [steps, N, chunks, S, G, D]; axes along which a tensor is constant have size 1. D is
innermost so that calls run over contiguous memory, with B and C as scalars. No sum depends on
timing, so results repeat bit for bit.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Floats of one block buffer, of which the backward holds three.
BLOCK_FLOATS = 256 * 1024
MAX_BLOCK_LENGTH = 1024
MIN_BLOCK_LENGTH = 8
# Floats that one step of the recurrence should update to be worth the call.
STEP_FLOATS = 8 * 1024


def block_length(state_floats: int) -> int:
    """Positions per block, a power of two, for a state of that many floats (all of S, N, G, D).

    It is found by comparisons only, so that it stays a plain int when the sizes are symbolic.
    """
    length = MAX_BLOCK_LENGTH
    while length > MIN_BLOCK_LENGTH and length * state_floats > BLOCK_FLOATS:
        length //= 2
    return length


def block_count(length: int, state_floats: int) -> int:
    """Blocks of a sequence of `length` positions; the last one may be shorter."""
    size = block_length(state_floats)
    return (length + size - 1) // size


def _chunk_count(length: int, state_floats: int) -> int:
    """Equal chunks of a block: enough to fill STEP_FLOATS, at most the square root of length."""
    wanted = STEP_FLOATS // max(state_floats, 1)
    while wanted > 1 and (length % wanted or wanted * wanted > length):
        wanted -= 1
    return max(wanted, 1)


class Block(NamedTuple):
    """Where a block lies: positions start to stop, seen as chunks * steps."""

    start: int
    stop: int
    chunks: int
    steps: int

    def split(self, x: Tensor) -> Tensor:
        """The block's positions x [length, n, ...] as [steps, n, chunks, ...], a view."""
        return x.unflatten(0, (self.chunks, self.steps)).movedim(0, 2)

    def view(self, x: Tensor) -> Tensor:
        """This block of x [L, n, ...] as [steps, n, chunks, ...], or of x [1, n, ...], constant."""
        if x.shape[0] == 1:
            return x.unsqueeze(2)
        return self.split(x[self.start : self.stop])


def plan(length: int, state_floats: int) -> list[Block]:
    """The blocks of a sequence of `length` positions, first to last."""
    size = block_length(state_floats)
    blocks = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        chunks = _chunk_count(stop - start, state_floats)
        blocks.append(Block(start, stop, chunks, (stop - start) // chunks))
    return blocks


class Buffer(NamedTuple):
    """Scratch memory of one block, whole and step by step."""

    whole: Tensor  # [steps, N, chunks, S, G, D]
    at: tuple[Tensor, ...]  # its steps, each [N, chunks, S, G, D]


class Scratch:
    """Buffers that every block of a scan uses again: decays, states and, backward, gradients."""

    def __init__(self, like: Tensor, count: int, blocks: list[Block], state: torch.Size):
        self._state = state
        floats = (blocks[0].stop - blocks[0].start) * state.numel()  # none is longer than the first
        self._memory = like.new_empty(count, floats)
        self._cut: dict[tuple[int, int], list[Buffer]] = {}

    def buffers(self, block: Block) -> list[Buffer]:
        """The buffers, cut for this block. Blocks of one form share the views: they cost time."""
        form = (block.chunks, block.steps)
        if form not in self._cut:
            n, *rest = self._state
            floats = block.chunks * block.steps * self._state.numel()
            wholes = self._memory[:, :floats].unflatten(1, (block.steps, n, block.chunks, *rest))
            self._cut[form] = [Buffer(whole, whole.unbind(0)) for whole in wholes]
        return self._cut[form]


def _sum_over_n(x: Tensor, weights: Tensor) -> Tensor:
    """Sum over n of x * weights, [steps, N, chunks, S, G, D] to [steps, 1, chunks, S, G, D]."""
    total = x[:, 0] * weights[:, 0]
    for n in range(1, x.shape[1]):
        total.addcmul_(x[:, n], weights[:, n])
    return total.unsqueeze(1)


def _carry(first: Tensor, ends: Tensor, decay: Tensor) -> Tensor:
    """State before each chunk, from the state before the first and what every chunk adds.

    first [N, S, G, D]; ends, decay (of a whole chunk) and the result [N, chunks, S, G, D].
    """
    starts = torch.empty_like(ends)
    starts[:, 0] = first
    for j in range(1, starts.shape[1]):
        torch.addcmul(ends[:, j - 1], decay[:, j - 1], starts[:, j - 1], out=starts[:, j])
    return starts


def _chunk_decay(dt: Tensor, A: Tensor) -> Tensor:
    """Product of the decays of each chunk [N, chunks, S, G, D], as the exp of a sum."""
    return torch.exp(dt.sum(0) * A[0])


def run_states(
    dt: Tensor, dtu: Tensor, A: Tensor, B: Tensor, first: Tensor, decay: Buffer, states: Buffer
) -> Tensor:
    """Fills the buffers decay and states of a block.

    Args:
        dt, dtu: time steps and time steps times inputs, `[steps, 1, chunks, S, G, D]`.
        A: `[1, N, 1, 1, G, D]`.
        B: `[steps, N, chunks, S, G, 1]` or constant.
        first: state before the block `[N, S, G, D]`.

    Returns:
        State before each chunk `[N, chunks, S, G, D]`.
    """
    torch.mul(dt, A, out=decay.whole)
    decay.whole.exp_()
    torch.mul(dtu, B, out=states.whole)

    if states.whole.shape[2] == 1:
        starts = first.unsqueeze(1)
    else:
        ends = states.at[0].clone()
        for a, bu in zip(decay.at[1:], states.at[1:], strict=True):
            torch.addcmul(bu, a, ends, out=ends)
        starts = _carry(first, ends, _chunk_decay(dt, A))

    state = starts
    for a, bu in zip(decay.at, states.at, strict=True):
        state = bu.addcmul_(a, state)
    return starts


def forward_block(
    dt: Tensor, dtu: Tensor, A: Tensor, B: Tensor, C: Tensor, first: Tensor, buffers: list[Buffer]
) -> tuple[Tensor, Tensor]:
    """Output `[steps, 1, chunks, S, G, D]` and last state `[N, S, G, D]`; arguments as above."""
    decay, states = buffers
    run_states(dt, dtu, A, B, first, decay, states)
    return _sum_over_n(states.whole, C), states.at[-1][:, -1].clone()


class BlockGradients(NamedTuple):
    """Gradients of a block. `dt` holds the part that does not come through dtu = dt * u."""

    dt: Tensor
    dtu: Tensor
    A: Tensor  # not yet summed over chunks and batch: [N, chunks, S, G, D]
    B: Tensor
    C: Tensor
    first: Tensor


def backward_block(
    grad_y: Tensor,
    grad_last: Tensor,
    dt: Tensor,
    dtu: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    first: Tensor,
    buffers: list[Buffer],
) -> BlockGradients:
    """Gradients of a block from those of its output and of its last state.

    With g_t the gradient of h_t, the recurrence runs backwards: `g_t = C_t dy_t + a_{t+1} g_{t+1}`
    where `a_t = exp(dt_t A)`. Then dC_t = dy_t h_t, the gradient of B_t is g_t dt_t u_t, and that
    of the exponent dt_t A is w_t = g_t a_t h_{t-1}.
    """
    decay, states, grads = buffers
    starts = run_states(dt, dtu, A, B, first, decay, states)

    torch.mul(grad_y, C, out=grads.whole)
    last, earlier = grads.at[-1], grads.at[-2::-1]
    decay_after = decay.at[:0:-1]  # of the step that follows each of the earlier ones
    if states.whole.shape[2] == 1:
        last.add_(grad_last.unsqueeze(1))
    else:
        ends = last.clone()
        for g, a in zip(earlier, decay_after, strict=True):
            torch.addcmul(g, a, ends, out=ends)
        ends *= decay.at[0]
        # The same carry as in the forward, from the last chunk to the first.
        chunk_decay = _chunk_decay(dt, A)
        last.add_(_carry(grad_last, ends.flip(1), chunk_decay.flip(1)).flip(1))
    grad = last
    for g, a in zip(earlier, decay_after, strict=True):
        grad = g.addcmul_(a, grad)

    # Each buffer is overwritten by products to sum, as soon as nothing else needs it.
    exponent = decay.whole.mul_(grads.whole)
    grad_first = exponent[0, :, 0].clone()
    exponent[0].mul_(starts)
    exponent[1:].mul_(states.whole[:-1])
    grad_dt = _sum_over_n(exponent, A)
    grad_A = exponent.mul_(dt).sum(0)
    grad_dtu = _sum_over_n(grads.whole, B)
    grad_B = grads.whole.mul_(dtu).sum_to_size(B.shape)
    grad_C = states.whole.mul_(grad_y).sum_to_size(C.shape)
    return BlockGradients(grad_dt, grad_dtu, grad_A, grad_B, grad_C, grad_first)

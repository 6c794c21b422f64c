"""One block of a scan, forward and backward: the engine under the chunked backend.

The recurrence `h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t`, `y_t = <C_t, h_t>` is sequential in t and
element-wise in everything else. Four decisions make that fast without a compiled kernel:

1. *Blocks.* The sequence is cut into blocks whose decays and states fit in cache. All that is not
   sequential (exp, the outer products, the sums over N or D) is done for a whole block in one call;
   the recurrence itself is one in-place `addcmul_` per step. Nothing of size L * D * N ever exists.
2. *Chunks.* Where one position is too small to fill a call, a block is cut into equal chunks
   that advance side by side. A first sweep finds what each chunk adds to its end state, a short
   loop carries the states from chunk to chunk, and the second sweep starts where it should.
3. *Recomputation.* Of the states, at most those at the start of every segment of a few blocks are
   kept. The backward visits segments and blocks last to first, repeats the forward of each, then
   sweeps back through it.
4. *Base 2.* Decays are `exp2(dt_t (A log2 e))`: measured on a CPU with AVX-512, torch's exp2 takes
   a third of the time of its exp, which would be half of the time of a scan.

Axes: L positions, S batch, G groups, N states, D channels of a group. A block of chunks * steps
positions is [steps, chunks, S, G, N, D]; axes along which a tensor is constant have size 1. D is
innermost so that calls run over contiguous memory, N next to it so that sums over N are matrix
products. No sum depends on timing, so results repeat bit for bit.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LOG2_E = math.log2(math.e)

# Floats of one block buffer, of which the forward holds two and the backward three.
BLOCK_FLOATS = 512 * 1024
MAX_BLOCK_LENGTH = 1024
MIN_BLOCK_LENGTH = 8
# Floats that one step of the recurrence should update to be worth the call.
STEP_FLOATS = 8 * 1024
# Blocks per segment: with more of them there are fewer states to keep and more to find again.
SEGMENT_BLOCKS = 2
# Sums over fewer states than this cost less one state at a time than as matrix products.
MATMUL_STATES = 4


def block_length(state: Sequence[int]) -> int:
    """Positions per block for states of that shape `[S, G, N, D]`: a power of two.

    It is found by comparisons only, so that it stays a plain int when the sizes are symbolic.
    """
    length = MAX_BLOCK_LENGTH
    while length > MIN_BLOCK_LENGTH and length * math.prod(state) > BLOCK_FLOATS:
        length //= 2
    return length


def segment_length(state: Sequence[int]) -> int:
    """Positions between the states that are kept, for states of that shape `[S, G, N, D]`."""
    return SEGMENT_BLOCKS * block_length(state)


def count_of(size: int, length: int) -> int:
    """Blocks or segments of `size` in so many positions; the last one may be shorter."""
    return (length + size - 1) // size


def _chunk_count(length: int, state_floats: int) -> int:
    """Equal chunks of a block: enough to fill STEP_FLOATS, at most the square root of length."""
    wanted = STEP_FLOATS // max(state_floats, 1)
    while wanted > 1 and (length % wanted or wanted * wanted > length):
        wanted -= 1
    return max(wanted, 1)


class Operands(NamedTuple):
    """What a scan reads, in the axes of the blocks."""

    u: Tensor  # [L, S, G, 1, D]
    dt: Tensor  # [L, S, G, 1, D]
    B: Tensor  # [L, S, G, N, 1] or constant [1, 1, G, N, D]
    C: Tensor  # likewise
    begins: Tensor | None = None  # where another sequence begins [L, S, 1, 1, 1]


class Block(NamedTuple):
    """Where a block lies: positions start to stop, seen as chunks * steps."""

    start: int
    stop: int
    chunks: int
    steps: int

    def view(self, x: Tensor) -> Tensor:
        """This block of x [L, ...] as [steps, chunks, ...], or all of a constant x [1, ...]."""
        if x.shape[0] == 1:
            return x.unsqueeze(1)
        return x[self.start : self.stop].unflatten(0, (self.chunks, self.steps)).transpose(0, 1)

    def of(self, operands: Operands) -> Operands:
        """This block of each operand."""
        u, dt, B, C = map(self.view, operands[:4])
        begins = operands.begins
        return Operands(u, dt, B, C, None if begins is None else self.view(begins))


class Buffer(NamedTuple):
    """Scratch memory of one block, whole and step by step."""

    whole: Tensor  # [steps, chunks, S, G, N, D]
    at: tuple[Tensor, ...]  # its steps, each [chunks, S, G, N, D]


class Scratch:
    """Buffers that every block of a scan uses again: decays, states and, backward, gradients."""

    def __init__(self, state: Tensor, longest: int, count: int):
        self._state = state.shape
        self._memory = state.new_empty(count, longest * state.numel())
        self._cut: dict[tuple[int, int], list[Buffer]] = {}

    def buffers(self, block: Block) -> list[Buffer]:
        """The buffers, cut for this block. Blocks of one form share the views: they cost time."""
        form = (block.steps, block.chunks)
        if form not in self._cut:
            floats = block.chunks * block.steps * self._state.numel()
            wholes = self._memory[:, :floats].unflatten(1, (*form, *self._state))
            self._cut[form] = [Buffer(whole, whole.unbind(0)) for whole in wholes]
        return self._cut[form]


def _sum_over_states(x: Tensor, weights: Tensor) -> Tensor:
    """Sum over N of x * weights: x [..., N, D], weights [..., N, 1 or D], result [..., 1, D]."""
    states = x.shape[-2]
    if weights.shape[-1] == 1 and states >= MATMUL_STATES:
        return weights.mT @ x
    total = x[..., :1, :] * weights[..., :1, :]
    for n in range(1, states):
        total.addcmul_(x[..., n : n + 1, :], weights[..., n : n + 1, :])
    return total


def _gradient_of_weights(x: Tensor, grad: Tensor, weights: Tensor) -> Tensor:
    """Gradient of `weights` of `_sum_over_states` from that of its result [..., 1, D].

    May overwrite x.
    """
    if weights.shape[-1] == 1 and x.shape[-2] >= MATMUL_STATES:
        product = (grad @ x.mT).mT  # not x @ grad.mT: that copies a strided grad badly
    else:
        product = x.mul_(grad)
    constant = [axis for axis in range(x.dim()) if weights.shape[axis] != product.shape[axis]]
    return product.sum(constant, keepdim=True) if constant else product.clone()


def _carry(first: Tensor, ends: Tensor, decay: Tensor) -> Tensor:
    """State before each chunk, from the state before the first and what every chunk adds.

    first [S, G, N, D]; ends, decay (of a whole chunk) and the result [chunks, S, G, N, D].
    """
    starts = torch.empty_like(ends)
    starts[0] = first
    before = starts.unbind(0)
    for add, factor, state, following in zip(ends, decay, before, before[1:], strict=False):
        torch.addcmul(add, factor, state, out=following)
    return starts


def _chunk_decay(dt: Tensor, A2: Tensor, begins: Tensor | None) -> Tensor:
    """Product of the decays of each chunk [chunks, S, G, N, D], as the exponential of a sum."""
    decay = torch.exp2(dt.sum(0) * A2)
    return decay if begins is None else decay.masked_fill_(begins.any(0), 0)


def run_states(
    dt: Tensor,
    dtu: Tensor,
    A2: Tensor,
    B: Tensor,
    begins: Tensor | None,
    first: Tensor,
    decay: Buffer,
    states: Buffer,
) -> Tensor:
    """Fill the buffers decay and states of a block.

    Args:
        dt, dtu: time steps and time steps times inputs, `[steps, chunks, S, G, 1, D]`.
        A2: A times log2 e, `[G, N, D]`.
        B: `[steps, chunks, S, G, N, 1]` or constant.
        begins: where another sequence begins `[steps, chunks, S, 1, 1, 1]`, or None.
        first: state before the block `[S, G, N, D]`.

    Returns:
        State before each chunk `[chunks, S, G, N, D]`.
    """
    torch.mul(dt, A2, out=decay.whole)
    torch.exp2(decay.whole, out=decay.whole)
    if begins is not None:
        decay.whole.masked_fill_(begins, 0)
    torch.mul(dtu, B, out=states.whole)

    if len(states.at[0]) == 1:
        starts = first.unsqueeze(0)
    else:
        ends = states.at[0].clone()
        for a, bu in zip(decay.at[1:], states.at[1:], strict=True):
            torch.addcmul(bu, a, ends, out=ends)
        starts = _carry(first, ends, _chunk_decay(dt, A2, begins))

    state = starts
    for a, bu in zip(decay.at, states.at, strict=True):
        state = bu.addcmul_(a, state)
    return starts


class Gradients(NamedTuple):
    """Gradients of `Operands`, and that of A, not yet summed over the batch `[S, G, N, D]`."""

    u: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    A: Tensor


class Blocks:
    """The blocks of one scan in eager PyTorch.

    The forward takes blocks of `block_length`, the backward segments of `segment_length`: both are
    powers of two.

    Args:
        A: `[G, N, D]`.
        state: any state, for its form `[S, G, N, D]`.
        length: L.
        softplus: whether `forward` applies softplus to `dt`; `backward` takes it after softplus.
    """

    def __init__(self, A: Tensor, state: Tensor, length: int, softplus: bool = False):
        self._A, self._A2, self._softplus = A, A * LOG2_E, softplus
        self._state_floats = state.numel()
        longest = min(length, block_length(state.shape))
        self._new_scratch = partial(Scratch, state, longest)
        self._scratch: Scratch | None = None

    def _prepare(self, start: int, stop: int, buffers: int) -> tuple[Block, list[Buffer]]:
        if self._scratch is None:
            self._scratch = self._new_scratch(buffers)
        chunks = _chunk_count(stop - start, self._state_floats)
        block = Block(start, stop, chunks, (stop - start) // chunks)
        return block, self._scratch.buffers(block)

    def forward(
        self, start: int, stop: int, operands: Operands, first: Tensor, y: Tensor
    ) -> Tensor:
        """Fill y `[L, S, G, 1, D]` from start to stop; first state to last `[S, G, N, D]`."""
        block, (decay, states) = self._prepare(start, stop, 2)
        u, dt, B, C, begins = block.of(operands)
        if self._softplus:
            dt = F.softplus(dt)
        run_states(dt, dt * u, self._A2, B, begins, first, decay, states)
        block.view(y).copy_(_sum_over_states(states.whole, C))
        return states.at[-1][-1].clone()

    def backward(
        self,
        start: int,
        stop: int,
        operands: Operands,
        first: Tensor,
        grad_y: Tensor,
        grad_last: Tensor,
        gradients: Gradients,
    ) -> Tensor:
        """Of one segment: fill gradients of u and dt from start to stop and add to the others;
        gradient of the last state to that of the first."""
        size = block_length(first.shape)
        firsts = [first]
        for at in range(start, stop - size, size):
            firsts.append(self._last_state(at, at + size, operands, firsts[-1]))
        for at in reversed(range(start, stop, size)):
            block = (at, min(at + size, stop))
            arguments = (operands, firsts.pop(), grad_y, grad_last, gradients)
            grad_last = self._backward_of_block(*block, *arguments)
        return grad_last

    def _last_state(self, start: int, stop: int, operands: Operands, first: Tensor) -> Tensor:
        block, (decay, states, _) = self._prepare(start, stop, 3)
        u, dt, B, _, begins = block.of(operands)
        run_states(dt, dt * u, self._A2, B, begins, first, decay, states)
        return states.at[-1][-1].clone()

    def _backward_of_block(
        self,
        start: int,
        stop: int,
        operands: Operands,
        first: Tensor,
        grad_y: Tensor,
        grad_last: Tensor,
        gradients: Gradients,
    ) -> Tensor:
        """As `backward`, of one block.

        With g_t the gradient of h_t, the recurrence runs backwards: `g_t = C_t dy_t + a_{t+1}
        g_{t+1}` where `a_t = exp(dt_t A)`. Then dC_t = dy_t h_t, the gradient of B_t is
        g_t dt_t u_t, and that of the exponent dt_t A is w_t = g_t a_t h_{t-1}.
        """
        block, (decay, states, grads) = self._prepare(start, stop, 3)
        u, dt, B, C, begins = block.of(operands)
        grad_y = block.view(grad_y)
        dtu = dt * u
        starts = run_states(dt, dtu, self._A2, B, begins, first, decay, states)

        torch.mul(grad_y, C, out=grads.whole)
        last, earlier = grads.at[-1], grads.at[-2::-1]
        decay_after = decay.at[:0:-1]  # of the step that follows each of the earlier ones
        if block.chunks == 1:
            last.add_(grad_last)
        else:
            ends = last.clone()
            for g, a in zip(earlier, decay_after, strict=True):
                torch.addcmul(g, a, ends, out=ends)
            ends *= decay.at[0]
            # The same carry as in the forward, from the last chunk to the first.
            chunk_decay = _chunk_decay(dt, self._A2, begins)
            last.add_(_carry(grad_last, ends.flip(0), chunk_decay.flip(0)).flip(0))
        grad = last
        for g, a in zip(earlier, decay_after, strict=True):
            grad = g.addcmul_(a, grad)

        # Each buffer is overwritten by products to sum, as soon as nothing else needs it.
        exponent = decay.whole.mul_(grads.whole)
        grad_first = exponent[0, 0].clone()
        exponent[0].mul_(starts)
        exponent[1:].mul_(states.whole[:-1])
        grad_dtu = _sum_over_states(grads.whole, B)
        block.view(gradients.u).copy_(grad_dtu * dt)
        block.view(gradients.B).add_(_gradient_of_weights(grads.whole, dtu, B))
        block.view(gradients.C).add_(_gradient_of_weights(states.whole, grad_y, C))
        grad_dt = torch.mul(exponent, self._A, out=grads.whole).sum(-2, keepdim=True)
        block.view(gradients.dt).copy_(grad_dt.addcmul_(grad_dtu, u))
        gradients.A.add_(exponent.mul_(dt).sum((0, 1)))
        return grad_first

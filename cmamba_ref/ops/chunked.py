"""The fast eager scan: plain PyTorch, CPU and GPU, forward and a deterministic backward.

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

Axes, everywhere in this file: L positions, N states, S batch, G groups, D channels of a group.
A block of `chunks * steps` positions is seen as [steps, N, chunks, S, G, D]; D is innermost so that
every call runs over contiguous memory with B and C as scalars. Nothing here accumulates in an order
that depends on timing, so results repeat bit for bit.
"""

import torch
from torch import Tensor

# Floats of one block buffer, of which the backward holds three: 512 kB each in fp32.
BLOCK_FLOATS = 128 * 1024
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
    """Equal chunks of a block of `length` positions: enough for STEP_FLOATS, at most sqrt(length)."""
    wanted = STEP_FLOATS // max(state_floats, 1)
    while wanted > 1 and (length % wanted or wanted * wanted > length):
        wanted -= 1
    return max(wanted, 1)


class _Blocks:
    """Where the blocks of a scan lie, and how to look at tensors block by block."""

    def __init__(self, u: Tensor, A: Tensor):
        self.length, self.batch = u.shape[0], u.shape[1]
        self.state_shape = (A.shape[0], *u.shape[1:])  # [N, S, G, D]
        self.state_floats = A.numel() * self.batch
        self.size = block_length(self.state_floats)
        self.count = block_count(self.length, self.state_floats)
        # The longest block has size positions, or all of them where the sequence is shorter.
        self.buffer_floats = min(self.size, self.length) * self.state_floats

    def select(self, index: int) -> None:
        """Makes block `index` the current one."""
        self.start = index * self.size
        self.stop = min(self.start + self.size, self.length)
        self.chunks = _chunk_count(self.stop - self.start, self.state_floats)
        self.steps = (self.stop - self.start) // self.chunks

    def view(self, x: Tensor) -> Tensor:
        """The current block of x [L or 1, n, ...] as [steps or 1, n, chunks or 1, ...], a view."""
        if x.shape[0] == 1:  # the same at every position
            return x.unsqueeze(2)
        return x[self.start : self.stop].unflatten(0, (self.chunks, self.steps)).movedim(0, 2)

    def buffer(self, flat: Tensor) -> Tensor:
        """Scratch memory as [steps, N, chunks, S, G, D]."""
        n, *rest = self.state_shape
        floats = self.steps * self.chunks * self.state_floats
        return flat[:floats].view(self.steps, n, self.chunks, *rest)


def _sum_over_n(weights: Tensor, x: Tensor, out: Tensor) -> None:
    """out [steps, chunks, S, G, D] = sum over n of weights * x, both [.., N, chunks, S, G, D]."""
    torch.mul(weights[:, 0], x[:, 0], out=out)
    for n in range(1, x.shape[1]):
        out.addcmul_(weights[:, n], x[:, n])


def _carry(first: Tensor, ends: Tensor, chunk_decay: Tensor) -> Tensor:
    """State before each chunk, given the state before the first and what each chunk adds.

    first [N, S, G, D]; ends, chunk_decay and the result [N, chunks, S, G, D].
    """
    starts = torch.empty_like(ends)
    starts[:, 0] = first
    for j in range(1, starts.shape[1]):
        torch.addcmul(ends[:, j - 1], chunk_decay[:, j - 1], starts[:, j - 1], out=starts[:, j])
    return starts


def _chunk_decay(dt: Tensor, A: Tensor) -> Tensor:
    """Product of all decays of a chunk [N, chunks, S, G, D]: exp of the sum, no running product."""
    return torch.exp(dt.sum(0) * A[0])


def _run_states(
    dt: Tensor, dtu: Tensor, A: Tensor, B: Tensor, first: Tensor, decay: Tensor, states: Tensor
) -> Tensor:
    """Fills decay and states [steps, N, chunks, S, G, D] of a block; returns the chunks' starts."""
    torch.mul(dt, A, out=decay)
    decay.exp_()
    torch.mul(dtu, B, out=states)

    decay_at, state_at = decay.unbind(0), states.unbind(0)
    if states.shape[2] == 1:
        starts = first.unsqueeze(1)
    else:
        ends = state_at[0].clone()
        for a, bu in zip(decay_at[1:], state_at[1:], strict=True):
            torch.addcmul(bu, a, ends, out=ends)
        starts = _carry(first, ends, _chunk_decay(dt, A))

    state = starts
    for a, bu in zip(decay_at, state_at, strict=True):
        state = bu.addcmul_(a, state)
    return starts


def scan_forward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence without skip, gate and bias.

    Args:
        u, dt: `[L, S, G, D]`, one floating type for all arguments.
        A: `[N, G, D]`.
        B, C: `[L, N, S, G, 1]` varying or `[1, N, 1, G, D]` constant.
        initial_state: `[N, S, G, D]`.

    Returns:
        y `[L, S, G, D]`, last state `[N, S, G, D]`, states before each block `[blocks, N, S, G, D]`.
    """
    blocks = _Blocks(u, A)
    u, dt, A = u.contiguous().unsqueeze(1), dt.contiguous().unsqueeze(1), A[None, :, None, None]
    dtu = dt * u
    y = torch.empty_like(dtu)
    block_starts = u.new_empty(blocks.count, *blocks.state_shape)
    scratch = u.new_empty(2, blocks.buffer_floats)

    state = initial_state
    for index in range(blocks.count):
        blocks.select(index)
        block_starts[index] = state
        decay, states = blocks.buffer(scratch[0]), blocks.buffer(scratch[1])
        _run_states(blocks.view(dt), blocks.view(dtu), A, blocks.view(B), state, decay, states)
        _sum_over_n(states, blocks.view(C), out=blocks.view(y)[:, 0])
        state = states[-1, :, -1].clone()
    return y.squeeze(1), state, block_starts


def scan_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    block_starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C and initial_state of `scan_forward`.

    With g_t the gradient of h_t, the recurrence runs backwards: `g_t = C_t dy_t + a_{t+1} g_{t+1}`
    where `a_t = exp(dt_t A)`. Then dC_t = dy_t h_t, dB_t = g_t dt_t u_t, and the gradient of the
    exponent `dt_t A` is `w_t = g_t a_t h_{t-1}`.
    """
    blocks = _Blocks(u, A)
    u, dt, A = u.contiguous().unsqueeze(1), dt.contiguous().unsqueeze(1), A[None, :, None, None]
    grad_y = grad_y.contiguous().unsqueeze(1)
    dtu = dt * u
    grad_dtu, grad_dt = torch.empty_like(dtu), torch.empty_like(dt)
    grad_A, grad_B, grad_C = torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(C)
    scratch = u.new_empty(3, blocks.buffer_floats)

    carried = grad_last  # gradient of the state at the end of the current block
    for index in reversed(range(blocks.count)):
        blocks.select(index)
        decay, states, grads = (blocks.buffer(flat) for flat in scratch)
        dt_, dtu_, grad_y_ = blocks.view(dt), blocks.view(dtu), blocks.view(grad_y)
        B_, C_ = blocks.view(B), blocks.view(C)
        starts = _run_states(dt_, dtu_, A, B_, block_starts[index], decay, states)

        torch.mul(grad_y_, C_, out=grads)
        decay_at, grad_at = decay.unbind(0), grads.unbind(0)
        if blocks.chunks == 1:
            grad_at[-1].add_(carried.unsqueeze(1))
        else:
            ends = grad_at[-1].clone()
            for t in range(blocks.steps - 2, -1, -1):
                torch.addcmul(grad_at[t], decay_at[t + 1], ends, out=ends)
            ends *= decay_at[0]
            # The same carry as in the forward, from the last chunk to the first.
            product = _chunk_decay(dt_, A)
            grad_at[-1].add_(_carry(carried, ends.flip(1), product.flip(1)).flip(1))
        for t in range(blocks.steps - 2, -1, -1):
            grad_at[t].addcmul_(decay_at[t + 1], grad_at[t + 1])

        # Each buffer is overwritten by the products that are summed, once nothing needs it.
        exponent = decay.mul_(grads)
        carried = exponent[0, :, 0].clone()
        exponent[0].mul_(starts)
        exponent[1:].mul_(states[:-1])
        _sum_over_n(exponent, A, out=blocks.view(grad_dt)[:, 0])
        grad_A += exponent.mul_(dt_).sum_to_size(A.shape)
        _sum_over_n(grads, B_, out=blocks.view(grad_dtu)[:, 0])
        blocks.view(grad_B).add_(grads.mul_(dtu_).sum_to_size(B_.shape))
        blocks.view(grad_C).add_(states.mul_(grad_y_).sum_to_size(C_.shape))

    grad_u = grad_dtu * dt
    grad_dt.addcmul_(grad_dtu, u)
    return grad_u.squeeze(1), grad_dt.squeeze(1), grad_A[0, :, 0, 0], grad_B, grad_C, carried

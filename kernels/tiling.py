"""How a scan is cut into programs: fixed rules from its shape, the same on every machine.

Every choice depends on sizes and types alone, never on a measurement or a device, so that a result
can be repeated elsewhere. The tests read the same rules to know which variants of a kernel exist.
This module needs only torch.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

# More would not fit in registers.
MAX_STATES = 32
MAX_RANK = 64
BLOCKS = (128, 64, 32)
NARROW_BLOCK = 16  # half a warp, where registers leave no choice
# In fp64, registers and tile (`Constants`) are divided by this: a number takes two registers, and
# evaluating functions of it takes as many again.
FP64_FACTOR = 4
# Features (states times channels) of a program of the carry.
CARRY_BLOCK = 32


class Constants(NamedTuple):
    """The constants of the rules that tests and `tools/tune_scan.py` replace, see `using`."""

    # Programs (one warp each) that a launch should have: two or three rounds of the 132 * 12 that
    # an H200 holds at a time at N = 16. With a quarter of them, a sequence is not cut at all: one
    # pass does a little more than half of the work of two.
    programs: int = 4096
    # A chunk shorter than this would cost more in carries than it gives in parallelism.
    min_chunk: int = 16
    # 32-bit registers per lane for state, A and dt_weight in the forward; about half of all.
    forward_registers: int = 128
    # States times channels of a program in the backward, which holds a dozen such arrays.
    backward_tile: int = 512
    # 32-bit registers per lane that chunk_scan_bwd may take: 12 warps then fit on a multiprocessor
    # of NVIDIA's.
    backward_registers: int = 168
    # Steps that the backward repeats with their states in registers. The scratch memory for
    # checkpoints is 1 / recompute_steps of all states of one direction.
    recompute_steps: int = 4
    # Chunks that one pass of the carry takes together.
    carry_chunks: int = 32


FIXED = Constants()
# A plain global, as the backward runs in a thread of autograd's.
_in_force = FIXED


def constants() -> Constants:
    """The constants in force: `FIXED`, except within `using`."""
    return _in_force


@contextlib.contextmanager
def using(other: Constants) -> Iterator[None]:
    """Within the block every scan of this process takes these constants.

    A scan and its backward need the same ones.
    """
    global _in_force
    before, _in_force = _in_force, other
    try:
        yield
    finally:
        _in_force = before


class Plan(NamedTuple):
    """Sizes that the kernels are compiled for, and the chunks of the sequence."""

    states: int  # N rounded up to a power of two
    ranks: int  # R rounded up likewise; 1 where delta is given
    block: int  # channels of a program
    backward_block: int  # channels of a program of chunk_scan_bwd
    aligned: bool  # lanes of chunk_scan_bwd own four neighbouring channels
    chunk_length: int  # positions of a chunk; the last one may be shorter
    chunks: int


def next_power_of_2(x: int) -> int:
    return 1 << (x - 1).bit_length()


def block_count(size: int, block: int) -> int:
    """Blocks that cover so much, the last one perhaps in part."""
    return (size + block - 1) // block


def _block(channels: int, largest: int) -> int:
    """The block that leaves the fewest lanes idle, and of those the largest."""
    allowed = [block for block in BLOCKS if block <= largest] or [NARROW_BLOCK]
    return min(allowed, key=lambda block: block_count(channels, block) * block)


def chunk_length(length: int, programs: int) -> int:
    """Positions of a chunk, where one chunk of the sequence already has so many programs.

    It may exceed `length`, and then there is one chunk. The length is compared with nothing, so
    that one compiled graph serves all map sizes.
    """
    enough, shortest = _in_force.programs, _in_force.min_chunk
    if programs >= enough // 4:
        return length
    return shortest * (1 + length * programs // (enough * shortest))


def plan(
    images: int, length: int, channels: int, groups: int, n: int, rank: int, dtype: torch.dtype
) -> Plan:
    """The plan for a sequence of `length` positions in each image.

    Args:
        channels: of all groups together.
        rank: R, or 0 where delta is given.
        dtype: in which the scan computes, fp32 or fp64.
    """
    states, ranks = next_power_of_2(n), next_power_of_2(max(rank, 1))
    per_group = channels // groups
    factor = FP64_FACTOR if dtype == torch.float64 else 1
    block = _block(per_group, _in_force.forward_registers * 32 // (factor * (ranks + 2 * states)))
    backward_block, aligned = _backward_block(per_group, states, _in_force.backward_tile // factor)
    chunk = chunk_length(length, images * groups * block_count(per_group, block))
    chunks = block_count(length, chunk)
    return Plan(states, ranks, block, backward_block, aligned, chunk, chunks)


def _backward_block(per_group: int, states: int, tile: int) -> tuple[int, bool]:
    """Channels of a program of chunk_scan_bwd, and whether a lane owns four neighbours of them.

    That makes sums over channels cheaper, where a lane has states enough to share with no other
    lane, or only with few. It needs channels that come in multiples of 16; without, the arrays
    are larger in effect, and half as many channels fit.
    """
    alignable = per_group % 16 == 0
    block = _block(per_group, (tile if alignable else tile // 2) // states)
    return block, alignable and (block == BLOCKS[0] or states * block >= tile)

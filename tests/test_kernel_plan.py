"""The fixed rules by which a scan is cut into programs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmamba_ref.kernels import tiling as rules
from cmamba_ref.kernels.tiling import block_count, plan


@given(
    images=st.integers(0, 64),
    length=st.integers(1, 10**8),
    per_group=st.integers(1, 4096),
    groups=st.sampled_from((1, 2, 3)),
    n=st.integers(1, rules.MAX_STATES),
    rank=st.integers(0, rules.MAX_RANK),
    dtype=st.sampled_from((torch.float32, torch.float64)),
)
def test_programs_cover_everything_once(images, length, per_group, groups, n, rank, dtype):
    p = plan(images, length, groups * per_group, groups, n, rank, dtype)
    assert (p.chunks - 1) * p.chunk_length < length <= p.chunks * p.chunk_length
    assert p.chunk_length % rules.FIXED.recompute_steps == 0 or p.chunks == 1
    assert n <= p.states < 2 * n and p.states & (p.states - 1) == 0
    assert max(rank, 1) <= p.ranks < 2 * max(rank, 1) and p.ranks & (p.ranks - 1) == 0
    for block in (p.block, p.backward_block):
        assert block in (*rules.BLOCKS, rules.NARROW_BLOCK)
        # No block is idle.
        assert block_count(per_group, block) * block - per_group < block
    assert not p.aligned or per_group % 16 == 0


@pytest.mark.parametrize("images, side, channels, n", [(1, 128, 192, 16), (8, 128, 192, 1)])
def test_chunks_give_a_large_gpu_enough_programs(images, side, channels, n):
    p = plan(images, side * side, channels, 1, n, 6, torch.float32)
    programs = images * p.chunks * block_count(channels, p.block)
    assert programs <= rules.FIXED.programs
    assert programs > rules.FIXED.programs / 2 or p.chunk_length == rules.FIXED.min_chunk


def test_one_pass_where_programs_suffice():
    assert plan(384, 4096, 192, 1, 16, 6, torch.float32).chunks == 1
    assert plan(256, 4096, 192, 1, 16, 6, torch.float32).chunks > 1
    assert plan(1, rules.FIXED.min_chunk, 192, 1, 16, 6, torch.float32).chunks == 1


def test_plan_is_a_function_of_its_arguments():
    assert plan(2, 6144, 96, 1, 16, 6, torch.float32) == rules.Plan(
        states=16,
        ranks=8,
        block=32,
        backward_block=32,
        aligned=True,
        chunk_length=16,
        chunks=384,
    )

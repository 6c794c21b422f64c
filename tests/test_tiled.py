"""Maps that are cut into strips give what they would give as a whole."""

import functools

import pytest
import torch

from cmamba_ref import CASSM, scan_backend
from cmamba_ref.nn import tiled
from cmamba_ref.nn.ablations import PlainFusion
from cmamba_ref.nn.blocks import ResBlock
from cmamba_ref.ops.chunked import recurrence, scan


@pytest.fixture(params=["one strip of the scan", "many strips of the scan"])
def scans(monkeypatch, request):
    """Strips of a few positions; the list of the scans that went through them.

    The scan has strips of its own: one over all regions, or many in each, as large maps have.
    """
    if request.param == "many strips of the scan":
        monkeypatch.setattr(recurrence, "MAX_BLOCK_LENGTH", 8)
        monkeypatch.setattr(scan, "STRIP_FLOATS", 1)
    calls = []
    strips = tiled.scan_2d_strips

    def recorded(*args, **kwargs):
        calls.append(kwargs)
        return strips(*args, **kwargs)

    monkeypatch.setattr(tiled, "scan_2d_strips", recorded)
    monkeypatch.setattr(tiled, "STRIP_POSITIONS", 70)
    monkeypatch.setattr(tiled, "REGION_POSITIONS", 45)
    return calls


def noisy(module: torch.nn.Module) -> torch.nn.Module:
    """A module in fp64 that is not the identity, as a fresh block is."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.double().eval()


def map_of(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last)


def whole(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return block(x)


# The last ones are cut into single rows and single columns.
SHAPES = [(1, 6, 13, 17), (2, 6, 9, 11), (1, 6, 1, 90), (1, 6, 90, 1), (3, 6, 4, 40)]


BLOCKS = {
    "attention": functools.partial(CASSM, fusion_reduction=2),
    "sum": functools.partial(PlainFusion, concatenate=False),
    "concatenation": functools.partial(PlainFusion, concatenate=True),
}


@pytest.mark.parametrize("fusion", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiled_block_equals_the_block(shape, fusion, scans):
    block = noisy(BLOCKS[fusion](6, d_state=2, ssm_ratio=1.5))
    x = map_of(*shape)
    expected = whole(block, x)
    assert not scans
    with torch.no_grad():
        y = tiled.apply(block, x)
    assert len(scans) == 1
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_tiled_input_is_unchanged_in_any_memory_format(scans):
    block = noisy(CASSM(6, d_state=2, ssm_ratio=1.5, fusion_reduction=2))
    x = map_of(1, 6, 13, 17).contiguous()
    before = x.clone()
    with torch.no_grad():
        y = tiled.apply(block, x)
    assert torch.equal(x, before) and len(scans) == 1
    torch.testing.assert_close(y, whole(block, x), rtol=1e-12, atol=1e-12)


def test_hooks_run_for_tiled_blocks(scans):
    """With the values of the block as a whole, and without leaving anything in it."""
    block = noisy(CASSM(6, d_state=2, ssm_ratio=1.5, fusion_reduction=2))
    x, seen = map_of(1, 6, 13, 17), []
    for module in (block, block.ssm, block.cnn, block.attention):
        module.register_forward_hook(lambda m, args, y: seen.append((type(m), y.clone())))
    attributes = set(vars(block))
    with torch.no_grad():
        tiled.apply(block, x)
        cut, seen[:] = list(seen), []
        whole(block, x)
    assert len(scans) == 1 and set(vars(block)) == attributes
    assert [kind for kind, _ in cut] == [kind for kind, _ in seen] and len(cut) == 4
    for (_, found), (_, expected) in zip(cut, seen, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_strips_have_their_halo(scans, monkeypatch):
    """With one row of halo where the local path needs two, the result is another."""
    block = noisy(ResBlock(6))
    x = map_of(1, 6, 13, 17)
    of_map = tiled.of_map
    monkeypatch.setattr(tiled, "of_map", lambda x, halo: of_map(x, halo - 1))
    with torch.no_grad():
        assert not torch.allclose(tiled.apply(block, x), whole(block, x))


def test_strips_cover_every_line_once_and_stay_inside():
    for lines in (1, 5, 64, 131):
        for halo in (0, 1, 2):
            seen = []
            for rows, with_halo, inside in tiled.cut(lines, 7, 50, halo):
                seen += range(lines)[rows]
                assert list(range(lines)[with_halo][inside]) == list(range(lines)[rows])
                assert with_halo.start in (0, rows.start - halo) and with_halo.start >= 0
                assert with_halo.stop in (lines, rows.stop + halo) and with_halo.stop <= lines
            assert seen == list(range(lines))


def test_only_large_maps_on_the_default_scans_are_cut(scans):
    with torch.no_grad():
        assert tiled.are_needed(map_of(1, 6, 13, 17).float())
        assert not tiled.are_needed(map_of(1, 6, 5, 5))
        assert not tiled.are_needed(map_of(1, 6, 13, 17).bfloat16())
        with scan_backend("reference"):
            assert not tiled.are_needed(map_of(1, 6, 13, 17))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not tiled.are_needed(map_of(1, 6, 13, 17))
    assert not tiled.are_needed(map_of(1, 6, 13, 17))

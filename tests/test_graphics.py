"""Synthetic graphics to train on: reproducible, varied, and mixed in at the share asked for."""

import itertools
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmamba_ref import CMamba
from cmamba_ref.training import data, draws, graphics
from cmamba_ref.training.schedule import Phase
from tests.codec_helpers import SMALL
from tests.training_helpers import make_images


def drawn(count: int, size: int = 64) -> list[np.ndarray]:
    return [graphics.draw(draws.for_graphic(0, sample), size) for sample in range(count)]


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return sorted(make_images(tmp_path).rglob("*.png"))


@pytest.fixture
def no_fonts_kept() -> Iterator[None]:
    caches = (graphics._font_files, graphics._glyph)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


# ---------------------------------------------------------------- graphics to measure on


def test_the_command_writes_the_same_graphics_every_time(tmp_path):
    for name in ("a", "b"):
        graphics.main([str(tmp_path / name), "--count", "3", "--size", "64"])
    names = ["graphic00.png", "graphic01.png", "graphic02.png"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    written = [np.asarray(Image.open(tmp_path / "a" / name)) for name in names]
    assert len({graphic.tobytes() for graphic in written}) == 3
    for name, graphic in zip(names, written, strict=True):
        assert (np.asarray(Image.open(tmp_path / "b" / name)) == graphic).all()
    trained = {graphic.tobytes() for graphic in drawn(50)}
    assert not trained & {graphic.tobytes() for graphic in written if np.ptp(graphic) > 0}


# ---------------------------------------------------------------- one graphic


@pytest.mark.parametrize("size", [64, 128, 192, 256, 512])
def test_a_graphic_is_a_crop_of_the_size_asked_for(size):
    for graphic in drawn(12, size):
        assert graphic.shape == (size, size, 3) and graphic.dtype == np.uint8
        assert graphic.flags.writeable and graphic.flags.c_contiguous


def test_a_graphic_depends_on_its_generator_alone(no_fonts_kept):
    """Whatever was drawn before, and whatever other threads draw meanwhile."""
    alone = drawn(24)
    barrier = threading.Barrier(4)
    graphics._glyph.cache_clear()
    with ThreadPoolExecutor(4, initializer=barrier.wait) as pool:
        samples = list(reversed(range(24)))
        together = pool.map(lambda n: graphics.draw(draws.for_graphic(0, n), 64), samples)
        for sample, graphic in zip(samples, together, strict=True):
            assert np.array_equal(graphic, alone[sample]), sample
    assert len({graphic.tobytes() for graphic in alone}) > 20
    other = graphics.draw(draws.for_graphic(1, 0), 64)
    assert not np.array_equal(other, alone[0])


def test_graphics_have_details_that_natural_images_lack():
    """Pure colours, uniform areas, few colours, and details of one pixel in every direction."""
    crops = drawn(50)
    flat = np.concatenate([crop[::3, ::3].reshape(-1, 3) for crop in crops])
    for corner in graphics.CORNERS:
        assert (flat == corner).all(1).mean() > 0.01, corner
    solid = [crop for crop in crops if (crop == crop[0, 0]).all()]
    assert 0.01 < len(solid) / len(crops) < 0.1
    colours = [len(np.unique(crop.reshape(-1, 3), axis=0)) for crop in crops]
    assert np.median(colours) < 600  # of 4096 pixels
    levels = np.stack(crops).astype(int)
    for rows in (levels, levels.swapaxes(1, 2)):
        before, here, after = rows[:, :-2], rows[:, 1:-1], rows[:, 2:]
        # A pixel that differs much from both its neighbours, which are alike.
        line = (np.abs(here - before).max(-1) > 100) & (np.abs(before - after).max(-1) < 10)
        assert line.mean() > 0.01


def test_every_drawing_changes_its_panel():
    """Also a small one, and one of a divided graphic, which may be much longer than wide."""
    for drawing in {*graphics.PANELS, *graphics.OVERLAYS}:
        changed = 0
        for seed, sides in itertools.product(range(20), ((96, 64), (16, 16), (24, 96), (200, 24))):
            panel = Image.new("RGB", sides, (1, 2, 3))
            drawing(np.random.default_rng(seed), panel)
            changed += sides == (96, 64) and bool((np.asarray(panel) != (1, 2, 3)).any())
        assert changed >= 15, drawing.__name__


def test_many_fonts_are_used_where_matplotlib_is():
    pytest.importorskip("matplotlib")
    assert len(graphics._font_files()) >= 20
    texts = {
        graphics._glyph(graphics.Font(path, 16, "L"), "g")[0].tobytes()
        for path in graphics._font_files()
    }
    assert len(texts) == len(graphics._font_files())


def test_text_is_drawn_without_matplotlib(monkeypatch, no_fonts_kept):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert graphics._font_files() == (None,)
    coverage, _, advance = graphics._glyph(graphics.Font(None, 24, "L"), "m")
    assert coverage.max() > 200 and advance > 8
    sharp, *_ = graphics._glyph(graphics.Font(None, 24, "1"), "m")
    assert set(np.unique(sharp)) == {0, 255}
    assert len({graphic.tobytes() for graphic in drawn(12)}) > 8


# ---------------------------------------------------------------- in batches


def test_the_share_of_graphics_is_the_one_asked_for():
    for share in (0.0, 0.1, 0.5, 1.0):
        decisions = [draws.is_graphic(3, sample, share) for sample in range(4000)]
        assert np.mean(decisions) == pytest.approx(share, abs=0.03 * (0 < share < 1))
    assert decisions != [draws.is_graphic(3, sample, 0.5) for sample in range(4000)]
    one, other = ([draws.is_graphic(seed, n, 0.5) for n in range(100)] for seed in (3, 4))
    assert one != other


def batches(paths: list[Path], count: int, **options) -> torch.Tensor:
    cache = data.CropCache(paths, seed=0, scale=2.0, memory=1e9)
    loader = data.Loader(cache, 0, 8, CMamba(SMALL).latent_shapes, workers=2, **options)
    crops = []
    for step in range(count):
        loader.request(step, 8 * step, Phase(64, 8))
        crops.append(loader.take().x)
    loader.close()
    return torch.cat(crops)


def test_graphics_stand_in_for_crops_and_leave_the_others_as_they_are(paths):
    plain, mixed = batches(paths, 12), batches(paths, 12, graphics=0.4)
    assert torch.equal(plain, batches(paths, 12, graphics=0.0))
    chosen = [draws.is_graphic(0, sample, 0.4) for sample in range(len(plain))]
    assert 20 < sum(chosen) < 60
    for sample, is_graphic in enumerate(chosen):
        if is_graphic:
            graphic = graphics.draw(draws.for_graphic(0, sample), 64)
            assert np.array_equal(mixed[sample].permute(1, 2, 0).numpy(), graphic), sample
        else:
            assert torch.equal(mixed[sample], plain[sample]), sample

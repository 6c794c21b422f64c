"""Images to train on: read as the codec reads them, or left out with a reason; crops kept ahead."""

import hashlib
import itertools
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from cmamba_ref.codec import images
from cmamba_ref.training import data, draws
from cmamba_ref.training.schedule import Phase
from tests.training_helpers import make_images, parts_of_an_image

SIDE = 80


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of six images of 200x200 pixels."""
    return make_images(tmp_path / "images")


@pytest.fixture
def rgb() -> np.ndarray:
    """Uint8 `[80, 120, 3]`, different in every direction and channel."""
    y, x = np.mgrid[:SIDE, : SIDE + 40]
    return np.stack([x * 2, y * 3, (x + y) % 256], axis=-1).astype(np.uint8)


def find(folder: Path, held_out: int = 1) -> data.TrainingImages:
    return data.find_images(folder, 64, held_out)


def kept(folder: Path) -> set[str]:
    found = find(folder)
    return {path.name for path in found.train + found.held_out}


PLAIN = {f"{number}.png" for number in range(6)}


# ---------------------------------------------------------------- refused from the header


def make_unusable(folder: Path, rgb: np.ndarray) -> dict[str, str]:
    """Write files that their header shows to be of no use; return the reason of each."""
    image = Image.fromarray(rgb)
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.save(folder / "moving.webp", save_all=True, append_images=[Image.fromarray(255 - rgb)])
    image.save(folder / "moving.png", save_all=True, append_images=[Image.fromarray(255 - rgb)])
    Image.new("RGB", (63, 500)).save(folder / "narrow.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    return {
        "deep.png": "more than 8 bits per channel",
        "cmyk.jpg": "CMYK colours",
        "moving.webp": "several frames or pages",
        "moving.png": "several frames or pages",
        "narrow.png": "smaller than the crop of 64",
        "broken.jpg": "no image",
    }


def test_unusable_images_are_left_out_named_and_counted_by_reason(folder, rgb, caplog):
    before = find(folder).fingerprint
    reasons = make_unusable(folder, rgb)
    caplog.clear()
    assert kept(folder) == PLAIN
    *named, summary = [record.getMessage() for record in caplog.records]
    assert len(named) == len(reasons)
    for line in named:
        assert line.startswith(f"left out: {folder}")
    for name in reasons:
        assert sum(f"{folder / name} " in line for line in named) == 1, name
    assert "deep.png has more than 8 bits per channel" in "\n".join(named)
    assert "narrow.png is smaller than the crop of 64: 63x500 pixels" in "\n".join(named)
    assert summary.startswith(f"6 of 12 files below {folder} are left out: ")
    for reason, count in Counter(reasons.values()).items():
        assert f"{reason} ({count})" in summary
    assert find(folder).fingerprint == before
    (folder / "4.png").rename(folder / "6.png")
    assert find(folder).fingerprint != before


def test_only_so_many_files_are_named(folder, rgb, caplog):
    for number in range(data.MAX_NAMED + 3):
        (folder / f"broken{number}.jpg").write_bytes(b"no image")
    find(folder)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == data.MAX_NAMED + 2
    assert lines[-2] == "left out: 3 more"
    assert "no image (23)" in lines[-1]


def test_files_with_other_suffixes_are_counted(folder, caplog):
    for name in ("a.tif", "b.TIF", "c.heic", "noname", ".hidden"):
        (folder / name).touch()
    find(folder)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "left out: 4 (.tif 2, .heic 1, no suffix 1), not .jpeg .jpg .png .webp"


def test_a_file_that_cannot_be_read_is_left_out(folder, monkeypatch, caplog):
    check = data.check_header

    def failing(path):
        if path.name == "2.png":
            raise PermissionError(13, "Permission denied", str(path))
        return check(path)

    monkeypatch.setattr(data, "check_header", failing)
    assert kept(folder) == PLAIN - {"2.png"}
    assert f"left out: {folder / '2.png'}: Permission denied" in caplog.text
    assert "cannot be read (1)" in caplog.text


def test_finding_decodes_the_held_out_images_alone(folder, monkeypatch):
    decoded = []
    load = ImageFile.ImageFile.load

    def counted(image):
        decoded.append(image)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    found = find(folder, held_out=2)
    assert len({id(image) for image in decoded}) == len(found.held_out) == 2


# ---------------------------------------------------------------- read as the codec reads


def test_the_fingerprint_of_plain_images_is_that_of_their_names_and_sizes(folder):
    """A run that began before images were checked goes on."""
    text = "".join(
        f"{name} (200, 200)\n"
        for name in sorted(f"{'more/' if number % 2 else ''}{number}.png" for number in range(6))
    )
    assert find(folder).fingerprint == hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", ["turned.jpg", "turned.png", "turned.webp"])
def test_exif_orientation_turns_size_and_pixels(tmp_path, rgb, name):
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer turns by 90 degrees clockwise
    lossless: dict[str, Any] = {"lossless": True} if name.endswith("webp") else {}
    Image.fromarray(rgb).save(tmp_path / name, exif=exif, **lossless)
    Image.fromarray(rgb).save(tmp_path / f"plain-{name}", **lossless)
    assert images.check_header(tmp_path / name) == (SIDE, SIDE + 40)
    assert images.check_header(tmp_path / f"plain-{name}") == (SIDE + 40, SIDE)
    read, plain = data.read_rgb(tmp_path / name), data.read_rgb(tmp_path / f"plain-{name}")
    assert read.shape == (SIDE + 40, SIDE, 3)
    assert np.array_equal(read, np.rot90(plain, -1))


def test_grey_images_are_trained_on_as_rgb(tmp_path, rgb):
    Image.fromarray(rgb[..., 0]).save(tmp_path / "grey.png")
    read = data.read_rgb(tmp_path / "grey.png")
    assert read.shape == rgb.shape
    assert all(np.array_equal(read[..., channel], rgb[..., 0]) for channel in range(3))
    cache = data.CropCache([tmp_path / "grey.png"], seed=0, scale=2.0, memory=0)
    crop = cache.crop(0, 0, 64)
    assert crop.shape == (64, 64, 3) and (crop == crop[..., :1]).all()


def make_deceptive(path: Path, rgb: np.ndarray, kind: str) -> str:
    """Write a file that only its pixels show to be of no use; return the reason."""
    image = Image.fromarray(rgb)
    if kind == "transparency":
        glass = image.convert("RGBA")
        glass.putpixel((3, 4), (1, 2, 3, 128))
        glass.save(path)
        return "has transparency"
    if kind == "profile":
        image.save(path, icc_profile=b"no profile")
        return "has a colour profile that cannot be applied"
    path.write_bytes(parts_of_an_image()[0][:5000])
    return "is damaged or truncated"


@pytest.mark.parametrize("kind", ["transparency", "profile", "damage"])
def test_an_image_with_unusable_pixels_is_named_once_and_replaced(folder, rgb, kind, caplog):
    paths = sorted(folder.rglob("*.png"))
    plain = data.CropCache(paths, seed=0, scale=2.0, memory=0)
    expected = data.random_crop(data.read_rgb(paths[1]), 64, draws.for_crop(0, 0, 0))
    reason = make_deceptive(paths[0], rgb, kind)
    images.check_header(paths[0])
    cache = data.CropCache(paths, seed=0, scale=2.0, memory=0)
    assert np.array_equal(cache.crop(0, 0, 64), expected)
    for visit in range(1, 4):
        cache.crop(0, visit, 64)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{paths[0]} {reason}")
    assert record.getMessage().endswith("the next image is used instead")
    assert np.array_equal(cache.crop(1, 0, 64), plain.crop(1, 0, 64))


def test_held_out_images_can_be_decoded(folder, rgb, caplog):
    (first,) = find(folder).held_out
    make_deceptive(first, rgb, "transparency")
    found = find(folder)
    assert len(found.held_out) == 1 and len(found.train) == 4
    assert first not in found.train + found.held_out
    assert "transparency (1)" in caplog.text
    data.read_rgb(found.held_out[0])


def test_images_of_one_limit_are_decoded_at_the_same_time(folder, monkeypatch):
    """Two threads that decode meet inside the reader; one at a time would wait in vain."""
    barrier = threading.Barrier(2)
    to_array = images.to_array

    def meet(image, **options):
        barrier.wait(10)
        return to_array(image, **options)

    monkeypatch.setattr(images, "to_array", meet)
    limit = Image.MAX_IMAGE_PIXELS
    with ThreadPoolExecutor(2) as pool:
        read = list(pool.map(data.read_rgb, sorted(folder.rglob("*.png"))))
    assert len(read) == 6 and limit == Image.MAX_IMAGE_PIXELS


def test_a_reader_with_another_limit_waits_and_gets_its_turn():
    events: list[str] = []
    inside, may_leave = threading.Event(), threading.Event()

    def first():
        with images._pixel_limit(1000):
            inside.set()
            may_leave.wait(10)
            events.append(f"first {Image.MAX_IMAGE_PIXELS}")

    def second():
        with images._pixel_limit(2000):
            events.append(f"second {Image.MAX_IMAGE_PIXELS}")

    before = Image.MAX_IMAGE_PIXELS
    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    threads[1].join(0.1)
    assert threads[1].is_alive() and not events
    may_leave.set()
    for thread in threads:
        thread.join(10)
    assert events == ["first 1000", "second 2000"]
    assert before == Image.MAX_IMAGE_PIXELS


# ---------------------------------------------------------------- crops kept ahead


IMAGES = 24


@pytest.fixture
def decoding(monkeypatch) -> list[int]:
    """Images without files: the list of numbers that were decoded."""
    log: list[int] = []

    def read(path: Path) -> np.ndarray:
        log.append(int(path.stem))
        return np.random.default_rng(int(path.stem)).integers(0, 256, (70, 70, 3), dtype=np.uint8)

    monkeypatch.setattr(data, "read_rgb", read)
    return log


def cache_of(memory: float) -> data.CropCache:
    paths = [Path(f"{number}.png") for number in range(IMAGES)]
    return data.CropCache(paths, seed=0, scale=2.0, memory=memory)


def test_images_are_decoded_again_in_equal_parts(decoding):
    """After the first epoch, which has to decode them all."""
    ahead, at_once = cache_of(1e9), cache_of(0)
    assert (ahead.crops_ahead(64), at_once.crops_ahead(64)) == (16, 1)
    epochs = []
    for visit in range(49):
        begun = ahead.decoded
        for number in range(IMAGES):
            crop = ahead.crop(number, visit, 64)
            assert np.array_equal(crop, at_once.crop(number, visit, 64)), (visit, number)
        epochs.append(ahead.decoded - begun)
    assert epochs[0] == IMAGES
    assert np.mean(epochs[1:]) == pytest.approx(IMAGES / 16)
    assert max(epochs[1:]) <= 2
    # Another size has crops of its own.
    assert ahead.crop(0, 16, 70).shape == (70, 70, 3)


def loaders(sizes: int, memory: float, **options) -> list[data.Loader]:
    shapes = lambda h, w: {"y": (1, 1, 1)}  # noqa: E731
    return [
        data.Loader(cache_of(memory), 0, 0, shapes, rank=rank, size=sizes, workers=1, **options)
        for rank in range(sizes)
    ]


def run(loader: data.Loader, epochs: int) -> np.ndarray:
    crops = []
    for step in range(epochs * IMAGES // 8):
        loader.request(step, 8 * step, Phase(64, 8))
        crops.append(loader.take().x.numpy())
    loader.close()
    return np.stack(crops)


@pytest.mark.parametrize("graphics", [0.0, 0.3])
def test_a_process_cuts_the_crops_that_it_is_asked_for(decoding, graphics, monkeypatch):
    """Of two processes each decodes half as often as one does, and cuts nothing for the other."""
    cut = []
    random_crop = data.random_crop
    monkeypatch.setattr(data, "random_crop", lambda *a: cut.append(1) or random_crop(*a))
    (alone,) = loaders(1, 1e9, graphics=graphics)
    epochs = 40
    whole = run(alone, epochs)
    of_one = alone.crops.decoded
    parts = loaders(2, 1e9, graphics=graphics)
    cut.clear()
    crops = [run(loader, epochs) for loader in parts]
    assert np.array_equal(np.concatenate(crops, axis=1), whole)
    for loader in parts:
        assert loader.crops.decoded - IMAGES < 0.65 * (of_one - IMAGES) + 1
    wanted = epochs * IMAGES * (1 - graphics)
    assert len(cut) < 1.4 * wanted


def test_kept_crops_stay_within_the_memory(decoding):
    memory = 5.5 * IMAGES * 3 * 64**2
    cache = cache_of(memory)
    assert cache.crops_ahead(64) == 5 and cache.crops_ahead(128) == 1
    for loader in loaders(2, memory, graphics=0.2):
        for epoch in range(12):
            for step in range(3 * epoch, 3 * epoch + 3):
                loader.request(step, 8 * step, Phase(64, 8))
                loader.take()
            held = itertools.chain.from_iterable(c.values() for c in loader.crops._kept.values())
            assert sum(crop.nbytes for crop in held) <= memory
        loader.close()

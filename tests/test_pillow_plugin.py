"""Pillow opens and saves .cmb files: lazily, with its own kinds of errors, by the codec's rules."""

import contextlib
import io
import pickle
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch
from codec_helpers import field_of, make_image, random_model, with_field
from PIL import Image, ImageCms, UnidentifiedImageError

import cmamba_ref
from cmamba_ref import CMamba, MemoryLimitError, codec, pillow_plugin
from cmamba_ref.codec import image_codec, memory
from cmamba_ref.codec.container import Container
from cmamba_ref.codec.images import read_image
from cmamba_ref.errors import (
    BitstreamError,
    ImageError,
    ImageWarning,
    InvalidArgumentError,
    ModelMismatchError,
    PillowError,
)

IMAGE = make_image(70, 90)


@pytest.fixture(scope="module")
def model(model_dir: str) -> CMamba:
    return CMamba.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def data(model: CMamba) -> bytes:
    return cmamba_ref.encode(IMAGE, model)


@pytest.fixture(autouse=True)
def no_models(monkeypatch: pytest.MonkeyPatch) -> Generator[None, None, None]:
    """Every test begins as a new process does."""
    monkeypatch.setattr(pillow_plugin, "_models", {})
    yield


@pytest.fixture
def photo(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "photo.cmb"
    path.write_bytes(data)
    return path


# ---------------------------------------------------------------- open


def test_opening_decodes_nothing_and_loading_decodes(model: CMamba, data: bytes) -> None:
    file = io.BytesIO(data)
    opened = Image.open(file)
    assert (opened.size, opened.mode, opened.format) == ((90, 70), "RGB", "CMAMBA")
    assert opened.get_format_mimetype() == "image/x-cmamba"
    assert opened.fp is file  # still open
    pillow_plugin.use_model(model)
    np.testing.assert_array_equal(np.asarray(opened), cmamba_ref.decode(data, model))


def test_a_grey_file_opens_in_mode_l(model: CMamba) -> None:
    pillow_plugin.use_model(model)
    data = cmamba_ref.encode(IMAGE[..., 0], model)
    opened = Image.open(io.BytesIO(data))
    assert opened.mode == "L"
    expected = cmamba_ref.decode(data, model)
    np.testing.assert_array_equal(np.asarray(opened), expected)
    opened.load()[3, 4] = 7  # like any other image it may be drawn on
    opened.putpixel((4, 5), 8)
    expected[4, 3], expected[5, 4] = 7, 8
    np.testing.assert_array_equal(np.asarray(opened), expected)


def test_importing_and_opening_take_no_torch(photo: Path, root: Path) -> None:
    code = (
        "import sys, cmamba_ref.pillow_plugin; from PIL import Image; im = Image.open(sys.argv[1]);"
        "im.verify(); Image.init(); assert im.size == (90, 70) and 'torch' not in sys.modules;"
        "assert Image.registered_extensions()['.cmb'] == 'CMAMBA'"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(photo)], cwd=root, check=True)


def test_a_folder_is_the_one_that_the_current_folder_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = []
    for seed, name in enumerate("ab"):
        random_model(seed=seed).save_pretrained(tmp_path / name / "mine")
        monkeypatch.chdir(tmp_path / name)
        Image.fromarray(IMAGE).save("x.cmb", model="mine")
        ids.append(Container.unpack(Path("x.cmb").read_bytes()).model_id)
    assert ids == [random_model(seed=seed).model_id for seed in range(2)]


def test_a_compiled_model_saves_and_opens(model: CMamba, tmp_path: Path) -> None:
    compiled = torch.compile(model)
    Image.fromarray(IMAGE).save(tmp_path / "x.cmb", model=compiled)
    pillow_plugin.use_model(compiled)
    assert Image.open(tmp_path / "x.cmb").convert("RGB").size == (90, 70)
    with pytest.raises(InvalidArgumentError, match="`model` must be a CMamba"):
        pillow_plugin.use_model(7)


def test_bundled_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the weights that ship are hashed for the first such file only."""
    asked = []
    name_of = image_codec.name_of

    def counted(model_id: bytes) -> str | None:
        asked.append(model_id)
        return name_of(model_id)

    monkeypatch.setattr(image_codec, "name_of", counted)
    data = cmamba_ref.encode(IMAGE)
    for _ in range(2):
        with Image.open(io.BytesIO(data)) as opened:
            np.testing.assert_array_equal(np.asarray(opened), cmamba_ref.decode(data))
    assert len(asked) == 1


def test_missing_model_of_a_file_is_named(photo: Path, model: CMamba) -> None:
    with Image.open(photo) as opened:
        with pytest.raises(PillowError, match=model.model_id.hex()) as caught:
            opened.load()
        assert "use_model" in str(caught.value)
        assert isinstance(caught.value.__cause__, ModelMismatchError)
        pillow_plugin.use_model(model)
        opened.load()


def test_weights_are_loaded_once(
    tmp_path: Path, photo: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load = CMamba.from_pretrained

    def counted(source: str, device: str = "cpu") -> CMamba:
        loads.append(source)
        return load(source, device)

    monkeypatch.setattr(CMamba, "from_pretrained", counted)
    image = Image.fromarray(IMAGE)
    for name in ("a.cmb", "b.cmb"):
        image.save(tmp_path / name, model=model_dir)
        Image.open(tmp_path / name).load()  # by the id in the file
    assert loads == [model_dir]
    assert pillow_plugin.use_model(Path(model_dir)) is pillow_plugin.use_model(model_dir)


# ---------------------------------------------------------------- damaged files


def test_other_formats_are_left_to_pillow() -> None:
    for data in (b"", b"hello, this is no image at all", b"\x8fCMA" + bytes(100)):
        with pytest.raises(UnidentifiedImageError):
            Image.open(io.BytesIO(data))


def test_a_file_with_a_bad_header_does_not_open(data: bytes) -> None:
    newer = data[:4] + b"\x02" + data[5:]
    wide = with_field(data, "width", 0)
    for damaged, reason in (
        (data[:20], "truncated: it has only 20 bytes"),
        (newer, "format version 2, this program reads versions up to 1"),
        (wide, "malformed"),
    ):
        with pytest.raises(OSError, match=reason) as caught:
            Image.open(io.BytesIO(damaged))
        assert not isinstance(caught.value, UnidentifiedImageError)
        assert isinstance(caught.value.__cause__, BitstreamError)


def test_a_damaged_file_does_not_load(model: CMamba, data: bytes) -> None:
    pillow_plugin.use_model(model)
    flipped = bytearray(data)
    flipped[-30] ^= 1
    for damaged, reason in (
        (data[:-1], "the file is truncated"),
        (bytes(flipped), "the checksum of chunk 'IMAG' does not match"),
        (with_field(data, "symbols' check", 0), "symbols fail their check"),
    ):
        opened = Image.open(io.BytesIO(damaged))
        for _ in range(2):  # it does not turn into an image by asking again
            with pytest.raises(OSError, match=reason) as caught:
                opened.load()
            assert isinstance(caught.value.__cause__, BitstreamError)


def test_verify_compares_the_checksum(photo: Path, data: bytes) -> None:
    Image.open(photo).verify()
    photo.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with Image.open(photo) as opened, pytest.raises(OSError, match="checksum of chunk 'IEND'"):
        opened.verify()


def test_pillows_limit_on_pixels_holds(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(with_field(data, "width", 2**31)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 70 * 90 // 3)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(data))


def test_memory_is_allocated_after_decoding(
    data: bytes, model: CMamba, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of 1x134,217,729 pixels alone took more than a gigabyte."""

    def no_room(*_: object) -> None:
        raise AssertionError("this must not be reached")

    pillow_plugin.use_model(model)
    monkeypatch.setattr(memory, "available", lambda: None)
    monkeypatch.setattr(Image.core, "new", no_room)
    for width, height, reason in (
        (1, 134_217_729, "more than the limit"),
        (134_217_729, 1, "more than the limit"),
        (20000, 2000, "cannot hold an image of 20032x2048"),
    ):
        hostile = with_field(with_field(data, "width", width), "height", height)
        with pytest.warns() if width * height > 10**8 else contextlib.nullcontext():
            opened = Image.open(io.BytesIO(hostile))
        with pytest.raises(PillowError, match=f"cannot decode: .*{reason}"):
            opened.load()


@pytest.mark.parametrize("shape", [(40, 50, 3), (700, 900, 3), (70, 90)])
def test_file_changed_since_opening_is_reported(
    data: bytes, model: CMamba, shape: tuple[int, ...]
) -> None:
    pillow_plugin.use_model(model)
    file = io.BytesIO(data)
    opened = Image.open(file)
    file.seek(0)
    file.write(cmamba_ref.encode(np.zeros(shape, np.uint8), model))
    file.truncate()
    with pytest.raises(PillowError, match="has changed since it was opened"):
        opened.load()


def test_file_closed_before_decoding_is_reported(photo: Path, model: CMamba) -> None:
    pillow_plugin.use_model(model)
    closed, verified = Image.open(photo), Image.open(photo)
    closed.close()
    verified.verify()
    with Image.open(photo) as left:
        pass
    for opened in (closed, verified, left):
        with pytest.raises(PillowError, match="the file is closed; open it anew"):
            opened.load()


def test_file_is_closed_after_decoding(photo: Path, model: CMamba) -> None:
    pillow_plugin.use_model(model)
    opened = Image.open(photo)
    file = opened.fp
    pixels = opened.load()
    assert file.closed and opened.format == "CMAMBA"
    assert opened.load() is not None and pixels[3, 4] == opened.getpixel((3, 4))
    with open(photo, "rb") as mine:
        Image.open(mine).load()
        assert not mine.closed  # whoever opened it closes it
    after = pickle.loads(pickle.dumps(Image.open(photo)))
    np.testing.assert_array_equal(np.asarray(after), np.asarray(opened))


# ---------------------------------------------------------------- save


@pytest.mark.parametrize("kind", ["directory", "object"])
def test_save_writes_what_the_api_returns(
    tmp_path: Path, model: CMamba, model_dir: str, kind: str
) -> None:
    chosen = model_dir if kind == "directory" else model
    Image.fromarray(IMAGE).save(tmp_path / "a.CMB", quality=2.5, model=chosen)
    assert (tmp_path / "a.CMB").read_bytes() == cmamba_ref.encode(IMAGE, model, 2.5)
    buffer = io.BytesIO()
    Image.fromarray(IMAGE[..., 1]).save(buffer, "cmamba", model=chosen)
    assert buffer.getvalue() == cmamba_ref.encode(IMAGE[..., 1], model)


def test_the_default_model_is_that_of_the_api() -> None:
    buffer = io.BytesIO()
    Image.fromarray(IMAGE).save(buffer, "CMAMBA")
    assert field_of(buffer.getvalue(), "model id") == codec.default_model().model_id


def test_save_reads_images_like_the_command_line(tmp_path: Path, model: CMamba) -> None:
    """EXIF orientation, a profile, a palette and black-and-white: as `read_image` reads them."""
    turned = Image.Exif()
    turned[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    source = Image.fromarray(IMAGE)
    source.save(tmp_path / "turned.jpg", exif=turned)
    source.quantize(16).save(tmp_path / "palette.png")
    source.convert("1").save(tmp_path / "bits.png")
    source.save(tmp_path / "profile.png", icc_profile=profile)  # not one of RGB
    for name in ("turned.jpg", "palette.png", "bits.png"):
        buffer = io.BytesIO()
        with Image.open(tmp_path / name) as opened:
            opened.save(buffer, "CMAMBA", model=model)
        expected = read_image(tmp_path / name)
        assert buffer.getvalue() == cmamba_ref.encode(expected, model), name
        shown = Image.open(buffer)
        assert shown.size == expected.shape[1::-1], name
        assert not shown.getexif() and shown.info == {}
    ignored, buffer = "^the image has a colour profile that cannot be applied", io.BytesIO()
    with Image.open(tmp_path / "profile.png") as opened, pytest.warns(ImageWarning, match=ignored):
        opened.save(buffer, "CMAMBA", model=model)
    assert buffer.getvalue() == cmamba_ref.encode(IMAGE, model)
    with (
        Image.open(tmp_path / "profile.png") as opened,
        pytest.raises(PillowError, match="colour profile that cannot"),
    ):
        opened.save(io.BytesIO(), "CMAMBA", model=model, icc_profile=profile)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_saved_and_opened(model: CMamba, mode: str) -> None:
    alpha = np.arange(70 * 90).astype(np.uint8).reshape(70, 90)
    colours = IMAGE if mode == "RGBA" else IMAGE[..., 0]
    buffer = io.BytesIO()
    pillow_plugin.use_model(model)
    Image.fromarray(np.dstack([colours, alpha])).save(buffer, "CMAMBA", model=model)
    opened = Image.open(buffer)
    assert opened.mode == mode
    np.testing.assert_array_equal(np.asarray(opened)[..., -1], alpha)
    plain = cmamba_ref.decode(buffer.getvalue(), model)
    np.testing.assert_array_equal(np.asarray(opened), plain)


def test_metadata_that_is_given_is_kept(model: CMamba) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a title"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    kept = {"icc_profile": profile, "xmp": b"<x/>"}
    source, buffer = Image.fromarray(IMAGE), io.BytesIO()
    pillow_plugin.use_model(model)
    source.info["icc_profile"] = b"not applied, as another is given"
    source.save(buffer, "CMAMBA", model=model, exif=exif, **kept)
    opened = Image.open(buffer)
    assert opened.info.pop("exif").startswith(b"Exif\0\0") and opened.info == kept
    opened = Image.open(buffer)
    assert opened.getexif()[0x010E] == "a title" and opened.getexif()[0x0112] == 1
    assert opened.size == (70, 90)  # turned, as a viewer would turn the same as JPEG
    again = io.BytesIO()
    opened.save(again, "CMAMBA", model=model, exif=opened.info["exif"], **kept)
    assert Image.open(again).info == opened.info
    text = io.BytesIO()
    source.save(text, "CMAMBA", model=model, xmp="<x/>", icc_profile=profile)
    assert Image.open(text).info == {"xmp": b"<x/>", "icc_profile": profile}


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("CMYK", "the image is in CMYK colours"),
        ("I;16", "the image has more than 8 bits"),
    ],
)
def test_unsupported_images_are_refused(
    tmp_path: Path, model: CMamba, mode: str, reason: str
) -> None:
    target = tmp_path / "a.cmb"
    with pytest.raises(OSError, match=reason) as caught:
        Image.new(mode, (8, 8)).save(target, model=model)
    assert isinstance(caught.value.__cause__, ImageError)
    assert not target.exists()


def test_wrong_options_are_refused(model: CMamba) -> None:
    source = Image.fromarray(IMAGE)
    with pytest.raises(ValueError, match="`quality` must be a number from 1 to 8, got 75"):
        source.save(io.BytesIO(), "CMAMBA", model=model, quality=75)
    with pytest.raises(MemoryLimitError):
        source.save(io.BytesIO(), "CMAMBA", model=model, max_memory=1000)
    with pytest.raises(ValueError, match="1 to 9000 pixels"):
        source.save(io.BytesIO(), "CMAMBA", model=model, max_pixels=9000)

"""What images are decoded to: PNG, JPEG and WebP files."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from codec_helpers import make_image, random_model
from PIL import Image, ImageCms

import cmamba_ref
from cmamba_ref.cli import batch, main
from cmamba_ref.codec import output
from cmamba_ref.codec.formats import OUTPUT_FORMATS
from cmamba_ref.codec.images import parse_image
from cmamba_ref.codec.metadata import Metadata
from cmamba_ref.codec.output import image_bytes, png_bytes
from cmamba_ref.codec.png_colour import declared_profile
from cmamba_ref.errors import ImageError, InvalidArgumentError
from cmamba_ref.metrics import psnr

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
METADATA = Metadata(
    exif=b"II*\0" + struct.pack("<IH", 8, 0) + bytes(4), icc_profile=SRGB, xmp=b"<x/>"
)
RGB = make_image(48, 64)
FORMS = {"rgb": RGB, "grey": RGB[..., 0], "rgba": np.dstack([RGB, RGB[..., 0]])}
FORMS["grey with alpha"] = FORMS["rgba"][..., 2:]


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def chunks(png: bytes) -> dict[bytes, bytes]:
    found, at = {}, 8
    while at < len(png):
        (size,) = struct.unpack_from(">I", png, at)
        found[png[at + 4 : at + 8]] = png[at + 8 : at + 8 + size]
        at += size + 12
    return found


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize("form", FORMS)
def test_png_is_lossless_and_says_srgb(form: str):
    data = png_bytes(FORMS[form])
    np.testing.assert_array_equal(np.asarray(opened(data)), FORMS[form])
    names = list(chunks(data))
    assert chunks(data)[b"sRGB"] == b"\0" and names.index(b"sRGB") < names.index(b"IDAT")
    assert b"sRGB" not in chunks(png_bytes(FORMS[form], METADATA))  # the profile says it


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp"])
@pytest.mark.parametrize("form", ["rgb", "grey"])
def test_lossy_formats(suffix: str, form: str):
    image = FORMS[form]
    data = image_bytes(image, suffix)
    assert opened(data).format == OUTPUT_FORMATS[suffix.lower()]
    decoded, _ = parse_image(data, "it")
    if decoded.shape != image.shape:  # WebP has no grey
        image = np.repeat(image[..., None], 3, axis=2)
    assert psnr(image, decoded) > 32
    assert image_bytes(image, suffix, quality=95) == image_bytes(image, suffix)
    assert len(image_bytes(image, suffix, quality=20)) < len(image_bytes(image, suffix, quality=60))


def test_jpeg_keeps_the_resolution_of_colour():
    assert [layer[1:3] for layer in opened(image_bytes(RGB, ".jpg")).layer] == [(1, 1)] * 3


@pytest.mark.parametrize("form", ["rgba", "grey with alpha"])
def test_transparency(form: str):
    """Lossless in WebP, and refused by JPEG, which has none."""
    alpha = np.asarray(opened(image_bytes(FORMS[form], ".webp")))[..., -1]
    np.testing.assert_array_equal(alpha, FORMS[form][..., -1])
    with pytest.raises(ImageError, match="JPEG cannot hold transparency"):
        image_bytes(FORMS[form], ".jpg")


@pytest.mark.parametrize("suffix", OUTPUT_FORMATS)
def test_metadata_is_kept(suffix: str):
    _, kept = parse_image(image_bytes(RGB, suffix, METADATA), "it", keep_metadata=True)
    assert kept == METADATA


def test_what_does_not_fit():
    of_grey = Metadata(icc_profile=declared_profile({"gamma": 0.6}, grey=True))
    for suffix in (".jpg", ".png"):
        assert opened(image_bytes(FORMS["grey"], suffix, of_grey)).mode == "L"
    with pytest.raises(ImageError, match="WebP cannot hold grey with its profile"):
        image_bytes(FORMS["grey"], ".webp", of_grey)
    strip = np.zeros((1, 65_536, 3), np.uint8)
    for suffix in (".jpg", ".webp"):
        with pytest.raises(ImageError, match="cannot hold sides of more than"):
            image_bytes(strip, suffix)
    for name in ("exif", "xmp"):
        with pytest.raises(ImageError, match="does not fit into JPEG: .* decode to PNG"):
            image_bytes(RGB, ".jpg", Metadata(**{name: b"II*\0" + bytes(70_000)}))


@pytest.mark.parametrize("kind", output.MAX_SIDE)
def test_the_largest_sides_are_those_of_pillow(kind: str):
    """One pixel more is what Pillow refuses."""
    suffix = {"JPEG": ".jpg", "WEBP": ".webp"}[kind]
    image_bytes(np.zeros((1, output.MAX_SIDE[kind]), np.uint8), suffix)
    with pytest.raises((OSError, ValueError)):
        Image.new("L", (output.MAX_SIDE[kind] + 1, 1)).save(io.BytesIO(), kind)


@pytest.mark.parametrize("quality", [0, 101, -5, 90.5, "90"])
def test_qualities_are_checked(quality: Any):
    for suffix in (".jpg", ".webp"):
        with pytest.raises(InvalidArgumentError, match="from 1 to 100"):
            image_bytes(RGB, suffix, quality=quality)
    with pytest.raises(InvalidArgumentError, match="none for PNG"):
        image_bytes(RGB, ".png", quality=90)
    with pytest.raises(InvalidArgumentError, match="must end in"):
        image_bytes(RGB, ".gif")


@pytest.mark.parametrize("max_side", [0, -5, 2.5, "9"])
def test_the_largest_side_is_checked(max_side: Any):
    with pytest.raises(InvalidArgumentError, match="`max_side` must be a whole number of at"):
        image_bytes(RGB, ".png", max_side=max_side)


# ---------------------------------------------------------------- the command


@pytest.fixture
def encoded(tmp_path: Path) -> Path:
    path = tmp_path / "photo.cmb"
    path.write_bytes(cmamba_ref.encode(RGB, random_model()))
    return path


def decode(model_dir: str, *args: object) -> int:
    return main(["decode", *map(str, args), "--model", model_dir, "--jobs", "1"])


def expected(encoded: Path, suffix: str, quality: int | None = None) -> bytes:
    image = cmamba_ref.decode(encoded.read_bytes(), random_model())
    return image_bytes(image, suffix, quality=quality)


def test_the_command_knows_the_formats():
    assert batch.OUTPUT_SUFFIXES["decode"] == tuple(OUTPUT_FORMATS)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.webp", "a.png"])
def test_the_suffix_says_the_format(encoded: Path, model_dir: str, name: str):
    target = encoded.with_name(name)
    assert decode(model_dir, encoded, "-o", target) == 0
    assert target.read_bytes() == expected(encoded, target.suffix)
    assert decode(model_dir, encoded, encoded.with_name("b" + name[1:])) == 0
    assert encoded.with_name("b" + name[1:]).read_bytes() == target.read_bytes()


def test_output_quality(encoded: Path, model_dir: str):
    target = encoded.with_name("a.jpg")
    assert decode(model_dir, encoded, "-o", target, "--output-quality", "30") == 0
    assert target.read_bytes() == expected(encoded, ".jpg", 30)


def test_format_of_a_folder_and_beside_the_input(encoded: Path, model_dir: str, tmp_path: Path):
    out = tmp_path / "out"
    options = ["--format", "webp", "--output-quality", "40"]
    assert decode(model_dir, tmp_path, "-o", out, *options) == 0
    assert (out / "photo.webp").read_bytes() == expected(encoded, ".webp", 40)
    assert decode(model_dir, encoded, "--format", "jpg") == 0
    assert encoded.with_suffix(".jpg").read_bytes() == expected(encoded, ".jpg")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-o", "a.gif"], "`-o` must end in one of .png, .jpg, .jpeg, .webp, got 'a.gif'"),
        (["-o", "a"], "got 'a'; end a folder in /"),
        (["-o", "a.png.tif"], "`-o` must end in one of"),
        (["-o", "a.png", "--format", "jpg"], "`--format` must fit `-o`"),
        (["-o", "a.png", "--output-quality", "90"], "`--output-quality` must come with JPEG"),
        (["--output-quality", "90"], "`--output-quality` must come with JPEG"),
        (["-o", "-", "--output-quality", "90"], "standard output: --format jpg"),
        (["b.cmb", "c.cmb", "--output-quality", "90"], "`--output-quality` must come with JPEG"),
    ],
)
def test_what_does_not_go_together(
    encoded: Path,
    model_dir: str,
    args: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(encoded.parent)
    assert decode(model_dir, encoded, *args) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in encoded.parent.iterdir()] == ["photo.cmb"]


def test_a_refused_image_leaves_no_file(tmp_path: Path, model_dir: str, capsys):
    source = tmp_path / "clear.cmb"
    source.write_bytes(cmamba_ref.encode(FORMS["rgba"], random_model()))
    assert decode(model_dir, source, "-o", tmp_path / "a.jpg") == 1
    assert "JPEG cannot hold transparency" in capsys.readouterr().err
    assert decode(model_dir, source, tmp_path, "-o", tmp_path / "out", "--format", "jpg") == 1
    assert f"{source}: JPEG cannot hold transparency" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clear.cmb"]

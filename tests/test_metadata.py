"""Metadata from image to file to image: kept byte by byte if asked for, else dropped and named."""

import json
import os
import struct
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from codec_helpers import make_image, png_chunk
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

import cmamba_ref
import cmamba_ref.pillow_plugin  # registers .cmb
from cmamba_ref.cli import main
from cmamba_ref.codec.container import Container
from cmamba_ref.codec.images import parse_image, read_image
from cmamba_ref.codec.metadata import NO_METADATA, Metadata
from cmamba_ref.codec.output import png_bytes
from cmamba_ref.errors import ImageError, ImageWarning, InvalidArgumentError

IMAGE = make_image(40, 60)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = '<x:xmpmeta><rdf:Description tiff:Orientation="%d" name="ä"/></x:xmpmeta>'


def exif_of(orientation: int) -> bytes:
    """EXIF data from its TIFF header on: a text, the orientation and a sub-directory."""
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "title", orientation
    exif.get_ifd(0x8769)[0x829A] = 0.01
    return exif.tobytes().removeprefix(b"Exif\0\0")


def save(folder: Path, suffix: str, orientation: int) -> Path:
    """IMAGE in a file that holds it turned, so that it is upright for a viewer."""
    exif = exif_of(orientation)
    stored = Image.fromarray(IMAGE)
    for back in {6: (Image.Transpose.ROTATE_90,), 3: (Image.Transpose.ROTATE_180,)}.get(
        orientation, ()
    ):
        stored = stored.transpose(back)
    path = folder / f"a{suffix}"
    xmp = (XMP % orientation).encode()
    options = {"exif": exif, "icc_profile": PROFILE, "xmp": xmp, "quality": 95, "lossless": True}
    if suffix == ".png":
        texts = PngImagePlugin.PngInfo()
        texts.add_itxt("XML:com.adobe.xmp", xmp.decode())
        options["pnginfo"] = texts
    if suffix == ".jpg":  # where Pillow leaves the prefix to its caller
        options["exif"] = b"Exif\0\0" + exif
    stored.save(path, **options)
    return path


def exif_of_type(kind: int, code: str, *values: float) -> bytes:
    """EXIF data from its TIFF header on: an orientation of that type, little-endian."""
    payload, entry = struct.pack("<" + code, *values), struct.pack("<HHI", 0x0112, kind, 1)
    here, there = (payload, b"") if len(payload) <= 4 else (struct.pack("<I", 26), payload)
    return b"II*\0" + struct.pack("<IH", 8, 1) + entry + here.ljust(4, b"\0") + bytes(4) + there


# What Pillow turns images by: all numbers, of whatever type.
IN_PLACE = [(3, "H", 6), (4, "I", 6), (6, "b", 6), (8, "h", 6), (9, "i", 6), (11, "f", 6.0)]
ELSEWHERE = [(5, "II", 6, 1), (10, "ii", 6, 1), (12, "d", 6.0), (16, "Q", 6)]


@pytest.mark.parametrize("kind", [*IN_PLACE, *ELSEWHERE])
def test_an_orientation_of_any_type_is_applied_once(tmp_path: Path, kind: tuple) -> None:
    """And the profile that the pixels are in stays, where EXIF data has to go."""
    path, exif = tmp_path / "a.jpg", exif_of_type(*kind)
    stored = Image.fromarray(IMAGE)
    stored.save(path, exif=b"Exif\0\0" + exif, icc_profile=PROFILE)
    assert ImageOps.exif_transpose(Image.open(path)).size == IMAGE.shape[:2]
    expected = Metadata(None, PROFILE)
    if kind in IN_PLACE:
        expected = Metadata(exif_of_type(*kind[:2], 1), PROFILE)
    dropped = nullcontext() if kind in IN_PLACE else pytest.warns(ImageWarning, match="set to 1")
    with dropped:
        image, metadata = parse_image(path.read_bytes(), "a", keep_metadata=True)
    assert image.shape[:2] == IMAGE.shape[1::-1] and metadata == expected
    _, lost = parse_image(path.read_bytes(), "a")
    assert lost.names() == ["EXIF"]

    dropped = nullcontext() if kind in IN_PLACE else pytest.warns(ImageWarning, match="set to 1")
    with dropped:
        stored.save(tmp_path / "a.cmb", exif=exif)
    saved = Image.open(tmp_path / "a.cmb")
    assert saved.size == IMAGE.shape[:2] == ImageOps.exif_transpose(saved).size


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_kept_metadata_is_the_same_bytes_but_for_the_orientation(
    tmp_path: Path, model_dir: str, suffix: str, orientation: int
) -> None:
    source = save(tmp_path, suffix, orientation)
    file, back = tmp_path / "a.cmb", tmp_path / "back.png"
    use = ["--model", model_dir]
    assert main(["encode", str(source), "-o", str(file), "--keep-metadata", *use]) == 0
    metadata = Container.unpack(file.read_bytes()).metadata
    assert metadata == Metadata(exif_of(1), PROFILE, (XMP % 1).encode())
    assert main(["decode", str(file), "-o", str(back), *use]) == 0
    with Image.open(back) as decoded:
        decoded.load()
        assert decoded.size == (60, 40)
        assert decoded.info["exif"].removeprefix(b"Exif\0\0") == metadata.exif
        assert decoded.info["icc_profile"] == PROFILE and decoded.info["xmp"] == metadata.xmp
        assert decoded.getexif()[0x0112] == 1
    model = cmamba_ref.CMamba.from_pretrained(model_dir)
    np.testing.assert_array_equal(
        read_image(back), cmamba_ref.decode(cmamba_ref.encode(read_image(source), model), model)
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("keep", [False, True])
def test_images_are_upright_with_and_without_metadata(
    tmp_path: Path, model_dir: str, orientation: int, keep: bool
) -> None:
    source = tmp_path / "a.png"
    Image.fromarray(IMAGE).save(source, exif=exif_of(orientation))
    use = ["--model", model_dir, *(["--keep-metadata"] if keep else [])]
    assert main(["encode", str(source), "-o", str(tmp_path / "a.cmb"), *use]) == 0
    args = ["decode", str(tmp_path / "a.cmb"), "-o", str(tmp_path / "b.png"), *use[:2]]
    assert main(args) == 0
    model = cmamba_ref.CMamba.from_pretrained(model_dir)
    expected = cmamba_ref.decode(cmamba_ref.encode(read_image(source), model), model)
    np.testing.assert_array_equal(read_image(tmp_path / "b.png"), expected)


def test_pixels_stay_in_the_profile_that_is_kept(
    tmp_path: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_images import profile

    linear = profile(1.0)
    Image.fromarray(IMAGE).save(tmp_path / "a.png", icc_profile=linear)
    model = cmamba_ref.CMamba.from_pretrained(model_dir)
    args = ["encode", str(tmp_path / "a.png"), "--model", model_dir, "--force"]
    assert main([*args, "--keep-metadata"]) == 0
    kept = (tmp_path / "a.cmb").read_bytes()
    assert kept == cmamba_ref.encode(IMAGE, model, metadata=Metadata(icc_profile=linear))
    assert main(args) == 0
    converted = read_image(tmp_path / "a.png")
    assert np.abs(converted.astype(int) - IMAGE).max() > 20
    assert (tmp_path / "a.cmb").read_bytes() == cmamba_ref.encode(converted, model)


def test_dropped_metadata_is_named(
    tmp_path: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, ".jpg", 1)
    (tmp_path / "more").mkdir()
    Image.fromarray(IMAGE).save(tmp_path / "more" / "plain.png")
    use = ["--model", model_dir, "--force"]
    assert main(["encode", str(tmp_path / "a.jpg"), *use]) == 0
    assert "a.cmb: dropped EXIF, XMP; --keep-metadata keeps it\n" in capsys.readouterr().out
    assert Container.unpack((tmp_path / "a.cmb").read_bytes()).metadata == NO_METADATA
    assert main(["encode", str(tmp_path / "more" / "plain.png"), *use]) == 0
    assert "--keep-metadata" not in capsys.readouterr().out
    assert main(["encode", str(tmp_path), "--jobs", "1", *use]) == 0
    assert "\ndropped the metadata of 1; --keep-metadata keeps it\n" in capsys.readouterr().out
    assert main(["encode", str(tmp_path), "--jobs", "1", "--keep-metadata", *use]) == 0
    assert "--keep-metadata" not in capsys.readouterr().out
    assert Container.unpack((tmp_path / "a.cmb").read_bytes()).metadata.exif == exif_of(1)


def test_the_time_is_kept_where_asked_for(tmp_path: Path, model_dir: str) -> None:
    then = 1_000_000_000_123_456_789
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(IMAGE).save(tmp_path / "in" / name)
        os.utime(tmp_path / "in" / name, ns=(then, then))
    use = ["--model", model_dir, "--keep-time"]
    one, back = tmp_path / "one.cmb", tmp_path / "one.png"
    assert main(["encode", str(tmp_path / "in" / "a.png"), "-o", str(one), *use]) == 0
    assert main(["decode", str(one), "-o", str(back), *use]) == 0
    many = tmp_path / "many"
    assert main(["encode", str(tmp_path / "in"), "-o", str(many), "--jobs", "1", *use]) == 0
    for path in (one, back, many / "a.cmb", many / "b.cmb"):
        assert path.stat().st_mtime_ns == then, path
    assert (
        main(["encode", str(tmp_path / "in" / "a.png"), "-o", str(one), *use[:2], "--force"]) == 0
    )
    assert one.stat().st_mtime_ns > then


def test_a_stream_has_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["encode", "-", "-o", str(tmp_path / "a.cmb"), "--keep-time"]) == 2
    assert "`--keep-time` must have files on both sides" in capsys.readouterr().err


def test_background_and_alpha_on_the_command_line(tmp_path: Path, model_dir: str) -> None:
    alpha = np.arange(40 * 60).astype(np.uint8).reshape(40, 60)
    Image.fromarray(np.dstack([IMAGE, alpha])).save(tmp_path / "a.png")
    use = ["--model", model_dir, "--force", "--verify"]
    assert main(["encode", str(tmp_path / "a.png"), *use]) == 0
    back = ["decode", str(tmp_path / "a.cmb"), "-o", str(tmp_path / "b.png"), *use[:3]]
    assert main(back) == 0
    np.testing.assert_array_equal(read_image(tmp_path / "b.png")[..., 3], alpha)
    assert main(["encode", str(tmp_path / "a.png"), "--background", "#102030", *use]) == 0
    model = cmamba_ref.CMamba.from_pretrained(model_dir)
    laid = read_image(tmp_path / "a.png", background=(0x10, 0x20, 0x30))
    assert (tmp_path / "a.cmb").read_bytes() == cmamba_ref.encode(laid, model)
    for wrong in ("no colour", "#10203040"):
        with pytest.raises(SystemExit) as caught:
            main(["encode", str(tmp_path / "a.png"), "--background", wrong])
        assert caught.value.code == 2


def test_info_names_all_and_speaks_json(
    tmp_path: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = cmamba_ref.CMamba.from_pretrained(model_dir)
    kept = Metadata(exif_of(1), PROFILE, b"<x/>")
    image = np.dstack([IMAGE, IMAGE[..., 0]])
    (tmp_path / "deep").mkdir()
    full, plain = tmp_path / "deep" / "full.cmb", tmp_path / "plain.cmb"
    full.write_bytes(cmamba_ref.encode(image, model, 2.5, metadata=kept))
    plain.write_bytes(cmamba_ref.encode(IMAGE[..., 0], model))
    assert main(["info", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "60x40, colour, alpha (" in text and "60x40, grey\n" in text
    assert f"exif ({len(exif_of(1))} bytes), icc_profile ({len(PROFILE)} bytes), xmp (4" in text
    assert main(["info", "--json", str(plain), str(tmp_path / "deep")]) == 0
    of_plain, of_full = json.loads(capsys.readouterr().out)
    assert of_plain["file"] == str(plain) and of_full["file"] == str(full)
    assert (of_plain["grey"], of_plain["alpha_bytes"], of_plain["metadata_bytes"]) == (
        True,
        None,
        {},
    )
    assert of_full["quality"] == 2.5 and of_full["format"] == 1
    assert of_full["metadata_bytes"]["icc_profile"] == len(PROFILE)
    assert of_full["bytes"] == full.stat().st_size
    (tmp_path / "bad.cmb").write_bytes(b"bad")
    assert main(["info", "--json", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert len(json.loads(out)) == 2 and err.count("\n") == 1


# The orientation, in place.


@given(st.binary(max_size=60), st.sampled_from([b"", b"II*\0", b"MM\0*"]))
def test_any_exif_keeps_its_length(noise, start):
    data = start + noise
    upright = Metadata(exif=data).upright().exif
    data = data[6:] if data.startswith(b"Exif\0\0") else data
    assert len(upright) == len(data)
    assert sum(a != b for a, b in zip(upright, data, strict=True)) <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["little", "big"])
def test_only_the_orientation_changes(orientation, order):
    exif = Image.Exif()
    exif.endian = "<" if order == "little" else ">"
    exif[0x0112], exif[0x0110] = orientation, "a camera"
    data = exif.tobytes().removeprefix(b"Exif\0\0")
    after = Metadata(exif=data).upright().exif
    read = Image.Exif()
    read.load(after)
    assert dict(read) == {0x0112: 1, 0x0110: "a camera"}
    assert sum(a != b for a, b in zip(after, data, strict=True)) == (orientation != 1)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'tiff:Orientation="8"', b'tiff:Orientation="1"'),
        (b'tiff:Orientation="3" x="6"', b'tiff:Orientation="1" x="6"'),
        (b"<tiff:Orientation>6</tiff:Orientation>", b"<tiff:Orientation>1</tiff:Orientation>"),
        (b'tiff:Orientation="66"', b'tiff:Orientation="16"'),  # Pillow reads a 6
        (b"tiff:Orientation='6'", b"tiff:Orientation='6'"),  # and here none
        (b"\xff\xfe no text", b"\xff\xfe no text"),
    ],
)
def test_the_orientation_in_xmp_becomes_1(before, after):
    assert Metadata(xmp=before).upright().xmp == after


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the EXIF
@pytest.mark.parametrize("start", [b"II*\0", b"II\0*", b"MM\0*", b"MM*\0", b"II+\0"])
@pytest.mark.parametrize("prefix", [b"", b"Exif\0\0", b"Exif\0\0Exif\0\0"])
@pytest.mark.parametrize("kind", [1, 2, 3, 4, 8])
def test_no_image_is_turned_twice(tmp_path: Path, start: bytes, prefix: bytes, kind: int) -> None:
    """Whatever Pillow reads an orientation of 6 from, three prefixes at most: the PNG of the result
    shows as the result."""
    order = "<" if start.startswith(b"II") else ">"
    value = struct.pack(order + ("H" if kind in (3, 8) else "I"), 6).ljust(4, b"\0")
    entry = struct.pack(order + "HHI", 0x0112, kind, 1) + value
    exif = start + struct.pack(order + "IH", 8, 1) + entry + bytes(4)
    Image.fromarray(IMAGE).save(tmp_path / "plain.png")
    data = (tmp_path / "plain.png").read_bytes()
    chunk = png_chunk(b"eXIf", prefix + exif)
    image, metadata = parse_image(data[:33] + chunk + data[33:], "a.png", keep_metadata=True)
    is_turned = kind in (3, 4, 8) and start != b"II+\0" and prefix.count(b"Exif") < 2
    assert image.shape[:2] == ((60, 40) if is_turned else (40, 60))
    again, kept = parse_image(png_bytes(image, metadata), "b.png", keep_metadata=True)
    assert again.shape == image.shape and kept == metadata


def test_a_raw_profile_of_older_programs_is_exif(tmp_path: Path) -> None:
    exif = b"Exif\0\0" + exif_of(6)
    texts = PngImagePlugin.PngInfo()
    lines = "\n".join(exif.hex()[k : k + 72] for k in range(0, 2 * len(exif), 72))
    texts.add_text("Raw profile type exif", f"\nexif\n{len(exif):8}\n{lines}\n")
    Image.fromarray(IMAGE).save(tmp_path / "a.png", pnginfo=texts)
    image, metadata = parse_image((tmp_path / "a.png").read_bytes(), "a", keep_metadata=True)
    assert image.shape == (60, 40, 3) and metadata == Metadata(exif=exif_of(1))


def test_a_profile_that_cannot_be_applied_is_not_kept(tmp_path: Path) -> None:
    Image.fromarray(IMAGE[..., 0]).save(tmp_path / "grey.png", icc_profile=PROFILE)
    Image.fromarray(IMAGE).save(tmp_path / "noise.png", icc_profile=b"noise")
    Image.fromarray(IMAGE).save(tmp_path / "text.tif", tiffinfo={34675: "noise"})
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        with pytest.raises(ImageError, match="colour profile that cannot be applied"):
            parse_image(data, path.name, keep_metadata=True, strict_color=True)
        with pytest.warns(ImageWarning, match=f"{path.name} has a colour profile that cannot"):
            image, metadata = parse_image(data, path.name, keep_metadata=True)
        np.testing.assert_array_equal(image, IMAGE[..., 0] if path.stem == "grey" else IMAGE)
        assert metadata == NO_METADATA


def test_a_profile_too_large_to_keep_is_applied_all_the_same(tmp_path: Path) -> None:
    """Room behind the tags of a profile, as large tables take it."""
    icc = PROFILE + bytes(2**20)
    icc = struct.pack(">I", len(icc)) + icc[4:]
    Image.fromarray(IMAGE).save(tmp_path / "a.jpg", icc_profile=icc, quality=95)
    data = (tmp_path / "a.jpg").read_bytes()
    image, metadata = parse_image(data, "a")
    assert image.shape == IMAGE.shape and metadata == NO_METADATA
    with pytest.raises(ImageError, match="more metadata than a file can hold: `icc_profile` must"):
        parse_image(data, "a", keep_metadata=True)


def test_a_background_is_laid_in_srgb_and_no_profile_kept(tmp_path: Path) -> None:
    from test_images import profile

    image = np.dstack([IMAGE, np.zeros((40, 60), np.uint8)])
    Image.fromarray(image).save(tmp_path / "a.png", icc_profile=profile(1.0), exif=exif_of(1))
    data = (tmp_path / "a.png").read_bytes()
    laid, metadata = parse_image(data, "a", background=(100, 50, 7), keep_metadata=True)
    assert (laid == (100, 50, 7)).all() and metadata == Metadata(exif=exif_of(1))


def test_wrong_metadata_is_refused_before_the_work() -> None:
    for wrong in (None, {"exif": b""}):
        with pytest.raises(InvalidArgumentError, match="`metadata` must be a Metadata"):
            cmamba_ref.encode(IMAGE, metadata=wrong)

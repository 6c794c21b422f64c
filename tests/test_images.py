"""Images from disk: read as one sees them, or refused with the way out."""

import re
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from codec_helpers import PNG_SIGNATURE, png_chunk
from PIL import Image, ImageCms, ImageFile

from cmamba_ref import ImageError, ImageWarning, InvalidArgumentError, atomic_write
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.codec.images import (
    bits_of,
    check_header,
    parse_image,
    read_image,
    read_opaque_image,
    refuse_what_would_be_lost,
    to_array,
)
from cmamba_ref.codec.output import write_png

HEIGHT, WIDTH = 12, 20


@pytest.fixture
def rgb() -> np.ndarray:
    """Smooth in x and y, with every channel of its own."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([x * 12, y * 20, (x + y) * 8], axis=-1).astype(np.uint8)


def save(image: Image.Image | np.ndarray, path: Path, **options: Any) -> Path:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(path, **options)
    return path


def refusal(path: Path, **options: Any) -> str:
    """The message of the ImageError, which is one line and begins with the file's name."""
    with pytest.raises(ImageError) as caught:
        read_image(path, **options)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path)).strip()


def png(width: int, height: int, depth: int, colour_type: int, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return PNG_SIGNATURE + b"".join(
        [png_chunk(b"IHDR", header), *chunks, png_chunk(b"IEND", b"")],
    )


# ---------------------------------------------------------------- read


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "webp"])
def test_colour_is_read_exactly(tmp_path: Path, rgb: np.ndarray, suffix: str) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    image = read_image(save(rgb, tmp_path / f"a.{suffix}", **options))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, rgb)


def test_grey_has_two_dimensions(tmp_path: Path, rgb: np.ndarray) -> None:
    grey = rgb[..., 0]
    np.testing.assert_array_equal(read_image(save(grey, tmp_path / "a.png")), grey)
    np.testing.assert_array_equal(read_image(save(grey, tmp_path / "a.jpg", quality=95)).ndim, 2)


def test_one_bit_becomes_black_and_white(tmp_path: Path, rgb: np.ndarray) -> None:
    bits = rgb[..., 0] > 100
    image = read_image(save(Image.fromarray(bits), tmp_path / "a.png"))
    np.testing.assert_array_equal(image, np.where(bits, 255, 0))


def test_plain_bitmap_is_read(tmp_path: Path) -> None:
    """The one PNM format without a largest value."""
    (tmp_path / "a.pbm").write_text("P1\n3 2\n1 0 1\n0 0 1\n")
    expected = [[0, 255, 0], [255, 255, 0]]
    np.testing.assert_array_equal(read_image(tmp_path / "a.pbm"), expected)


def test_a_palette_becomes_rgb(tmp_path: Path, rgb: np.ndarray) -> None:
    indexed = Image.fromarray(rgb).quantize(16)
    expected = np.array(indexed.convert("RGB"))
    for name in ("a.png", "a.gif"):
        np.testing.assert_array_equal(read_image(save(indexed, tmp_path / name)), expected)


def test_an_opaque_alpha_channel_is_dropped(tmp_path: Path, rgb: np.ndarray) -> None:
    opaque = Image.fromarray(rgb).convert("RGBA")
    np.testing.assert_array_equal(read_image(save(opaque, tmp_path / "rgba.png")), rgb)
    grey = Image.fromarray(rgb[..., 0]).convert("LA")
    np.testing.assert_array_equal(read_image(save(grey, tmp_path / "la.png")), rgb[..., 0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, rgb: np.ndarray, orientation: int) -> None:
    stored = {
        1: rgb,
        2: rgb[:, ::-1],
        3: rgb[::-1, ::-1],
        4: rgb[::-1],
        5: rgb.swapaxes(0, 1),
        6: np.rot90(rgb, 1),  # EXIF 6: the viewer turns by 90 degrees clockwise
        7: rgb[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(rgb, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.png", "a.tif"):
        path = save(np.ascontiguousarray(stored), tmp_path / name, exif=exif)
        np.testing.assert_array_equal(read_image(path), rgb)


BIG_ENDIAN_TIFF = b"Exif\0\0MM\0*\0\0\0\x08"


def exif_entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
    return struct.pack(">HHI", tag, kind, count) + value


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the EXIF
@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
@pytest.mark.parametrize(
    ("exif", "turned"),
    [
        (b"Exif\0\0" + b"\xff" * 50, False),
        (b"Exif\0\0MM\0*", False),
        (BIG_ENDIAN_TIFF[:-1] + b"\xff", False),
        (BIG_ENDIAN_TIFF + b"\0\1" + exif_entry(0x0112, 3, 1, b"\0\x09\0\0"), False),
        (BIG_ENDIAN_TIFF + b"\0\1" + exif_entry(0x0112, 2, 4, b"six\0"), False),
        (BIG_ENDIAN_TIFF + b"\0\1" + exif_entry(0x0112, 3, 2**31, b"\0\0\0\x08"), False),
        (
            # The resolution as text: it cannot be written back.
            BIG_ENDIAN_TIFF
            + b"\0\2"
            + exif_entry(0x0112, 3, 1, b"\0\6\0\0")
            + exif_entry(0x0128, 2, 4, b"abc\0"),
            True,
        ),
    ],
    ids=["noise", "cut", "beyond-the-end", "orientation-9", "a-word", "too-many", "other-tag"],
)
def test_broken_exif_does_not_refuse_the_image(
    tmp_path: Path, rgb: np.ndarray, exif: bytes, turned: bool, name: str
) -> None:
    lossless = {"lossless": True} if name.endswith("webp") else {}
    plain = read_image(save(rgb, tmp_path / f"plain-{name}", **lossless))
    expected = np.rot90(plain, -1) if turned else plain
    path = save(rgb, tmp_path / name, exif=exif, **lossless)
    np.testing.assert_array_equal(read_image(path), expected)


def test_mpo_reads_primary_image(tmp_path: Path, rgb: np.ndarray) -> None:
    """Phones put a preview or a gain map behind the image."""
    preview = [Image.fromarray(rgb[::2, ::2])]
    both = save(rgb, tmp_path / "a.mpo", save_all=True, append_images=preview, quality=95)
    assert read_image(both).shape == rgb.shape


# ---------------------------------------------------------------- colour profiles


def profile(gamma: float) -> bytes:
    """sRGB's profile with its tone curves replaced by one power law."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack_from(">I", data, 128)
    for i in range(count):
        name, offset, size = struct.unpack_from(">4sII", data, 132 + 12 * i)
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            curve = b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256))
            assert len(curve) <= size
            data[offset : offset + len(curve)] = curve
    return bytes(data)


def test_a_colour_profile_is_converted_to_srgb(tmp_path: Path, rgb: np.ndarray) -> None:
    """Linear light: the value that sRGB gives it is known in closed form."""
    light = rgb / 255
    expected = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    image = read_image(save(rgb, tmp_path / "a.png", icc_profile=profile(1.0)))
    assert np.abs(image - expected).max() <= 2
    assert np.abs(image.astype(int) - rgb).max() > 40


def test_an_srgb_profile_changes_nothing(tmp_path: Path, rgb: np.ndarray) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(read_image(save(rgb, tmp_path / "a.png", icc_profile=srgb)), rgb)


def test_a_profile_and_a_rotation_and_alpha_together(tmp_path: Path, rgb: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    linear = profile(1.0)
    upright = read_image(save(rgb, tmp_path / "a.png", icc_profile=linear))
    alpha = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH)
    turned = np.ascontiguousarray(np.dstack([rgb, alpha])[::-1, ::-1])
    path = save(turned, tmp_path / "b.png", icc_profile=linear, exif=exif)
    np.testing.assert_array_equal(read_image(path), np.dstack([upright, alpha]))


@pytest.mark.parametrize("grey", [True, False])
def test_inapplicable_profile_is_refused(tmp_path: Path, rgb: np.ndarray, grey: bool) -> None:
    """Broken, or of another kind of image: sRGB's on grey. Without `strict_color`, ignored."""
    icc = profile(1.0) if grey else b"no profile at all"
    image = rgb[..., 0] if grey else rgb
    path = save(image, tmp_path / "a.png", icc_profile=icc)
    message = refusal(path, strict_color=True)
    assert "colour profile that cannot be applied" in message
    assert "convert it to sRGB first" in message
    with pytest.warns(ImageWarning) as caught:
        np.testing.assert_array_equal(read_image(path), image)
    (warned,) = caught
    ignored = "has a colour profile that cannot be applied; it is ignored"
    assert str(warned.message) == f"{path} {ignored}"
    with pytest.raises(ImageError, match="cannot be applied"):
        read_opaque_image(path)


def test_grey_profile_on_colours_is_ignored(tmp_path: Path, rgb: np.ndarray) -> None:
    """The profile of a grey gamma of 1, written by hand: applied to grey, not to colours."""
    curve = b"curv" + struct.pack(">IIH", 0, 1, 256) + bytes(2)
    white = b"XYZ " + struct.pack(">4i", 0, 63190, 65536, 54061)
    tags = struct.pack(">I4sII4sII", 2, b"kTRC", 156, 14, b"wtpt", 172, 20)
    head = struct.pack(
        ">I4xI12s12x4s28x3i48x", 192, 0x02100000, b"mntrGRAYXYZ ", b"acsp", 63190, 65536, 54061
    )
    icc = head + tags + curve + white
    grey = save(rgb[..., 0], tmp_path / "grey.png", icc_profile=icc)
    assert np.abs(read_image(grey).astype(int) - rgb[..., 0]).max() > 40
    path = save(rgb, tmp_path / "rgb.png", icc_profile=icc)
    with pytest.warns(ImageWarning, match="it is ignored"):
        np.testing.assert_array_equal(read_image(path), rgb)


# ---------------------------------------------------------------- colour spaces of PNG chunks


def with_chunks(path: Path, image: np.ndarray, *chunks: bytes, **options: Any) -> Path:
    """A PNG file with these chunks before all others but IHDR."""
    save(image, path, **options)
    data = path.read_bytes()
    path.write_bytes(data[:33] + b"".join(chunks) + data[33:])
    return path


def cicp(*codes: int) -> bytes:
    return png_chunk(b"cICP", bytes(codes))


def gama(value: int) -> bytes:
    return png_chunk(b"gAMA", struct.pack(">I", value))


def chrm(*xy: float) -> bytes:
    return png_chunk(b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in xy)))


def to_srgb(image: np.ndarray, xy: tuple[float, ...], gamma: float | None) -> np.ndarray:
    """Exact colours in sRGB of an image with these primaries, and white at D65.

    `gamma` is the exponent to light, None for sRGB's curve.
    """

    def to_xyz(white_and_primaries: tuple[float, ...]) -> np.ndarray:
        x, y = np.reshape(white_and_primaries, (4, 2)).T
        columns = np.stack([x / y, np.ones(4), (1 - x - y) / y])
        return columns[:, 1:] * (np.linalg.inv(columns[:, 1:]) @ columns[:, 0])

    value = image / 255
    srgb_light = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    light = srgb_light if gamma is None else value**gamma
    light = light @ (np.linalg.inv(to_xyz(SRGB_XY)) @ to_xyz(xy)).T
    light = light.clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


SRGB_XY = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
P3_XY = (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)
BT2020_XY = (0.3127, 0.3290, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046)


@pytest.mark.parametrize(
    ("chunks", "xy", "gamma"),
    [
        ([cicp(12, 13, 0, 1)], P3_XY, None),
        ([cicp(9, 4, 0, 1)], BT2020_XY, 2.2),
        ([cicp(12, 13, 0, 1), gama(100_000)], P3_XY, None),
        ([chrm(*P3_XY), gama(45455)], P3_XY, None),
        ([chrm(*P3_XY)], P3_XY, None),
        ([gama(100_000)], SRGB_XY, 1.0),
        ([gama(55_556), chrm(*P3_XY)], P3_XY, 1.8),
    ],
    ids=["p3", "bt2020", "over-gamma", "p3-chrm", "chrm-alone", "linear", "apple"],
)
def test_declared_colours_are_converted_to_srgb(
    tmp_path: Path, rgb: np.ndarray, chunks: list[bytes], xy: tuple[float, ...], gamma: float
) -> None:
    path = with_chunks(tmp_path / "a.png", rgb, *chunks)
    image = read_image(path)
    assert np.abs(image - to_srgb(rgb, xy, gamma)).max() <= 2
    assert np.abs(image.astype(int) - rgb).max() > 5
    data = path.read_bytes()
    kept, metadata = parse_image(data, "a", keep_metadata=True)
    np.testing.assert_array_equal(kept, rgb)
    again = save(rgb, tmp_path / "b.png", icc_profile=metadata.icc_profile)
    np.testing.assert_array_equal(read_image(again), image)


def test_declared_gamma_of_grey_is_applied(tmp_path: Path, rgb: np.ndarray) -> None:
    grey = rgb[..., 0]
    path = with_chunks(tmp_path / "a.png", grey, gama(100_000), chrm(*P3_XY))
    expected = to_srgb(np.dstack([grey] * 3), SRGB_XY, 1.0)[..., 0]
    assert np.abs(read_image(path) - expected).max() <= 2


def test_white_of_other_chromaticity_stays_white(tmp_path: Path) -> None:
    white = np.full((2, 2, 3), 255, np.uint8)
    d50 = chrm(0.3457, 0.3585, *P3_XY[2:])
    assert (read_image(with_chunks(tmp_path / "a.png", white, d50)) == 255).all()


@pytest.mark.parametrize(
    "chunks",
    [
        [cicp(1, 13, 0, 1), gama(100_000)],
        [gama(45455), chrm(*SRGB_XY)],
        [gama(45455)],
        [gama(100_000), png_chunk(b"sRGB", b"\0"), chrm(*P3_XY)],
    ],
    ids=["cicp", "gama-chrm", "gama", "srgb-first"],
)
def test_declared_srgb_leaves_pixels_alone(
    tmp_path: Path, rgb: np.ndarray, chunks: list[bytes]
) -> None:
    path = with_chunks(tmp_path / "a.png", rgb, *chunks)
    image, metadata = parse_image(path.read_bytes(), "a", keep_metadata=True)
    np.testing.assert_array_equal(image, rgb)
    np.testing.assert_array_equal(read_image(path), rgb)
    assert metadata.icc_profile is None


def test_cicp_wins_over_a_profile_and_a_profile_over_gamma(tmp_path: Path, rgb: np.ndarray) -> None:
    linear = profile(1.0)
    by_profile = read_image(save(rgb, tmp_path / "a.png", icc_profile=linear))
    path = with_chunks(tmp_path / "b.png", rgb, gama(30_000), icc_profile=linear)
    np.testing.assert_array_equal(read_image(path), by_profile)
    path = with_chunks(tmp_path / "c.png", rgb, cicp(1, 13, 0, 1), icc_profile=linear)
    np.testing.assert_array_equal(read_image(path), rgb)


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused(tmp_path: Path, rgb: np.ndarray, transfer: int, name: str) -> None:
    path = with_chunks(tmp_path / "a.png", rgb, cicp(9, transfer, 0, 1))
    assert refusal(path) == f"has HDR colours ({name}); convert it to sRGB first"
    with pytest.raises(ImageError, match="HDR"):
        check_header(path)


@pytest.mark.parametrize(
    "chunk",
    [
        cicp(2, 2, 0, 1),
        cicp(1, 13, 1, 1),
        cicp(1, 13, 0, 0),
        cicp(1, 13),
        cicp(),
        gama(0),
        gama(1),
        chrm(*[0] * 8),
        chrm(0.3127, 0.0, *SRGB_XY[2:]),
        chrm(*SRGB_XY[:2], *[0.3, 0.3] * 3),
    ],
    ids=lambda chunk: f"{chunk[4:8].decode()}-{chunk[8:-4].hex()[:16]}",
)
def test_senseless_colour_chunks_are_ignored_with_a_warning(
    tmp_path: Path, rgb: np.ndarray, chunk: bytes
) -> None:
    path = with_chunks(tmp_path / "a.png", rgb, chunk)
    with pytest.warns(ImageWarning, match=r"a\.png has a .* chunk that cannot be applied; it is"):
        np.testing.assert_array_equal(read_image(path), rgb)
    assert "chunk that cannot be applied (" in refusal(path, strict_color=True)


# ---------------------------------------------------------------- refused


def test_transparency_is_kept(tmp_path: Path, rgb: np.ndarray) -> None:
    """An alpha channel, a transparent palette entry, a colour key: each as the file means it."""
    alpha = (np.arange(HEIGHT * WIDTH) % 251).astype(np.uint8).reshape(HEIGHT, WIDTH)
    grey, glass = rgb[..., 0], np.dstack([rgb, alpha])
    indexed = Image.fromarray(rgb).quantize(16)
    numbers, palette = np.array(indexed), np.array(indexed.getpalette()).reshape(-1, 3)
    chosen = np.where(numbers == 3, 0, 255).astype(np.uint8)
    of_palette = np.dstack([palette[numbers], chosen]).astype(np.uint8)
    entries = bytes(range(10, 26))
    entry_alpha = np.frombuffer(entries, np.uint8)[numbers]
    keyed = np.where((rgb == rgb[2, 5]).all(axis=2), 0, 255).astype(np.uint8)
    grey_keyed = np.where(grey == 12, 0, 255).astype(np.uint8)
    for path, expected in (
        (save(glass, tmp_path / "rgba.png"), glass),
        (save(glass, tmp_path / "rgba.webp", lossless=True, exact=True), glass),
        (save(np.dstack([grey, alpha]), tmp_path / "la.png"), np.dstack([grey, alpha])),
        (save(indexed, tmp_path / "palette.png", transparency=3), of_palette),
        (save(indexed, tmp_path / "palette.gif", transparency=3), of_palette),
        (
            save(indexed, tmp_path / "entries.png", transparency=entries),
            np.dstack([of_palette[..., :3], entry_alpha]),
        ),
        (
            save(rgb, tmp_path / "key.png", transparency=tuple(rgb[2, 5].tolist())),
            np.dstack([rgb, keyed]),
        ),
        (
            save(grey, tmp_path / "grey_key.png", transparency=12),
            np.dstack([grey, grey_keyed]),
        ),
    ):
        np.testing.assert_array_equal(read_image(path), expected, path.name)
        with pytest.raises(ImageError, match="has transparency; flatten it"):
            read_opaque_image(path)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_colour_key_of_few_bits_is_kept(tmp_path: Path, depth: int) -> None:
    """The key counts in the file's levels, the pixels that are read in 256."""
    top = 2**depth - 1
    levels = np.arange(8 * 3).reshape(3, 8) % (top + 1)
    bits = np.unpackbits(levels.astype(np.uint8)[..., None], axis=2)[..., -depth:]
    rows = np.packbits(bits.reshape(3, -1), axis=1)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    path = tmp_path / "key.png"
    key = png_chunk(b"tRNS", struct.pack(">H", 1))
    path.write_bytes(png(8, 3, depth, 0, key, png_chunk(b"IDAT", pixels)))
    expected = np.dstack([levels * 255 // top, np.where(levels == 1, 0, 255)])
    np.testing.assert_array_equal(read_image(path), expected)


@pytest.mark.parametrize("colour", [(255, 255), "red", (1.0, 1.0, 1.0), (300, 0, 0), (0, 0, -1)])
def test_a_background_that_is_no_colour_is_named(tmp_path: Path, rgb: np.ndarray, colour) -> None:
    Image.fromarray(rgb).save(tmp_path / "a.png")
    with pytest.raises(InvalidArgumentError, match="`background` must be three whole numbers"):
        read_image(tmp_path / "a.png", background=colour)


def test_background_is_laid_under(tmp_path: Path, rgb: np.ndarray) -> None:
    alpha = (np.arange(HEIGHT * WIDTH) % 256).astype(np.uint8).reshape(HEIGHT, WIDTH)
    glass = save(np.dstack([rgb, alpha]), tmp_path / "rgba.png")
    share = alpha[..., None] / 255
    expected = np.floor(rgb * share + np.array([10, 200, 30]) * (1 - share) + 0.5)
    found = read_image(glass, background=(10, 200, 30))
    assert np.abs(found - expected).max() <= 1 and (found == expected).mean() > 0.99
    grey = save(np.dstack([rgb[..., 0], alpha]), tmp_path / "la.png")
    assert read_image(grey, background=(9, 9, 9)).shape == (HEIGHT, WIDTH)
    assert read_image(grey, background=(9, 9, 8)).shape == (HEIGHT, WIDTH, 3)
    opaque = save(rgb, tmp_path / "rgb.png")
    np.testing.assert_array_equal(read_image(opaque, background=(9, 9, 8)), rgb)


def test_unused_transparent_colour_is_opaque(tmp_path: Path, rgb: np.ndarray) -> None:
    path = save(rgb, tmp_path / "a.png", transparency=(1, 1, 1))
    np.testing.assert_array_equal(read_image(path), rgb)


def test_cmyk_is_refused(tmp_path: Path, rgb: np.ndarray) -> None:
    for name in ("a.jpg", "a.tif"):
        path = save(Image.fromarray(rgb).convert("CMYK"), tmp_path / name)
        assert refusal(path) == (
            "is in CMYK colours; convert it to RGB first, or convert it here with --convert "
            "(`convert=True`)"
        )


def cmyk_profile() -> bytes:
    """A printer's profile, version 2, whose one table turns 2^4 mixtures of inks to XYZ."""
    cyan, magenta, yellow, black = np.meshgrid(*[(0, 1)] * 4, indexing="ij")
    rgb = np.stack([1 - cyan, 1 - magenta, 1 - yellow], axis=-1) * (1 - black)[..., None]
    grey = rgb.mean(axis=-1)  # a profile of strange inks: every mixture is grey
    white = np.array([0.9642, 1.0, 0.8249])
    levels = np.round(grey[..., None] * white * 32768).astype(">u2").tobytes()
    lut = b"mft2" + bytes(4) + bytes([4, 3, 2, 0])
    lut += struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    lut += struct.pack(">HH", 2, 2) + struct.pack(">HH", 0, 65535) * 4
    lut += levels + struct.pack(">HH", 0, 65535) * 3
    point = b"XYZ " + struct.pack(">4i", 0, 63190, 65536, 54061)
    tags = struct.pack(">I4sII4sII", 2, b"A2B0", 156, len(lut), b"wtpt", 156 + len(lut), 20)
    size = 156 + len(lut) + 20
    head = struct.pack(">I4xI", size, 0x02100000) + b"prtrCMYKXYZ " + bytes(12) + b"acsp"
    head += bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    return head + tags + lut + point


def test_cmyk_is_converted_by_its_profile(tmp_path: Path, rgb: np.ndarray) -> None:
    """Whose inks are all grey, which Pillow's own formula could not know."""
    cmyk = Image.fromarray(255 - rgb).convert("CMYK")
    path = save(cmyk, tmp_path / "a.tif", icc_profile=cmyk_profile())
    image = read_image(path, convert=True)
    assert image.shape == (HEIGHT, WIDTH, 3) and np.ptp(image.astype(int), axis=2).max() <= 2
    assert image.std() > 10
    kept, metadata = parse_image(path.read_bytes(), "a", convert=True, keep_metadata=True)
    np.testing.assert_array_equal(kept, image)
    assert metadata.icc_profile is None


def test_cmyk_without_a_profile_is_converted_with_a_warning(
    tmp_path: Path, rgb: np.ndarray
) -> None:
    path = save(Image.fromarray(rgb).convert("CMYK"), tmp_path / "a.tif")
    with pytest.warns(ImageWarning, match=r"a\.tif is in CMYK colours without a profile"):
        np.testing.assert_array_equal(read_image(path, convert=True), rgb)
    path = save(Image.fromarray(rgb).convert("CMYK"), tmp_path / "b.tif", icc_profile=profile(1.0))
    with pytest.warns(ImageWarning) as caught:
        np.testing.assert_array_equal(read_image(path, convert=True), rgb)
    ignored, formula = (str(warning.message) for warning in caught)
    assert "colour profile that cannot be applied" in ignored and "CMYK" in formula
    assert "cannot be applied" in refusal(path, convert=True, strict_color=True)


def test_16_bits_are_converted_to_8(tmp_path: Path, rgb: np.ndarray) -> None:
    """Grey is rounded; of colours Pillow keeps the upper 8 bits."""
    deep = (np.arange(HEIGHT * WIDTH) * 65535 // (HEIGHT * WIDTH - 1)).reshape(HEIGHT, WIDTH)
    expected = np.floor(deep / 257 + 0.5)
    deep = deep.astype(np.uint16)
    big_endian = Image.frombytes("I;16B", (WIDTH, HEIGHT), deep.astype(">u2").tobytes())
    (tmp_path / "a.pgm").write_bytes(
        b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + deep.astype(">u2").tobytes()
    )
    white_is_0 = {262: 0}
    for path in (
        save(deep, tmp_path / "a.png"),
        save(deep, tmp_path / "a.tif"),
        save(deep, tmp_path / "lzw.tif", compression="tiff_lzw"),
        save(deep, tmp_path / "a.jp2"),
        save(big_endian, tmp_path / "b.tif"),
        tmp_path / "a.pgm",
    ):
        np.testing.assert_array_equal(read_image(path, convert=True), expected, path.name)
    negative = save(65535 - deep, tmp_path / "negative.tif", tiffinfo=white_is_0)
    with Image.open(negative) as opened:
        assert opened.tag_v2[262] == 0
    np.testing.assert_array_equal(read_image(negative, convert=True), expected)
    keyed = with_chunks(tmp_path / "key.png", deep, png_chunk(b"tRNS", deep[5, 7].tobytes()[::-1]))
    alpha = np.where(deep == deep[5, 7], 0, 255)
    np.testing.assert_array_equal(read_image(keyed, convert=True), np.dstack([expected, alpha]))
    colours = rgb.astype(np.uint16) * 257
    rows = b"".join(b"\0" + row.tobytes() for row in colours.astype(">u2"))
    key = png_chunk(b"tRNS", colours[2, 5].astype(">u2").tobytes())
    data = png(WIDTH, HEIGHT, 16, 2, key, png_chunk(b"IDAT", zlib.compress(rows)))
    (tmp_path / "rgb.png").write_bytes(data)
    alpha = np.where((rgb == rgb[2, 5]).all(axis=2), 0, 255)
    np.testing.assert_array_equal(
        read_image(tmp_path / "rgb.png", convert=True), np.dstack([rgb, alpha])
    )
    assert "--convert" in refusal(tmp_path / "rgb.png")


def test_12_bits_of_a_tiff_fill_the_range(tmp_path: Path) -> None:
    """0 and 4095 are black and white."""
    rows = bytes([0x00, 0x0F, 0xFF]) * 2  # two pixels of 12 bits in 3 bytes, two rows
    fields = {256: 2, 257: 2, 258: 12, 259: 1, 262: 1, 273: 110, 277: 1, 279: len(rows)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(fields))
    path = tmp_path / "a.tif"
    path.write_bytes((head + entries).ljust(110, b"\0") + rows)
    np.testing.assert_array_equal(read_image(path, convert=True), [[0, 255], [0, 255]])


def test_more_than_8_bits_are_refused(tmp_path: Path, rgb: np.ndarray) -> None:
    """Pillow would cut 16-bit RGB down to 8 bits without a word."""
    deep = rgb[..., 0].astype(np.uint16) * 257
    rows = b"".join(b"\0" + row.tobytes() for row in (rgb.astype(">u2") * 257))
    (tmp_path / "rgb.png").write_bytes(
        png(WIDTH, HEIGHT, 16, 2, png_chunk(b"IDAT", zlib.compress(rows)))
    )
    (tmp_path / "rgb.ppm").write_bytes(
        b"P6 %d %d 65535\n" % (WIDTH, HEIGHT) + (rgb.astype(">u2") * 257).tobytes()
    )
    paths = [
        save(deep, tmp_path / "I16.png"),
        save(deep, tmp_path / "I16.tif"),
        save(deep, tmp_path / "I16.jp2"),
        save(deep.astype(np.int32), tmp_path / "I.tif"),
        save(deep.astype(np.float32), tmp_path / "F.tif"),
        tmp_path / "rgb.png",
        tmp_path / "rgb.ppm",
    ]
    for path in paths:
        assert refusal(path).startswith("has more than 8 bits per channel")
    for name in ("I.tif", "F.tif"):  # of no known range
        assert "convert=" not in refusal(tmp_path / name, convert=True)


@pytest.mark.parametrize(("bits", "shifts"), [(5, (10, 5, 0)), (6, (11, 5, 0))])
def test_bmp_of_16_bits_per_pixel_is_read(
    tmp_path: Path, rgb: np.ndarray, bits: int, shifts: tuple[int, int, int]
) -> None:
    """5-5-5 and 5-6-5: every level at the one of 256 that is nearest to it."""
    depths = (5, bits, 5)
    levels = [rgb[..., i].astype(int) >> 8 - depth for i, depth in enumerate(depths)]
    pixels = sum(level << shift for level, shift in zip(levels, shifts, strict=True))
    masks = [(1 << d) - 1 << shift for d, shift in zip(depths, shifts, strict=True)]
    rows = pixels[::-1].astype("<u2").tobytes()  # from the bottom; 40 bytes each, a multiple of 4
    header = struct.pack("<IiiHHIIiiII3I", 40, WIDTH, HEIGHT, 1, 16, 3, 0, 0, 0, 0, 0, *masks)
    path = tmp_path / "a.bmp"
    path.write_bytes(b"BM" + struct.pack("<IHHI", 66 + len(rows), 0, 0, 66) + header + rows)
    expected = [lev * 255 / (2**d - 1) for lev, d in zip(levels, depths, strict=True)]
    assert np.abs(read_image(path) - np.stack(expected, axis=-1)).max() < 1


def test_depth_of_every_raw_mode() -> None:
    """All raw modes in Pillow's binary; 16 bits are deep unless they are those of a pixel."""
    binary = Path(Image.core.__file__).read_bytes()
    found = {raw.decode() for raw in re.findall(rb"(?<=\0)[A-Za-z]+;\d+[A-Z]*(?=\0)", binary)}
    assert {"BGR;16", "RGB;15", "RGB;16B", "LA;16B", "CMYK;16L", "I;12"} <= found
    packed = {"BGR;15", "BGR;16", "RGB;15", "RGB;16", "BGRA;15", "BGRA;15Z", "RGBA;15"}
    deep = {raw for raw in found if re.search(r";(12|16|32|64)", raw)} - packed
    assert {raw for raw in found if bits_of(raw) > 8} == deep
    assert all(bits_of(mode) == 8 for mode in Image.MODES if ";" not in mode)


def test_every_mode_is_read_or_refused() -> None:
    for mode in Image.MODES:
        image = Image.new(mode, (3, 2))
        try:
            refuse_what_would_be_lost(image)
            assert to_array(image, icc=None).shape[:2] == (2, 3)
        except ImageError as error:
            deep = mode[0] in "IF"
            assert ("more than 8 bits" in str(error)) == deep
            assert deep or mode in ("CMYK", "HSV", "LAB")


def test_sgi_of_16_bits_is_refused(tmp_path: Path, rgb: np.ndarray) -> None:
    """Stored without compression, where no raw mode tells."""
    assert "more than 8 bits" in refusal(save(rgb, tmp_path / "a.sgi", bpc=2))


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_several_frames_are_refused(tmp_path: Path, rgb: np.ndarray, name: str) -> None:
    more = [Image.fromarray(255 - rgb), Image.fromarray(rgb // 2)]
    path = save(rgb, tmp_path / name, save_all=True, append_images=more)
    assert refusal(path).startswith("has 3 frames or pages")


# ---------------------------------------------------------------- damaged, missing, hostile


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.tif", "a.webp", "a.bmp"])
def test_truncated_file_is_refused(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(noise, tmp_path / name)
    whole = path.read_bytes()
    for length in (len(whole) // 2, len(whole) * 9 // 10, 20, 3):
        path.write_bytes(whole[:length])
        message = refusal(path)
        assert "damaged or truncated" in message or "no image" in message


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_truncated_file_is_read_as_far_as_it_goes(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(noise, tmp_path / name)
    complete, data = read_image(path), path.read_bytes()
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    np.testing.assert_array_equal(read_image(path, lenient=True), complete)
    path.write_bytes(data[: len(data) * 3 // 4])
    with pytest.warns(ImageWarning, match="damaged or truncated: .*; it is read as far as it goes"):
        image = read_image(path, lenient=True)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    np.testing.assert_array_equal(image[:24], complete[:24])
    assert (image[-8:] != complete[-8:]).any()
    assert "damaged or truncated" in refusal(path)


def test_lenient_readers_and_strict_ones_take_turns(tmp_path: Path, rgb: np.ndarray) -> None:
    """In threads: no strict reader ever gets what a lenient one is allowed."""
    path = save(rgb, tmp_path / "a.png")
    path.write_bytes(path.read_bytes()[:-30])

    def attempt(i: int) -> bool:
        try:
            return read_image(path, lenient=i % 2 == 0).shape == rgb.shape
        except ImageError:
            return False

    with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("ignore", ImageWarning)
        assert list(pool.map(attempt, range(200))) == [True, False] * 100


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.tif", "a.webp"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # damaged metadata, no pixels
@pytest.mark.filterwarnings("ignore::cmamba_ref.ImageWarning")  # a damaged profile
def test_damaged_bytes_never_crash(tmp_path: Path, rgb: np.ndarray, name: str) -> None:
    """Any byte wrong: an image or an ImageError, nothing else."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(rgb, tmp_path / name, exif=exif, icc_profile=profile(1.0))
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    for position in rng.integers(0, len(whole), 60):
        damaged = bytearray(whole)
        damaged[position] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            image = read_image(path, max_pixels=10_000)
        except ImageError:
            continue
        assert image.dtype == np.uint8


def test_what_pillow_does_not_support_is_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.bmp"
    Image.new("RGB", (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    data[30] = 4  # JPEG inside
    path.write_bytes(data)
    assert refusal(path) == "is not supported: Unsupported BMP compression (4)"
    path.write_bytes(b"\0\0\1\xb3" + bytes([20, 1, 64, 0]) + bytes(100))  # MPEG
    assert refusal(path) == "is not supported: cannot load this image"


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for content in (b"", b"hello"):
        path.write_bytes(content)
        assert refusal(path) == "is no image in a format that Pillow reads"


def test_a_missing_file_and_a_directory_are_os_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "missing.png")
    with pytest.raises(IsADirectoryError):
        read_image(tmp_path)


def test_pixel_limit(tmp_path: Path, rgb: np.ndarray) -> None:
    path = save(rgb, tmp_path / "a.png")
    before = Image.MAX_IMAGE_PIXELS
    assert read_image(path, max_pixels=WIDTH * HEIGHT).shape == rgb.shape
    for limit in (
        WIDTH * HEIGHT - 1,
        10,
    ):  # where Pillow alone would warn, and where it would raise
        assert refusal(path, max_pixels=limit).startswith(f"has more than {limit} pixels")
    assert before == Image.MAX_IMAGE_PIXELS


def test_decompression_bomb_is_refused(tmp_path: Path) -> None:
    """A hundred bytes that declare 2.5 gigapixels."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png(50_000, 50_000, 8, 2, png_chunk(b"IDAT", zlib.compress(b"\0"))))
    assert refusal(path).startswith("has more than 100000000 pixels")


# ---------------------------------------------------------------- write


def test_png_round_trip(tmp_path: Path, rgb: np.ndarray) -> None:
    for image in (rgb, rgb[..., 0], rgb[:1, :1], rgb[:, ::-1]):
        write_png(tmp_path / "a.png", image)
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), image)


@pytest.mark.parametrize("shape", [(4, 4, 5), (4,), (4, 4, 1)])
def test_write_png_refuses_other_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match=re.escape(f"got uint8{list(shape)}")):
        write_png(tmp_path / "a.png", np.zeros(shape, dtype=np.uint8))
    with pytest.raises(ImageError, match="got float64"):
        write_png(tmp_path / "a.png", np.zeros((4, 4)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["write", "rename"])
def test_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    target = tmp_path / "a.cmb"
    target.write_bytes(b"before")

    def half(path: Path, data: bytes) -> int:
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        if fault == "write":
            patch.setattr(Path, "write_bytes", half)
        else:
            patch.setattr(atomic_write.os, "replace", broken)
        with pytest.raises(OSError):
            write_atomically(target, b"after" * 100)
    assert [path.name for path in tmp_path.iterdir()] == ["a.cmb"]
    assert target.read_bytes() == b"before"


def test_symlink_is_kept(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"before")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    write_atomically(link, b"after")
    assert link.is_symlink()
    assert (tmp_path / "real").read_bytes() == b"after"


def test_reading_leaves_warning_filters_alone(tmp_path: Path, rgb: np.ndarray) -> None:
    path = save(rgb, tmp_path / "a.png")
    before = list(warnings.filters)
    read_image(path)
    assert list(warnings.filters) == before


def test_readers_in_threads_restore_pillows_state(tmp_path: Path, rgb: np.ndarray) -> None:
    path = save(rgb, tmp_path / "a.png")
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: read_image(path, max_pixels=10_000 + i), range(400)))
    assert limit == Image.MAX_IMAGE_PIXELS
    assert warnings.filters == filters


def test_long_names_are_written_and_modes_kept(tmp_path: Path) -> None:
    path = tmp_path / ("\u4e00" * 83 + ".cmb")  # 253 bytes, of 255 that a name may have
    write_atomically(path, b"1")
    path.chmod(0o640)
    write_atomically(path, b"2")
    assert path.read_bytes() == b"2"
    assert path.stat().st_mode & 0o777 == 0o640

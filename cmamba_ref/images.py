"""Photographs between disk and arrays.

Pillow reads them. What a codec of 8-bit sRGB pictures cannot keep (transparency, 16 bits, several
frames, inks) is refused with the way out instead of being dropped silently.

Not applied, as in Pillow itself: the PNG chunks gAMA, cHRM and cICP. AVIF and JPEG 2000 files of
more than 8 bits arrive here rounded to 8 by Pillow.
"""

from __future__ import annotations

import io
import os
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from cmamba_ref.codec import DEFAULT_MAX_PIXELS
from cmamba_ref.errors import ImageError
from cmamba_ref.files import write_atomically

GREY_MODES = ("1", "L", "LA", "La")
COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr")
DEEP_MODES = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")

# What turns a stored picture upright, by its EXIF orientation; 1 is upright already.
UPRIGHT_BY = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow raises on EXIF that is none: it has no type for it.
BROKEN_EXIF = (SyntaxError, struct.error, OSError, ValueError, TypeError, LookupError)

# A profile that moves no colour by more than this many of 255 levels is sRGB in all but name, and
# applying it would only add rounding errors.
SRGB_TOLERANCE = 2

# Limit and warnings filter belong to the process: two readers must not restore each other's.
_pillow_guard = threading.Lock()


def read_image(path: str | os.PathLike, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> np.ndarray:
    """Read a picture as one sees it: upright, in sRGB.

    EXIF rotation and an embedded colour profile are applied; EXIF that cannot be read is ignored,
    as viewers do, a profile that cannot be applied is an error. Of a phone's multi-picture JPEG
    (MPO) the main picture is read. Palettes become RGB.

    Args:
        path: a file in any format that Pillow reads.
        max_pixels: larger pictures are refused before they are decoded. While this runs, the limit
            stands in Pillow's own, process-wide guard against decompression bombs; threads take
            turns.

    Returns:
        uint8 `[H, W, 3]`, or `[H, W]` where the file is grey or black-and-white.

    Raises:
        ImageError: no picture, damaged, or of a kind that this codec does not store.
        OSError: the file cannot be read.
    """
    return parse_image(Path(path).read_bytes(), str(path), max_pixels=max_pixels)


def parse_image(data: bytes, name: str, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> np.ndarray:
    """`read_image` of bytes that are there already; `name` is what errors call them."""
    try:
        with _pixel_limit(max_pixels), Image.open(io.BytesIO(data)) as picture:
            return to_array(picture)
    except ImageError as error:
        raise ImageError(f"{name} {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is no picture in a format that Pillow reads") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(
            f"{name} has more than {max_pixels} pixels; raise `max_pixels` if you trust it"
        ) from error
    except MemoryError:
        raise
    # On damaged data Pillow raises a dozen types, SyntaxError and struct.error among them.
    except Exception as error:
        raise ImageError(f"{name} is damaged or truncated: {error}") from error


def write_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Write uint8 `[H, W, 3]` or `[H, W]` as PNG, whole or not at all.

    Raises:
        ImageError: another type or shape.
        OSError: the file cannot be written.
    """
    write_atomically(path, png_bytes(image))


def png_bytes(image: np.ndarray) -> bytes:
    """A PNG file of uint8 `[H, W, 3]` or `[H, W]`.

    Raises:
        ImageError: another type or shape.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise ImageError(
            f"`image` must be uint8 [H, W, 3] or [H, W], got {image.dtype}{list(image.shape)}; "
            "round, clip and convert it first"
        )
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def _pixel_limit(max_pixels: int) -> Iterator[None]:
    """Pillow's guard set to `max_pixels`, and strict: by itself it only warns up to twice that."""
    with _pillow_guard:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def to_array(picture: Image.Image) -> np.ndarray:
    """A picture of Pillow's as one sees it: upright, in sRGB; see `read_image`.

    Returns:
        uint8 `[H, W, 3]`, or `[H, W]` where it is grey or black-and-white.

    Raises:
        ImageError: of a kind that this codec does not store; the text continues the file's name.
    """
    _refuse_what_would_be_lost(picture)
    icc = picture.info.get("icc_profile")
    upright = _upright(picture)
    _refuse_transparency(upright)
    plain = upright.convert("L" if upright.mode in GREY_MODES else "RGB")
    return np.array(_to_srgb(plain, icc) if icc else plain)


def _upright(picture: Image.Image) -> Image.Image:
    """Turned as its EXIF says, or as it is stored where that cannot be read: so viewers show it.

    Not `ImageOps.exif_transpose`: it writes all of the EXIF anew, and one tag in it that is wrong,
    whatever it is about, makes that fail.
    """
    picture.load()  # damaged pixels are told; what fails below is the EXIF
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except BROKEN_EXIF:
        return picture
    turn = UPRIGHT_BY.get(orientation)
    return picture if turn is None else picture.transpose(turn)


def _refuse_what_would_be_lost(picture: Image.Image) -> None:
    # MPO is excepted: phones put a small preview or a gain map behind the photograph.
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format != "MPO":
        raise ImageError(
            f"has {frames} frames or pages; a .cmb file holds one picture: extract the one you want"
        )
    if picture.mode in DEEP_MODES or _loses_bits(picture):
        raise ImageError(
            "has more than 8 bits per channel; this codec stores 8: convert it to 8 bits first"
        )
    if picture.mode not in GREY_MODES + COLOUR_MODES:
        raise ImageError(f"is in {picture.mode} colours; convert it to RGB first")


def _loses_bits(picture: Image.Image) -> bool:
    """Whether Pillow is going to cut 16-bit colour down to the 8 bits of its modes."""
    for tile in getattr(picture, "tile", ()):
        args = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if any(isinstance(arg, str) and ";16" in arg for arg in args):
            return True
        if tile[0].startswith("ppm") and args[-1] > 255:  # (mode, largest value)
            return True
    return False


def _refuse_transparency(picture: Image.Image) -> None:
    """Also finds a transparent palette entry and the transparent colour of a PNG without alpha."""
    if not picture.has_transparency_data:
        return
    lowest, _ = picture.convert("RGBA").getchannel("A").getextrema()
    if lowest != 255:
        raise ImageError("has transparency; flatten it onto a background first")


def _to_srgb(picture: Image.Image, icc: bytes) -> Image.Image:
    """Apply an embedded profile to an RGB or grey picture."""
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(icc)),
            ImageCms.createProfile("sRGB"),
            picture.mode,
            "RGB",
        )
    # ImportError: a Pillow that was built without LittleCMS.
    except (ImageCms.PyCMSError, OSError, ImportError) as error:
        raise ImageError(
            f"has a colour profile that cannot be applied ({error}); "
            "convert it to sRGB first, or remove the profile if its colours are sRGB anyway"
        ) from error

    def apply(to: Image.Image) -> Image.Image:
        done = transform.apply(to)
        return done.getchannel("G") if picture.mode == "L" else done

    probe = _all_colours(picture.mode)
    moved = np.abs(np.array(apply(probe), dtype=int) - np.array(probe, dtype=int)).max()
    return picture if moved <= SRGB_TOLERANCE else apply(picture)


def _all_colours(mode: str) -> Image.Image:
    """Every grey level, or a lattice of 16 x 16 x 16 colours."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    lattice = np.stack(np.meshgrid(*[np.arange(0, 256, 17, dtype=np.uint8)] * 3), axis=-1)
    return Image.fromarray(lattice.reshape(64, 64, 3))

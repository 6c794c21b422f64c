"""Image files to arrays; one reader for the codec and for training.

Pillow decodes. What a `.cmb` file cannot hold (16 bits, several frames, CMYK) is refused with a
suggested fix instead of being dropped silently; CMYK and 16 bits are converted if asked for.

AVIF and JPEG 2000 files of more than 8 bits arrive here rounded to 8 by Pillow.
"""

from __future__ import annotations

import io
import os
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import (
    ExifTags,
    Image,
    ImageCms,
    ImageFile,
    TiffImagePlugin,
    UnidentifiedImageError,
)

from cmamba_ref.codec import formats, png_colour
from cmamba_ref.codec.image_codec import (
    DEFAULT_MAX_PIXELS,
    has_alpha,
)
from cmamba_ref.codec.metadata import NO_METADATA, Metadata
from cmamba_ref.errors import ImageError, ImageWarning, InvalidArgumentError

GREY_MODES = ("1", "L", "LA", "La")
COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr")
DEEP_MODES = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")

# Reasons of an ImageError for which another try may read what there is of the file.
NO_IMAGE, DAMAGED = "no image", "damaged or truncated"

# The transpose that turns a stored image upright, by its EXIF orientation; 1 is upright already.
UPRIGHT_BY = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Orientations whose width and height are swapped.
SIDEWAYS = (5, 6, 7, 8)

# Pillow has no type for invalid EXIF; these are the ones it raises.
BROKEN_EXIF = (SyntaxError, struct.error, OSError, ValueError, TypeError, LookupError)

# A profile that moves no colour by more than this many of 255 levels is sRGB in all but name, and
# applying it would only add rounding errors.
SRGB_TOLERANCE = 2


def read_image(
    path: str | os.PathLike,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    background: tuple[int, int, int] | None = None,
    strict_color: bool = False,
    lenient: bool = False,
    convert: bool = False,
) -> np.ndarray:
    """Return an image as viewers show it: upright, in sRGB.

    EXIF rotation and an embedded colour profile are applied; EXIF that cannot be read is ignored,
    as viewers do, and so is a profile that is broken or of another kind of image, with an
    `ImageWarning`. Of a phone's multi-picture JPEG (MPO) the main image is read. Palettes become
    RGB, their transparency an alpha channel.

    Args:
        path: a file in any format that Pillow reads.
        max_pixels: larger images are refused before they are decoded. While this runs, the limit
            is that of Pillow's own, process-wide guard against decompression bombs; threads with
            the same limit read at the same time, others take turns.
        background: lay transparent images onto this colour, in sRGB.
        strict_color: refuse a profile that cannot be applied, in place of ignoring it.
        lenient: read what there is of a damaged or truncated file, with an `ImageWarning`.
        convert: convert grey of up to 16 bits, rounding, colour of 16 bits, of which Pillow keeps
            the upper 8, and CMYK, by its profile, or without one as Pillow does, with an
            `ImageWarning`.

    Returns:
        uint8 `[H, W, 3]`, or `[H, W]` where the file is grey or black-and-white; with an alpha
        channel behind, `[H, W, 4]` or `[H, W, 2]`, where a pixel is not opaque.

    Raises:
        ImageError: no image, damaged, or of a kind that this codec does not store.
        InvalidArgumentError: `background` is no colour.
        OSError: the file cannot be read.
    """
    data = Path(path).read_bytes()
    image, _ = parse_image(
        data,
        str(path),
        max_pixels=max_pixels,
        background=background,
        strict_color=strict_color,
        lenient=lenient,
        convert=convert,
    )
    return image


def read_opaque_image(path: str | os.PathLike) -> np.ndarray:
    """Return an image as `read_image` does with `strict_color`, uint8 `[H, W, 3]` or `[H, W]`.

    Raises:
        ImageError, OSError: as there; also where a pixel is not opaque.
    """
    image = read_image(path, strict_color=True)
    if has_alpha(image):
        raise ImageError(
            f"{path} has transparency; flatten it onto a background first", "transparency"
        )
    return image


def parse_image(
    data: bytes,
    name: str,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    background: tuple[int, int, int] | None = None,
    strict_color: bool = False,
    lenient: bool = False,
    convert: bool = False,
    keep_metadata: bool = False,
) -> tuple[np.ndarray, Metadata]:
    """Return the image in `data` as `read_image` does, and its metadata; errors call it `name`.

    Args:
        keep_metadata: leave the pixels in the file's own colour space, except with a background.
            A profile that is ignored is not kept, nor one of CMYK.

    Returns:
        the image, and the metadata that describes it; without `keep_metadata`, what of it is lost
        if it is not stored. With `keep_metadata` its orientation is 1, as that of the image.
    """

    if background is not None:
        _check_colour(background)

    def parse(*, truncated: bool) -> tuple[np.ndarray, Metadata]:
        limits = max_pixels, truncated
        with _opened(io.BytesIO(data), name, limits, convert=convert) as image:
            icc = profile_of(image, name, strict_color=strict_color)
            keep_profile = keep_metadata and background is None and image.mode != "CMYK"
            array = to_array(image, icc=None if keep_profile else icc, background=background)
            try:
                metadata = metadata_of(image, icc if keep_profile else None)
            except InvalidArgumentError as error:  # too much of it: no reason not to drop it
                if keep_metadata:
                    reason = "more metadata than a file can hold"
                    raise ImageError(f"has {reason}: {error}", reason) from error
                metadata = NO_METADATA
        return array, upright_metadata(metadata, name) if keep_metadata else metadata

    try:
        return parse(truncated=False)
    except ImageError as error:
        if not lenient or error.reason not in (NO_IMAGE, DAMAGED):
            raise
        damage = error
    result = parse(truncated=True)
    warnings.warn(f"{damage}; it is read as far as it goes", ImageWarning, stacklevel=2)
    return result


def _check_colour(colour: Any) -> None:
    is_colour = isinstance(colour, tuple | list) and len(colour) == 3
    if not is_colour or not all(isinstance(v, int) and 0 <= v <= 255 for v in colour):
        raise InvalidArgumentError(
            f"`background` must be three whole numbers from 0 to 255, got {colour!r}"
        )


def check_header(
    path: str | os.PathLike, *, max_pixels: int = DEFAULT_MAX_PIXELS
) -> tuple[int, int]:
    """Check a file as far as that needs no pixels, and return the image's width and height.

    `read_image` may still refuse the file, for damaged data or a profile that cannot be applied.

    Returns:
        width and height of the upright image.

    Raises:
        ImageError, OSError: as `read_image`.
    """
    with open(path, "rb") as file, _opened(file, str(path), (max_pixels, False)) as image:
        width, height = image.size
        return (height, width) if _orientation(image) in SIDEWAYS else (width, height)


@contextmanager
def _opened(
    source: BinaryIO, name: str, limits: tuple[int, bool], *, convert: bool = False
) -> Iterator[Image.Image]:
    """Open an image of a kind that can be stored, within limits as those of `_PixelLimit`.

    Any failure inside is an ImageError of `name`.
    """
    formats.register_heif()
    try:
        with _pixel_limit(*limits), Image.open(source) as image:
            if image.format == "PNG" and (cicp := png_colour.read_cicp(source)) is not None:
                image.info["cicp"] = cicp
            refuse_what_would_be_lost(image, convert=convert)
            yield image
    except ImageError as error:
        raise ImageError(f"{name} {error}", error.reason) from error
    except UnidentifiedImageError as error:
        source.seek(0)
        hint = f"; {formats.HEIF_HINT}" if formats.is_heif(source.read(12)) else ""
        raise ImageError(
            f"{name} is no image in a format that Pillow reads{hint}", NO_IMAGE
        ) from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        reason = f"more than {limits[0]} pixels"
        raise ImageError(
            f"{name} has {reason}; raise `max_pixels` if you trust it", reason
        ) from error
    except (MemoryError, ImageWarning):
        raise
    # On damaged data Pillow raises a dozen types, SyntaxError and struct.error among them.
    except Exception as error:
        unsupported = re.search("support|loader|cannot load this|Ghostscript|available", str(error))
        reason = "not supported" if unsupported else DAMAGED
        raise ImageError(f"{name} is {reason}: {error}", reason) from error


class _PixelLimit:
    """Pillow's guard against decompression bombs, set to one limit while anyone reads under it.

    With `truncated`, Pillow also reads truncated files. Guard, that switch and the filter of
    warnings belong to the process. So readers with the same limits share them, and a reader with
    others waits until those are done.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()  # held by whoever waits: later readers queue behind it
        self._changed = threading.Condition()
        self._readers = 0
        self._limits = 0, False
        self._to_restore = ExitStack()

    @contextmanager
    def __call__(self, max_pixels: int, truncated: bool = False) -> Iterator[None]:
        limits = max_pixels, truncated
        with self._turn, self._changed:
            self._changed.wait_for(lambda: not self._readers or self._limits == limits)
            if not self._readers:
                self._set(*limits)
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                if not self._readers:
                    self._to_restore.close()
                    self._changed.notify()

    def _set(self, max_pixels: int, truncated: bool) -> None:
        self._limits = max_pixels, truncated
        for module, name, value in (
            (Image, "MAX_IMAGE_PIXELS", max_pixels),
            (ImageFile, "LOAD_TRUNCATED_IMAGES", truncated or ImageFile.LOAD_TRUNCATED_IMAGES),
        ):
            self._to_restore.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        # By itself Pillow only warns up to twice the limit.
        self._to_restore.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error", Image.DecompressionBombWarning)


_pixel_limit = _PixelLimit()


def to_array(
    image: Image.Image,
    *,
    icc: bytes | None,
    background: tuple[int, int, int] | None = None,
    orientation: int | None = None,
) -> np.ndarray:
    """Return an image of Pillow's as viewers show it, upright; see `read_image`.

    Args:
        image: one that `refuse_what_would_be_lost` lets pass.
        icc: the profile to convert to sRGB from, see `profile_of`; None to leave colours as stored.
        background: as in `read_image`.
        orientation: to turn the image by, 1...8; None for that in its EXIF data.
    """
    _scale_colour_key(image)
    depth = _depth(image)
    upright = _upright(image, orientation)
    if image.mode in DEEP_MODES:
        upright = _rounded_to_8_bits(upright, depth, is_negative=_is_negative(image))
    mode, alpha = _colour_mode(image), None
    if upright.has_transparency_data:
        upright = upright.convert("LA" if mode == "L" else "RGBA")
        alpha = upright.getchannel("A")
    colours = upright.convert(mode)
    if icc:
        colours = _to_srgb(colours, icc)
    elif mode == "CMYK":
        colours = colours.convert("RGB")
    if alpha is None or alpha.getextrema()[0] == 255:
        return np.array(colours)
    if background is None:
        return np.dstack([np.array(colours), np.array(alpha)])
    if len(set(background)) > 1:
        colours = colours.convert("RGB")
    colour = background if colours.mode == "RGB" else background[0]
    return np.array(Image.composite(colours, Image.new(colours.mode, colours.size, colour), alpha))


def _scale_colour_key(image: Image.Image) -> None:
    """Scale the transparent colour of a PNG to the 256 levels that Pillow reads.

    Pillow leaves grey of 2 or 4 and colours of 16 bits as they are in the file, and would find them
    nowhere.
    """
    key, tiles = image.info.get("transparency"), getattr(image, "tile", ())
    if image.format == "PNG" and tiles and isinstance(key, int):
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}.get(tiles[0][3], 1)
    elif image.format == "PNG" and tiles and isinstance(key, tuple) and _depth(image) == 16:
        image.info["transparency"] = tuple(level >> 8 for level in key)


def _rounded_to_8_bits(image: Image.Image, depth: int, *, is_negative: bool) -> Image.Image:
    """Return grey of more bits in 8; a transparent level becomes an alpha channel."""
    deep, top = np.asarray(image).astype(np.int32), 2**depth - 1
    levels = (deep * 255 + top // 2) // top
    grey = Image.fromarray((255 - levels if is_negative else levels).astype(np.uint8))
    if "transparency" in image.info:
        opaque = (deep != image.info["transparency"]).astype(np.uint8) * 255
        grey.putalpha(Image.fromarray(opaque))
    return grey


def _is_negative(image: Image.Image) -> bool:
    """Return whether a TIFF declares white as 0, which Pillow ignores in grey of 16 bits."""
    return getattr(image, "tag_v2", {}).get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0


def metadata_of(image: Image.Image, icc: bytes | None) -> Metadata:
    """Return that profile and the metadata of an image that Pillow has loaded, as its file has it.

    Of a TIFF only XMP: its EXIF is not one piece of data but the file itself.

    Raises:
        InvalidArgumentError: more than a file can hold.
    """
    exif, xmp = image.info.get("exif"), image.info.get("xmp")
    raw = image.info.get("Raw profile type exif")  # in PNG, by older programs
    if not exif and isinstance(raw, str):
        with suppress(ValueError):
            exif = bytes.fromhex("".join(raw.split("\n")[3:]))
    found = {"exif": exif, "icc_profile": icc, "xmp": xmp}
    return Metadata(**{k: v for k, v in found.items() if isinstance(v, bytes) and v})


def orientation_in(metadata: Metadata) -> int:
    """Return the orientation that Pillow would turn an image with this metadata by."""
    image = Image.new("L", (1, 1))
    image.info |= {"exif": metadata.exif or b"", "xmp": metadata.xmp or b""}
    return _orientation(image)


def upright_metadata(metadata: Metadata, name: str) -> Metadata:
    """Return the metadata of an image that has been turned upright.

    Where the orientation cannot be set to 1, as it is no number of at most four bytes, EXIF and XMP
    are dropped with an `ImageWarning`: viewers would turn the image again.
    """
    upright = metadata.upright()
    if orientation_in(upright) not in UPRIGHT_BY:
        return upright
    warnings.warn(
        f"{name} has an orientation that cannot be set to 1; its EXIF and XMP are dropped",
        ImageWarning,
        stacklevel=3,
    )
    return replace(upright, exif=None, xmp=None)


def _upright(image: Image.Image, orientation: int | None) -> Image.Image:
    """Return the image turned as its EXIF says, or as it is stored where that cannot be read.

    Not `ImageOps.exif_transpose`: it writes all of the EXIF again, and one wrong tag in it,
    whatever it is about, makes that fail.
    """
    image.load()  # an EXIF chunk may follow the pixels
    turn = UPRIGHT_BY.get(_orientation(image) if orientation is None else orientation)
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation as far as the file is read, or 1 where there is none."""
    try:
        # Not the method of PngImageFile, which decodes the pixels first.
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except BROKEN_EXIF:
        return 1


def refuse_what_would_be_lost(image: Image.Image, *, convert: bool = False) -> None:
    """Refuse what this codec does not store: several frames, deep or HDR colour, CMYK.

    Args:
        convert: let pass CMYK and deep colour of a known range, see `read_image`.

    Raises:
        ImageError: the text continues the image's name.
    """
    # MPO is excepted: phones put a small preview or a gain map behind the main image.
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise ImageError(
            f"has {frames} frames or pages; a .cmb file holds one image: extract the one you want",
            "several frames or pages",
        )
    png_colour.refuse_hdr(image.info)
    has_range = _depth(image) <= 16
    by_option = ", or convert it here with --convert (`convert=True`)"
    if _depth(image) > 8 and not (convert and has_range):
        reason = "more than 8 bits per channel"
        fix = "convert it to 8 bits first" + (by_option if has_range else "")
        raise ImageError(f"has {reason}; this codec stores 8: {fix}", reason)
    is_known = image.mode in GREY_MODES + COLOUR_MODES + DEEP_MODES
    if not (is_known or (convert and image.mode == "CMYK")):
        reason = f"{image.mode} colours"
        fix = "convert it to RGB first" + (by_option if image.mode == "CMYK" else "")
        raise ImageError(f"is in {reason}; {fix}", reason)


def _depth(image: Image.Image) -> int:
    """Return the bits per channel of an image, before it is loaded; 32 where white is unknown."""
    # Pillow scales grey of PPM files to 16 bits; other whole numbers and floats may be anything.
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        return 32
    depths = [8]
    for tile in getattr(image, "tile", ()):
        args = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        depths += [bits_of(arg) for arg in args if isinstance(arg, str)]
        # The second of (mode, largest value); plain PBM files have none.
        by_top = tile[0].startswith("ppm") and isinstance(args[-1], int) and args[-1] > 255
        if tile[0] == "SGI16" or by_top:
            return 16
    if image.mode in DEEP_MODES:  # not every decoder has a raw mode
        return 12 if max(depths) == 12 else 16
    return max(depths)


def bits_of(raw_mode: str) -> int:
    """Return the bits per channel of a raw mode of Pillow's, such as "L", "RGB;16B" or "BGR;16".

    The number is that of a channel where a byte order follows or there is one channel, else that
    of a pixel: "BGR;16" has 5, 6 and 5 bits.
    """
    channels, _, layout = raw_mode.partition(";")
    number = layout.rstrip("BFILNRSZ")
    if not number.isdecimal():
        return 8
    of_channel = len(channels) == 1 or layout[len(number) :].startswith(("B", "L", "N"))
    return int(number) if of_channel else int(number) // len(channels)


def profile_of(image: Image.Image, name: str, *, strict_color: bool = False) -> bytes | None:
    """Return the profile of an image of Pillow's, None for sRGB or where it cannot be applied.

    Of PNG files it may be made for the chunks cICP, gAMA and cHRM.

    Raises:
        ImageError: with `strict_color`, it has one that cannot be applied; without, that is an
            `ImageWarning` of `name`. The text of the error continues the image's name.
    """
    try:
        icc = png_colour.declared_profile(image.info, grey=_colour_mode(image) == "L")
        if icc:
            check_profile(image, icc)
    except ImageError as error:
        if strict_color:
            raise
        warnings.warn(f"{name} has a {error.reason}; it is ignored", ImageWarning, stacklevel=2)
        icc = None
    if image.mode == "CMYK" and not icc:
        text = "is in CMYK colours without a profile; it is converted as if its inks were ideal"
        warnings.warn(f"{name} {text}", ImageWarning, stacklevel=2)
    return icc


def check_profile(image: Image.Image, icc: bytes) -> None:
    """Refuse a profile that cannot be applied to an image of Pillow's.

    Raises:
        ImageError: the text continues the image's name.
    """
    _transform(_colour_mode(image), icc)


def _colour_mode(image: Image.Image) -> str:
    """Return the mode of an image's colours, without alpha: "L", "CMYK" or "RGB"."""
    if image.mode == "CMYK":
        return "CMYK"
    return "L" if image.mode in GREY_MODES + DEEP_MODES else "RGB"


def _transform(mode: str, icc: bytes) -> ImageCms.ImageCmsTransform:
    """Return the transform from an embedded profile to sRGB, of images of a `_colour_mode`."""
    try:
        return ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(icc)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
        )
    # TypeError: a TIFF whose profile is no bytes.  ImportError: a Pillow without LittleCMS.
    except (ImageCms.PyCMSError, OSError, TypeError, ImportError) as error:
        reason = "colour profile that cannot be applied"
        raise ImageError(
            f"has a {reason} ({error}); "
            "convert it to sRGB first, or remove the profile if its colours are sRGB anyway",
            reason,
        ) from error


def _to_srgb(image: Image.Image, icc: bytes) -> Image.Image:
    """Apply an embedded profile to an image without alpha."""
    transform = _transform(image.mode, icc)
    if image.mode == "CMYK":
        return transform.apply(image)

    def apply(to: Image.Image) -> Image.Image:
        done = transform.apply(to)
        return done.getchannel("G") if image.mode == "L" else done

    probe = _all_colours(image.mode)
    moved = np.abs(np.array(apply(probe), dtype=int) - np.array(probe, dtype=int)).max()
    return image if moved <= SRGB_TOLERANCE else apply(image)


def _all_colours(mode: str) -> Image.Image:
    """Return every grey level, or a lattice of 16 x 16 x 16 colours."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    lattice = np.stack(np.meshgrid(*[np.arange(0, 256, 17, dtype=np.uint8)] * 3), axis=-1)
    return Image.fromarray(lattice.reshape(64, 64, 3))

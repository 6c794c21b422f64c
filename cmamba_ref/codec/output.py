"""Decoded images as PNG, JPEG or WebP files."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.codec.formats import OUTPUT_FORMATS
from cmamba_ref.codec.image_codec import SHAPES, has_alpha, is_image
from cmamba_ref.codec.metadata import EXIF_PREFIX, NO_METADATA, Metadata
from cmamba_ref.errors import ImageError, InvalidArgumentError

DEFAULT_QUALITY = 95
# What the formats can hold; PNG holds every image that this codec does.
MAX_SIDE = {"JPEG": 65_500, "WEBP": 16_383}


def write_png(path: str | os.PathLike, image: np.ndarray, metadata: Metadata = NO_METADATA) -> None:
    """Write an image as PNG, see `png_bytes`, atomically.

    Raises:
        ImageError: another type or shape.
        OSError: the file cannot be written.
    """
    write_atomically(path, png_bytes(image, metadata))


def png_bytes(image: np.ndarray, metadata: Metadata = NO_METADATA) -> bytes:
    """Return a PNG file of an image; without a profile it says that the pixels are in sRGB.

    Arguments and errors are those of `image_bytes`.
    """
    return image_bytes(image, ".png", metadata)


def image_bytes(
    image: np.ndarray,
    suffix: str,
    metadata: Metadata = NO_METADATA,
    quality: int | None = None,
    max_side: int | None = None,
) -> bytes:
    """Return an image as a file of the format that `suffix` names.

    Args:
        image: of one of the forms that `cmamba_ref.encode` takes.
        suffix: one of `cmamba_ref.codec.formats.OUTPUT_FORMATS`, in any case.
        metadata: to store; what JPEG has no room for is an error.
        quality: 1 to 100, of JPEG (4:4:4) and WebP; None for 95. PNG loses nothing and has none.
        max_side: shrink a larger image to this many pixels on its longer side.

    Raises:
        ImageError: another type or shape, or what the format cannot hold.
        InvalidArgumentError: another suffix, quality or `max_side`.
    """
    if not is_image(image):
        raise ImageError(
            f"`image` must be {SHAPES}, got {image.dtype}{list(image.shape)}; "
            "round, clip and convert it first"
        )
    kind = check_output(suffix, quality)
    if max_side is not None:
        image = shrink(image, max_side)
    options: dict[str, Any] = {"exif": metadata.exif, "icc_profile": metadata.icc_profile}
    if kind == "PNG":
        options["pnginfo"] = _png_chunks(metadata)
    else:
        _check_holds(kind, image, metadata)
        options |= {"quality": DEFAULT_QUALITY if quality is None else quality}
        options |= {"xmp": metadata.xmp, "subsampling": "4:4:4"}
        if kind == "JPEG" and metadata.exif is not None:
            options["exif"] = EXIF_PREFIX + metadata.exif
    present = {name: value for name, value in options.items() if value is not None}
    buffer = io.BytesIO()
    try:
        Image.fromarray(image).save(buffer, kind, **present)
    except ValueError as error:  # metadata beyond a segment of JPEG
        raise ImageError(f"the image does not fit into {kind}: {error}; decode to PNG") from error
    return buffer.getvalue()


def shrink(image: np.ndarray, max_side: int) -> np.ndarray:
    """Return an image of at most `max_side` pixels on each side, by bicubic filtering.

    Args:
        image: of one of the forms that `cmamba_ref.decode` returns; a smaller one stays as it is.

    Raises:
        InvalidArgumentError: `max_side` is no whole number of at least 1.
    """
    if not isinstance(max_side, int) or max_side < 1:
        raise InvalidArgumentError(
            f"`max_side` must be a whole number of at least 1, got {max_side!r}"
        )
    shrunk = Image.fromarray(image)
    shrunk.thumbnail((max_side, max_side))
    return np.asarray(shrunk)


def check_output(suffix: str, quality: int | None) -> str:
    """Return Pillow's name of the format of `suffix`, after checking that quality fits it.

    Raises:
        InvalidArgumentError: as `image_bytes`.
    """
    kind = OUTPUT_FORMATS.get(suffix.lower())
    if kind is None:
        raise InvalidArgumentError(
            f"the output must end in {', '.join(OUTPUT_FORMATS)}, got {suffix!r}"
        )
    if quality is None:
        return kind
    if kind == "PNG" or not isinstance(quality, int) or not 1 <= quality <= 100:
        raise InvalidArgumentError(
            "the output quality must be a whole number from 1 to 100 for JPEG and WebP, and none "
            f"for PNG, got {quality!r} for {kind}"
        )
    return kind


def _check_holds(kind: str, image: np.ndarray, metadata: Metadata) -> None:
    # Bytes 16 to 19 of a profile name the kind of image that it is for.
    if kind == "WEBP" and (metadata.icc_profile or b"")[16:20] == b"GRAY":
        raise ImageError("WebP cannot hold grey with its profile; decode to PNG or JPEG")
    if kind == "JPEG" and has_alpha(image):
        raise ImageError("JPEG cannot hold transparency; decode to PNG or WebP")
    height, width = image.shape[:2]
    if max(height, width) > MAX_SIDE[kind]:
        raise ImageError(
            f"{kind} cannot hold sides of more than {MAX_SIDE[kind]} pixels, got "
            f"{width}x{height}; decode to PNG"
        )


def _png_chunks(metadata: Metadata) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    if metadata.icc_profile is None:
        chunks.add(b"sRGB", b"\0")  # rendering intent: perceptual
    if metadata.xmp is not None:
        # As XMP says: keyword, not compressed, no language, no translation. `add_itxt` takes text
        # only, which the bytes need not be.
        chunks.add(b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + metadata.xmp)
    return chunks

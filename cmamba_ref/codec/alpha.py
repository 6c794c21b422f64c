"""The alpha channel: lossless, as a PNG; and colours for the pixels that it hides."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from torch import Tensor

from cmamba_ref.errors import BitstreamError

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHUNK = struct.Struct(">I4s")
# Of IHDR: 8 bits of grey, deflate, adaptive filters, not interlaced.
_FORM = bytes([8, 0, 0, 0, 0])
_MAX_FILTER = 4


def pack_alpha(alpha: np.ndarray) -> bytes:
    """Return an alpha channel, uint8 `[H, W]`, as a grey PNG."""
    buffer = io.BytesIO()
    Image.fromarray(alpha).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def unpack_alpha(data: bytes, height: int, width: int) -> np.ndarray:
    """Return an alpha channel, uint8 `[H, W]`, of exactly this size.

    Raises:
        BitstreamError: no PNG, damaged, of another size or form, or with other chunks than pixels.
    """
    _check_chunks(data, height, width)
    try:
        # Not Image.open, whose guard against large images is the process's, and adds nothing here.
        with PngImagePlugin.PngImageFile(io.BytesIO(data)) as image:
            return np.array(image)
    except MemoryError:
        raise
    # On damaged data Pillow raises a dozen types.
    except Exception as error:
        raise BitstreamError(f"the alpha channel is damaged: {error}") from error


def fill_hidden(image: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Replace colours that nobody sees by a smooth continuation of those that are seen.

    So they cost next to no bits, whatever they were, and no edge where visible ones begin. Our
    choice: averages over 2x2, 4x4, ... pixels, the smallest with a visible pixel in it.

    Args:
        image: uint8 `[H, W, 3]` or `[H, W]`.
        alpha: uint8 `[H, W]`; 0 is hidden.

    Returns:
        uint8, of the image's shape; the same array where nothing is hidden.
    """
    hidden = alpha == 0
    if not hidden.any():
        return image
    colours = torch.tensor(np.atleast_3d(image), device="cpu").permute(2, 0, 1)[None].float()
    weight = torch.tensor(~hidden, device="cpu")[None, None].float()
    filled = _fill(colours * weight, weight)[0].round().to(torch.uint8).permute(1, 2, 0).numpy()
    return np.where(np.atleast_3d(hidden), filled, np.atleast_3d(image)).reshape(image.shape)


def _fill(sums: Tensor, weight: Tensor) -> Tensor:
    """Colours `[1, C, H, W]` from their sums and the number of pixels in each `[1, 1, H, W]`."""
    colours = sums / weight.clamp(min=1)
    if max(weight.shape[-2:]) == 1 or weight.all():
        return colours
    # The mean over each 2x2 of those pixels that have a colour; all of them count the same.
    seen = (weight > 0).float()
    odd = (0, weight.shape[-1] % 2, 0, weight.shape[-2] % 2)
    coarse = [4 * F.avg_pool2d(F.pad(x, odd), 2) for x in (colours * seen, seen)]
    below = F.interpolate(_fill(*coarse), scale_factor=2, mode="bilinear")
    return torch.where(seen > 0, colours, below[..., : weight.shape[-2], : weight.shape[-1]])


def _check_chunks(data: bytes, height: int, width: int) -> None:
    """Refuse what `pack_alpha` never writes, before anything is allocated for it."""
    if data[: len(_SIGNATURE)] != _SIGNATURE:
        raise BitstreamError("the alpha channel must be a PNG")
    position, chunks = len(_SIGNATURE), []
    while position < len(data):
        length, kind = _CHUNK.unpack_from(data.ljust(position + 8, b"\0"), position)
        end = position + 8 + length
        if data[end : end + 4] != struct.pack(">I", zlib.crc32(data[position + 4 : end])):
            raise BitstreamError("the alpha channel is damaged: a checksum of its PNG is wrong")
        chunks.append((kind, data[position + 8 : end]))
        position = end + 4
    if [kind for kind, _ in chunks] != [b"IHDR", *[b"IDAT"] * (len(chunks) - 2), b"IEND"]:
        raise BitstreamError("the alpha channel must be a PNG of the chunks IHDR, IDAT and IEND")
    if chunks[0][1] != struct.pack(">II", width, height) + _FORM or chunks[-1][1]:
        raise BitstreamError(
            f"the alpha channel must be a PNG of {width}x{height} pixels, 8 bits of grey"
        )
    stream, size = zlib.decompressobj(), height * (width + 1)
    try:
        rows = stream.decompress(b"".join(content for _, content in chunks[1:-1]), size + 1)
    except zlib.error as error:
        raise BitstreamError(f"the alpha channel is damaged: {error}") from error
    filters = rows[:: width + 1]
    if len(rows) != size or not stream.eof or stream.unused_data or max(filters) > _MAX_FILTER:
        raise BitstreamError("the alpha channel is damaged: its PNG must hold its rows, no more")

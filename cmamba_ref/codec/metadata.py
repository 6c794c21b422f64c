"""Metadata of an image: EXIF, XMP and the ICC profile; needs no torch and no Pillow."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, fields, replace

# Pillow and JPEG put this before the EXIF data proper, which begins with a TIFF header.
EXIF_PREFIX = b"Exif\0\0"

_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
_ORIENTATION_TAG = 0x0112
_TYPE_SHORT = 3
# In XMP the orientation is an attribute or an element of one digit.
_XMP_ORIENTATION = re.compile(rb"""(tiff:Orientation(?:\s*=\s*["']|>)\s*)[1-8](?=\s*["'<])""")


@dataclass(frozen=True)
class Metadata:
    """What a file holds beside its pixels; None where it does not.

    Attributes:
        exif: EXIF data from its TIFF header on.
        icc_profile: the profile that the pixels are in.
        xmp: XMP packet.
    """

    exif: bytes | None = None
    icc_profile: bytes | None = None
    xmp: bytes | None = None

    def names(self) -> list[str]:
        """Return what there is, in words."""
        words = {"exif": "EXIF", "icc_profile": "ICC profile", "xmp": "XMP"}
        return [words[f.name] for f in fields(self) if getattr(self, f.name) is not None]

    def upright(self) -> Metadata:
        """Return the same with an orientation of 1, for pixels that have been turned upright.

        No other byte changes. EXIF that cannot be read stays as it is: viewers ignore it too.
        """
        return replace(self, exif=_upright_exif(self.exif), xmp=_upright_xmp(self.xmp))


NO_METADATA = Metadata()


def _upright_exif(exif: bytes | None) -> bytes | None:
    if exif is None or exif[:4] not in _BYTE_ORDERS:
        return exif
    order = _BYTE_ORDERS[exif[:4]]
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, entry)
            if tag == _ORIENTATION_TAG:
                value = struct.pack(order + ("H" if kind == _TYPE_SHORT else "I"), 1)
                at = entry + 8
                struct.unpack_from(f"{len(value)}s", exif, at)  # it lies within the data
                return exif[:at] + value + exif[at + len(value) :]
    except struct.error:
        pass
    return exif


def _upright_xmp(xmp: bytes | None) -> bytes | None:
    return None if xmp is None else _XMP_ORIENTATION.sub(rb"\g<1>1", xmp)

"""Metadata of an image: EXIF, XMP and the ICC profile; needs no torch and no Pillow."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, fields, replace

from cmamba_ref.errors import InvalidArgumentError

# Most bytes of each kind.  A decoder takes no more memory for it; Pillow reads no larger profile
# from the PNG that a file is decoded to.
LIMITS = {"exif": 16 * 2**20, "icc_profile": 2**20, "xmp": 16 * 2**20}

# Pillow and JPEG put this before the EXIF data proper, which begins with a TIFF header.
EXIF_PREFIX = b"Exif\0\0"

# What Pillow takes for a TIFF header, two wrong forms among them.
_BYTE_ORDERS = {b"II*\0": "<", b"II\0*": "<", b"MM\0*": ">", b"MM*\0": ">"}
_ORIENTATION_TAG = 0x0112
# SHORT, which it should be, and the other types of at most four bytes that Pillow turns by.
_VALUE_FORMATS = {3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 11: "f", 13: "I"}
# The forms in which Pillow reads an orientation from XMP; pixels are turned by no other.
_XMP_ORIENTATION = re.compile(rb"""(tiff:Orientation(?:="|>))[0-9]""")


@dataclass(frozen=True)
class Metadata:
    """What a file holds beside its pixels; None where it does not.

    Attributes:
        exif: EXIF data from its TIFF header on; `EXIF_PREFIX` before that is taken away.
        icc_profile: the profile that the pixels are in.
        xmp: XMP packet.

    Raises:
        InvalidArgumentError: no bytes, or more than `LIMITS` allows.
    """

    exif: bytes | None = None
    icc_profile: bytes | None = None
    xmp: bytes | None = None

    def __post_init__(self) -> None:
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            if not isinstance(value, bytes | None):
                raise InvalidArgumentError(
                    f"`{name}` must be bytes or None, got {type(value).__name__}"
                )
            if value is not None and len(value) > limit:
                raise InvalidArgumentError(
                    f"`{name}` must have at most {limit} bytes, got {len(value)}; leave it out"
                )
        exif = self.exif
        while exif is not None and exif.startswith(EXIF_PREFIX):
            exif = exif.removeprefix(EXIF_PREFIX) or None
        object.__setattr__(self, "exif", exif)

    def present(self) -> dict[str, bytes]:
        """Return what there is, by its attribute's name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def names(self) -> list[str]:
        """Return what there is, in words."""
        words = {"exif": "EXIF", "icc_profile": "ICC profile", "xmp": "XMP"}
        return [words[name] for name in self.present()]

    def upright(self) -> Metadata:
        """Return the same with an orientation of 1, for pixels that have been turned upright.

        No other byte changes, and none of EXIF data that cannot be read. What Pillow does not turn
        images by stays as well.
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
            if tag == _ORIENTATION_TAG and kind in _VALUE_FORMATS:
                value = struct.pack(order + _VALUE_FORMATS[kind], 1)
                at = entry + 8
                struct.unpack_from(f"{len(value)}s", exif, at)  # it lies within the data
                return exif[:at] + value + exif[at + len(value) :]
    except struct.error:
        pass
    return exif


def _upright_xmp(xmp: bytes | None) -> bytes | None:
    return None if xmp is None else _XMP_ORIENTATION.sub(rb"\g<1>1", xmp)

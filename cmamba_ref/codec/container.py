"""The container: header, strings and checksum of a `.cmb` file; needs no torch.

    file = MAGIC, version, flags, model id, width, height, length of z, z string, y string, CRC-32

`cmamba_ref.entropy.latent_prefix` describes the y string; docs/format.md specifies all of it byte
by byte.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from cmamba_ref.entropy.latent_prefix import PREFIX_BYTES
from cmamba_ref.errors import BitstreamError

MAGIC = b"\x8fCMB"
VERSION = 0
FLAG_GREY = 1

_HEADER = struct.Struct("<4sBB8sIII")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size


@dataclass(frozen=True)
class Header:
    """The fields before the strings.

    Attributes:
        model_id, width, height, grey: as in `Container`.
        z_length: of the z string, in bytes.
    """

    model_id: bytes
    width: int
    height: int
    grey: bool
    z_length: int

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Read the first `HEADER_BYTES` of a file, without checking for damage.

        Raises:
            BitstreamError: not such a file, a newer version, truncated or malformed.
        """
        _check_start(data, HEADER_BYTES)
        _, _, flags, model_id, width, height, z_length = _HEADER.unpack_from(data)
        if flags & ~FLAG_GREY or not width or not height:
            raise BitstreamError(f"the header is malformed: flags {flags}, {width}x{height} pixels")
        return cls(model_id, width, height, bool(flags & FLAG_GREY), z_length)


@dataclass(frozen=True)
class Container:
    """The content of one file.

    Attributes:
        model_id: eight bytes, see `CMamba.model_id`.
        width, height: in pixels, before padding.
        grey: whether the image has one channel; it is coded as three equal ones.
        y, z: the strings.
    """

    model_id: bytes
    width: int
    height: int
    grey: bool
    y: bytes
    z: bytes

    def pack(self) -> bytes:
        """Return the bytes of the file."""
        flags = FLAG_GREY if self.grey else 0
        body = (
            _HEADER.pack(MAGIC, VERSION, flags, self.model_id, self.width, self.height, len(self.z))
            + self.z
            + self.y
        )
        return body + _CRC.pack(zlib.crc32(body))

    @classmethod
    def unpack(cls, data: bytes) -> Container:
        """Read a file's bytes.

        Raises:
            BitstreamError: not such a file, a newer version, truncated or damaged.
        """
        _check_start(data, HEADER_BYTES + PREFIX_BYTES + _CRC.size)
        (crc,) = _CRC.unpack_from(data, len(data) - _CRC.size)
        if zlib.crc32(data[: -_CRC.size]) != crc:
            raise BitstreamError("the file is damaged or truncated: its checksum does not match")
        header = Header.unpack(data)
        payload = data[HEADER_BYTES : -_CRC.size]
        if header.z_length > len(payload):
            raise BitstreamError(
                f"the header is malformed: z string of {header.z_length} in a payload of "
                f"{len(payload)} bytes"
            )
        return cls(
            model_id=header.model_id,
            width=header.width,
            height=header.height,
            grey=header.grey,
            z=payload[: header.z_length],
            y=payload[header.z_length :],
        )


def _check_start(data: bytes, least: int) -> None:
    """Refuse data without our signature, of another version, or shorter than `least` bytes."""
    if data[:4] != MAGIC:
        raise BitstreamError("this is not a CMamba file: it does not begin with its signature")
    if len(data) < 5:
        raise BitstreamError(f"the file is truncated: it has only {len(data)} bytes")
    if data[4] != VERSION:
        raise BitstreamError(
            f"the file has format version {data[4]}, this program reads version {VERSION}; "
            "use the version of cmamba-ref that wrote it, or a newer one"
        )
    if len(data) < least:
        raise BitstreamError(f"the file is truncated: it has only {len(data)} bytes")

"""The container: header, checks, and the prefix of a latent string.

    file   = MAGIC, version, flags, model id, width, height, length of z, z string, y string, CRC-32
    y string = quality, shift, CRC-32 of all symbols, rANS stream
    z string = rANS stream

docs/format.md specifies it byte by byte.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cmamba_ref.errors import BitstreamError

MAGIC = b"\x8fCMB"
VERSION = 0
FLAG_GREY = 1
# Qualities are stored as hundredths, so that every machine computes the same gain from a file.
QUALITY_UNITS = 100

_HEADER = struct.Struct("<4sBB8sIII")
_LATENT = struct.Struct("<HBI")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size


@dataclass(frozen=True)
class LatentPrefix:
    """What a decoder must know before the first symbol of y.

    Attributes:
        quality: in hundredths; 0 for a model of one rate.
        shift: of the scale table's decision boundaries, 0...255.
        crc: CRC-32 of all symbols, z then y, as little-endian int32.
    """

    quality: int
    shift: int
    crc: int


def pack_latent(prefix: LatentPrefix, coded: bytes) -> bytes:
    """A y string: the prefix and the rANS stream."""
    return _LATENT.pack(prefix.quality, prefix.shift, prefix.crc) + coded


def unpack_latent(string: bytes) -> tuple[LatentPrefix, bytes]:
    """The prefix and the rANS stream of a y string."""
    if len(string) < _LATENT.size:
        raise BitstreamError(f"a y string of {len(string)} bytes is truncated")
    return LatentPrefix(*_LATENT.unpack_from(string)), string[_LATENT.size :]


def symbols_crc(blocks: Iterable[np.ndarray]) -> int:
    """CRC-32 of symbols in coding order, each as a little-endian int32."""
    crc = 0
    for block in blocks:
        crc = zlib.crc32(np.ascontiguousarray(block, dtype="<i4").tobytes(), crc)
    return crc


@dataclass(frozen=True)
class Header:
    """What stands before the strings.

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
        """Read the first `HEADER_BYTES` of a file; whether they are damaged is not known yet.

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
    """One picture's file.

    Attributes:
        model_id: eight bytes, see `CMamba.model_id`.
        width, height: in pixels, before padding.
        grey: whether the picture has one channel; it is coded as three equal ones.
        y, z: the strings.
    """

    model_id: bytes
    width: int
    height: int
    grey: bool
    y: bytes
    z: bytes

    def pack(self) -> bytes:
        """The bytes of the file."""
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
        _check_start(data, HEADER_BYTES + _LATENT.size + _CRC.size)
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
    """Refuse what is no file of ours, of another version, or shorter than `least` bytes."""
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

"""The prefix of a y string, and the CRC-32 that it holds; needs no torch.

    y string = quality, shift, skipped tables, CRC-32 of all symbols, rANS stream

docs/format.md specifies it byte by byte.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cmamba_ref.errors import BitstreamError

# Qualities are stored as hundredths, so that every machine computes the same gain from a file.
QUALITY_UNITS = 100

_PREFIX = struct.Struct("<HBBI")
_PREFIX_0 = struct.Struct("<HBI")
PREFIX_BYTES = _PREFIX.size
PREFIX_BYTES_0 = _PREFIX_0.size


@dataclass(frozen=True)
class LatentPrefix:
    """What a decoder must know before the first symbol of y.

    Attributes:
        quality: in hundredths; 0 for a fixed-rate model.
        shift: of the scale table's decision boundaries, 0...255.
        skipped: symbols of this many tables, those of the smallest scales, are 0 and not coded.
        crc: CRC-32 of all symbols, z then y, as little-endian int32.
    """

    quality: int
    shift: int
    skipped: int
    crc: int


def pack_latent(prefix: LatentPrefix, coded: bytes) -> bytes:
    """Return a y string: the prefix and the rANS stream."""
    return _PREFIX.pack(prefix.quality, prefix.shift, prefix.skipped, prefix.crc) + coded


def upgrade_latent(string: bytes) -> bytes:
    """Return a y string of format version 0, which had no skipped tables, in the present form."""
    at = _PREFIX_0.size - 4
    return string[:at] + b"\0" + string[at:]


def unpack_latent(string: bytes) -> tuple[LatentPrefix, bytes]:
    """Return the prefix and the rANS stream of a y string.

    Raises:
        BitstreamError: the string is shorter than a prefix.
    """
    if len(string) < PREFIX_BYTES:
        raise BitstreamError(f"a y string of {len(string)} bytes is truncated")
    return LatentPrefix(*_PREFIX.unpack_from(string)), string[PREFIX_BYTES:]


def symbols_crc(blocks: Iterable[np.ndarray]) -> int:
    """Return the CRC-32 of symbols in coding order, each as a little-endian int32."""
    crc = 0
    for block in blocks:
        crc = zlib.crc32(np.ascontiguousarray(block, dtype="<i4").tobytes(), crc)
    return crc

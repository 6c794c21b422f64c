"""The container: what a `.cmb` file consists of; needs no torch.

    file  = MAGIC, version, chunks
    chunk = type, length of the data, data, CRC-32 of these

    IMAG  model, size, z string and y string               the first
    ALPH  the alpha channel, a grey PNG                    exactly where IMAG declares it
    exif, iccp, xmpd  metadata, deflated                   at most one of each
    IEND  CRC-32 of all bytes before, but for the CRCs     the last

The CRCs are left out of the last one because a CRC of parts that end in their own CRC depends on
nothing but their lengths: chunks of two files could be exchanged unnoticed.

As in PNG, a program that does not know a type skips it where its first letter is small, and refuses
the file where it is a capital.  `cmamba_ref.entropy.latent_prefix` describes the y string;
docs/format.md specifies all of it byte by byte, and version 0, which had no chunks.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from cmamba_ref.codec.metadata import LIMITS, NO_METADATA, Metadata
from cmamba_ref.entropy.latent_prefix import PREFIX_BYTES_0, upgrade_latent
from cmamba_ref.errors import BitstreamError, UnsupportedFileError

MAGIC = b"\x8fCMB"
VERSION = 1
FLAG_GREY, FLAG_ALPHA = 1, 2

IMAGE, ALPHA, END = b"IMAG", b"ALPH", b"IEND"
METADATA_TYPES = {"exif": b"exif", "icc_profile": b"iccp", "xmp": b"xmpd"}

_CHUNK = struct.Struct("<4sI")
_IMAGE = struct.Struct("<B8sII")
_CRC = struct.Struct("<I")
_HEADER_0 = struct.Struct("<4sBB8sIII")
# So many bytes from the start of a file hold its header, in either version.
HEADER_BYTES = len(MAGIC) + 1 + _CHUNK.size + _IMAGE.size


@dataclass(frozen=True)
class Header:
    """What a file says about its image.

    Attributes:
        version: of the format.
        model_id: eight bytes, see `CMamba.model_id`.
        width, height: in pixels, before padding.
        grey: whether the image has one channel of colour; it is coded as three equal ones.
        alpha: whether it has an alpha channel.
    """

    version: int
    model_id: bytes
    width: int
    height: int
    grey: bool
    alpha: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that the file decodes to."""
        channels = (1 if self.grey else 3) + self.alpha
        return (self.height, self.width, *(() if channels == 1 else (channels,)))

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Read the first `HEADER_BYTES` of a file, without checking for damage.

        Raises:
            BitstreamError: not such a file, a newer version, truncated or malformed.
        """
        version = _version(data)
        if len(data) < (HEADER_BYTES if version else _HEADER_0.size):
            raise _truncated(data)
        if version == 0:
            _, _, flags, model_id, width, height, _ = _HEADER_0.unpack_from(data)
            known = FLAG_GREY
        else:
            kind, _ = _CHUNK.unpack_from(data, len(MAGIC) + 1)
            if kind != IMAGE:
                raise BitstreamError(f"the file must begin with its image, got {_named(kind)}")
            flags, model_id, width, height = _IMAGE.unpack_from(data, HEADER_BYTES - _IMAGE.size)
            known = FLAG_GREY | FLAG_ALPHA
        if flags & ~known or not width or not height:
            raise BitstreamError(f"the header is malformed: flags {flags}, {width}x{height} pixels")
        grey, alpha = bool(flags & FLAG_GREY), bool(flags & FLAG_ALPHA)
        return cls(version, model_id, width, height, grey, alpha)


@dataclass(frozen=True)
class Container:
    """The content of one file.

    Attributes:
        model_id, width, height, grey: as in `Header`.
        y, z: the strings.
        alpha: the alpha channel as a PNG, see `cmamba_ref.codec.alpha`; None if there is none.
        metadata: what is kept beside the pixels.
        version: of the format; `pack` writes `VERSION` only.
    """

    model_id: bytes
    width: int
    height: int
    grey: bool
    y: bytes
    z: bytes
    alpha: bytes | None = None
    metadata: Metadata = NO_METADATA
    version: int = VERSION

    def pack(self) -> bytes:
        """Return the bytes of the file."""
        flags = (FLAG_GREY if self.grey else 0) | (FLAG_ALPHA if self.alpha is not None else 0)
        header = _IMAGE.pack(flags, self.model_id, self.width, self.height)
        image = header + _pack_length(len(self.z)) + self.z + self.y
        chunks = [_chunk(IMAGE, image)]
        if self.alpha is not None:
            chunks.append(_chunk(ALPHA, self.alpha))
        for name, value in self.metadata.present().items():
            chunks.append(_chunk(METADATA_TYPES[name], zlib.compress(value, 9)))
        start = MAGIC + bytes([VERSION])
        chunks.append(_chunk(END, _CRC.pack(zlib.crc32(start + b"".join(chunks)))))
        return start + b"".join(chunk + _CRC.pack(zlib.crc32(chunk)) for chunk in chunks)

    @classmethod
    def unpack(cls, data: bytes) -> Container:
        """Read a file's bytes.

        Raises:
            BitstreamError: not such a file, a newer version, truncated or damaged.
        """
        if _version(data) == 0:
            return _unpack_version_0(data)
        chunks: dict[bytes, bytes] = {}
        for kind, content in _chunks(data):
            if kind in chunks:
                raise BitstreamError(f"the file is malformed: it has {_named(kind)} twice")
            chunks[kind] = content
        header = Header.unpack(data)
        if header.alpha != (ALPHA in chunks):
            raise BitstreamError(
                "the file is malformed: its header declares "
                f"{'an' if header.alpha else 'no'} alpha channel, and it holds "
                f"{'none' if header.alpha else 'one'}"
            )
        z_length, start = _unpack_length(chunks[IMAGE], _IMAGE.size)
        z, y = _split_strings(chunks[IMAGE][start:], z_length)
        metadata = {
            name: _inflate(kind, chunks[kind], LIMITS[name])
            for name, kind in METADATA_TYPES.items()
            if kind in chunks
        }
        return cls(
            *(header.model_id, header.width, header.height, header.grey, y, z),
            alpha=chunks.get(ALPHA),
            metadata=Metadata(**metadata),
        )

    @property
    def header(self) -> Header:
        """What the file says about its image."""
        has_alpha = self.alpha is not None
        size = self.width, self.height
        return Header(self.version, self.model_id, *size, self.grey, has_alpha)


# ---------------------------------------------------------------- chunks


def _chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk without its CRC."""
    return _CHUNK.pack(kind, len(content)) + content


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield type and data of every chunk but the last, after checking all that hold for chunks.

    Chunks that are unknown and may be are left out.
    """
    known = {IMAGE, ALPHA, *METADATA_TYPES.values()}
    position = len(MAGIC) + 1
    running = zlib.crc32(data[:position])
    while True:
        if len(data) < position + _CHUNK.size + _CRC.size:
            raise _truncated(data)
        kind, length = _CHUNK.unpack_from(data, position)
        start = position + _CHUNK.size
        end = start + length
        if len(data) < end + _CRC.size:
            raise _truncated(data)
        (crc,) = _CRC.unpack_from(data, end)
        if zlib.crc32(data[position:end]) != crc:
            raise BitstreamError(
                f"the file is damaged: the checksum of {_named(kind)} does not match"
            )
        if not (kind.isascii() and kind.isalpha()):
            raise BitstreamError("the file is malformed: a chunk's type must be four letters")
        if (position == len(MAGIC) + 1) != (kind == IMAGE):
            raise BitstreamError("the file is malformed: its image must be its first chunk")
        if kind == END:
            break
        if kind in known:
            yield kind, data[start:end]
        elif not kind[0] & 0x20:
            raise UnsupportedFileError(
                f"the file holds {_named(kind)}, which this program does not know and must not "
                "skip; use a newer version of cmamba-ref"
            )
        running = zlib.crc32(data[position:end], running)
        position = end + _CRC.size
    if length != _CRC.size or _CRC.unpack_from(data, start)[0] != running:
        raise BitstreamError("the file is damaged: its checksum does not match")
    if len(data) > end + _CRC.size:
        raise BitstreamError("the file is malformed: it goes on after its last chunk")


def _named(kind: bytes) -> str:
    return f"chunk {kind.decode('ascii', 'backslashreplace')!r}"


def _pack_length(value: int) -> bytes:
    """LEB128, as in `cmamba_ref.entropy.rans`."""
    parts = []
    while value >= 128:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _unpack_length(data: bytes, position: int) -> tuple[int, int]:
    """Return a number and the position behind it."""
    value = 0
    for shift, byte in enumerate(data[position : position + 5]):
        value |= (byte & 127) << 7 * shift
        if byte < 128 and (byte or not shift):
            return value, position + shift + 1
    raise BitstreamError("the header is malformed: the length of its z string is no LEB128 number")


def _inflate(kind: bytes, content: bytes, limit: int) -> bytes:
    stream = zlib.decompressobj()
    try:
        value = stream.decompress(content, limit + 1)
    except zlib.error as error:
        raise BitstreamError(f"{_named(kind)} is malformed: {error}") from error
    if len(value) > limit:
        raise BitstreamError(f"{_named(kind)} expands to more than {limit} bytes")
    if not stream.eof or stream.unused_data:
        raise BitstreamError(f"{_named(kind)} is malformed: its data must be one zlib stream")
    return value


# ---------------------------------------------------------------- versions


def _unpack_version_0(data: bytes) -> Container:
    if len(data) < _HEADER_0.size + PREFIX_BYTES_0 + _CRC.size:
        raise _truncated(data)
    (crc,) = _CRC.unpack_from(data, len(data) - _CRC.size)
    if zlib.crc32(data[: -_CRC.size]) != crc:
        raise BitstreamError("the file is damaged or truncated: its checksum does not match")
    header = Header.unpack(data)
    *_, z_length = _HEADER_0.unpack_from(data)
    z, y = _split_strings(data[_HEADER_0.size : -_CRC.size], z_length)
    return Container(
        *(header.model_id, header.width, header.height, header.grey, upgrade_latent(y), z),
        version=0,
    )


def _split_strings(payload: bytes, z_length: int) -> tuple[bytes, bytes]:
    """Return the z string and the y string."""
    if z_length > len(payload):
        raise BitstreamError(
            f"the header is malformed: z string of {z_length} in a payload of {len(payload)} bytes"
        )
    return payload[:z_length], payload[z_length:]


def _version(data: bytes) -> int:
    """Return the version of a file of ours; refuse other files and other versions."""
    if data[:4] != MAGIC:
        raise BitstreamError("this is not a .cmb file: it does not begin with its signature")
    if len(data) < 5:
        raise _truncated(data)
    if data[4] > VERSION:
        raise UnsupportedFileError(
            f"the file has format version {data[4]}, this program reads versions up to {VERSION}; "
            "use the version of cmamba-ref that wrote it, or a newer one"
        )
    return data[4]


def _truncated(data: bytes) -> BitstreamError:
    return BitstreamError(f"the file is truncated: it has only {len(data)} bytes")

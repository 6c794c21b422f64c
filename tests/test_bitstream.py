"""The container, field by field: any that can be written is read back; anything else is refused."""

import struct
import zlib

import numpy as np
import pytest
from codec_helpers import HEADER, HEADER_BYTES, LATENT_PREFIX, field_of, with_checksum, with_field
from hypothesis import given
from hypothesis import strategies as st

from cmamba_ref.codec.container import Container, Header
from cmamba_ref.entropy.latent_prefix import (
    LatentPrefix,
    pack_latent,
    symbols_crc,
    unpack_latent,
)
from cmamba_ref.errors import BitstreamError

sides = st.integers(1, 2**32 - 1)
strings = st.binary(max_size=200)
prefixes = st.builds(
    LatentPrefix,
    quality=st.integers(0, 2**16 - 1),
    shift=st.integers(0, 255),
    crc=st.integers(0, 2**32 - 1),
)
containers = st.builds(
    Container,
    model_id=st.binary(min_size=8, max_size=8),
    width=sides,
    height=sides,
    grey=st.booleans(),
    y=st.builds(pack_latent, prefixes, strings),
    z=strings,
)
SMALLEST = Container(b"8 bytes.", 3, 2, False, pack_latent(LatentPrefix(100, 0, 0), b""), b"")


@given(containers)
def test_any_container_is_read_back(container):
    data = container.pack()
    assert Container.unpack(data) == container
    header = Header.unpack(data[:HEADER_BYTES])
    assert header == Header(
        container.model_id, container.width, container.height, container.grey, len(container.z)
    )


@given(containers)
def test_fields_are_at_the_documented_offsets(container):
    data = container.pack()
    assert data[:4] == b"\x8fCMB"
    assert {name: field_of(data, name) for name in HEADER} == {
        "version": 0,
        "flags": int(container.grey),
        "model id": container.model_id,
        "width": container.width,
        "height": container.height,
        "z length": len(container.z),
    }
    assert data[HEADER_BYTES:-4] == container.z + container.y
    assert struct.unpack("<I", data[-4:]) == (zlib.crc32(data[:-4]),)


@given(prefixes, strings)
def test_any_prefix_is_read_back(prefix, coded):
    string = pack_latent(prefix, coded)
    assert unpack_latent(string) == (prefix, coded)
    values = {
        name: struct.unpack_from(layout, string, offset)[0]
        for name, (offset, layout) in LATENT_PREFIX.items()
    }
    assert list(values.values()) == [prefix.quality, prefix.shift, prefix.crc]


@given(containers, st.data())
def test_any_flipped_bit_is_refused(container, data):
    changed = bytearray(container.pack())
    bit = data.draw(st.integers(0, 8 * len(changed) - 1))
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BitstreamError):
        Container.unpack(bytes(changed))


@given(st.binary(max_size=300), st.booleans(), st.booleans())
def test_noise_is_refused_or_unpacks_to_its_bytes(noise, begins_right, ends_right):
    data = (b"\x8fCMB\0" if begins_right else b"") + noise
    data = with_checksum(data) if ends_right else data
    try:
        container = Container.unpack(data)
    except BitstreamError:
        return
    assert container.pack() == data


def test_smallest_container_is_accepted_and_one_byte_less_is_refused():
    data = SMALLEST.pack()
    assert len(data) == 37 and Container.unpack(data) == SMALLEST
    for length in range(5, 37):
        with pytest.raises(BitstreamError, match=f"truncated: it has only {length} bytes"):
            Container.unpack(data[:length])
    assert Header.unpack(data[:26]).width == 3
    for length in range(5, 26):
        with pytest.raises(BitstreamError, match=f"truncated: it has only {length} bytes"):
            Header.unpack(data[:length])
    with pytest.raises(BitstreamError, match="truncated: it has only 4 bytes"):
        Header.unpack(data[:4])


def test_foreign_file_type_is_named():
    for data in (b"", b"\x8fCM", b"\x89PNG\r\n\x1a\n" + bytes(100)):
        with pytest.raises(BitstreamError, match="does not begin with its signature"):
            Container.unpack(data)


def test_version_is_read_from_five_bytes():
    with pytest.raises(BitstreamError, match="format version 9, this program reads version 0"):
        Container.unpack(b"\x8fCMB\x09")


def test_z_string_must_fit_the_payload():
    data = SMALLEST.pack()
    assert len(Container.unpack(with_field(data, "z length", 7)).z) == 7
    with pytest.raises(BitstreamError, match="z string of 8 in a payload of 7 bytes"):
        Container.unpack(with_field(data, "z length", 8))


def test_a_short_y_string_is_refused():
    assert unpack_latent(bytes(7)) == (LatentPrefix(0, 0, 0), b"")
    with pytest.raises(BitstreamError, match="y string of 6 bytes is truncated"):
        unpack_latent(bytes(6))


@given(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20), max_size=4))
def test_symbol_crc_covers_little_endian_int32(blocks):
    expected = zlib.crc32(b"".join(struct.pack("<i", s) for block in blocks for s in block))
    for dtype in ("<i4", ">i4", "<i8"):
        assert symbols_crc([np.array(block, dtype) for block in blocks]) == expected
    strided = [np.repeat(np.array(block, np.int32), 2)[::2] for block in blocks]
    assert symbols_crc(strided) == expected

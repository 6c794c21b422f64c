"""The container, field by field: any that can be written is read back; anything else is refused."""

import itertools
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from codec_helpers import (
    HEADER,
    LATENT_PREFIX,
    Z_LENGTH_AT,
    field_of,
    join_chunks,
    split_chunks,
    split_image,
    with_field,
)
from hypothesis import example, given
from hypothesis import strategies as st

from cmamba_ref.codec.container import HEADER_BYTES, Container, Header
from cmamba_ref.codec.metadata import NO_METADATA, Metadata
from cmamba_ref.entropy.latent_prefix import (
    LatentPrefix,
    pack_latent,
    symbols_crc,
    unpack_latent,
    upgrade_latent,
)
from cmamba_ref.errors import BitstreamError, InvalidArgumentError

GOLDEN_0 = Path(__file__).parent / "golden" / "version0"

sides = st.integers(1, 2**32 - 1)
strings = st.binary(max_size=200)
optional = st.none() | st.binary(max_size=50)
prefixes = st.builds(
    LatentPrefix,
    quality=st.integers(0, 2**16 - 1),
    shift=st.integers(0, 255),
    skipped=st.integers(0, 255),
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
    alpha=optional,
    metadata=st.builds(Metadata, exif=optional, icc_profile=optional, xmp=optional),
)
SMALLEST = Container(b"8 bytes.", 3, 2, False, pack_latent(LatentPrefix(100, 0, 0, 0), b""), b"")
FULL = replace(SMALLEST, alpha=b"alpha", metadata=Metadata(b"exif", b"icc", b"xmp"))


@given(containers)
def test_any_container_is_read_back(container):
    data = container.pack()
    assert Container.unpack(data) == container
    header = Header.unpack(data[:HEADER_BYTES])
    assert header == container.header
    assert (header.version, header.alpha) == (1, container.alpha is not None)


@given(containers)
def test_fields_are_at_the_documented_offsets(container):
    data = container.pack()
    assert data[:5] == b"\x8fCMB\x01"
    alpha, metadata = container.alpha, container.metadata
    assert {name: field_of(data, name) for name in HEADER} == {
        "flags": int(container.grey) + 2 * (alpha is not None),
        "model id": container.model_id,
        "width": container.width,
        "height": container.height,
    }
    (kind, content), *others = split_chunks(data)
    assert kind == b"IMAG" and split_image(content)[1:] == (container.z, container.y)
    expected = {b"exif": metadata.exif, b"iccp": metadata.icc_profile, b"xmpd": metadata.xmp}
    found = dict(others)
    assert found.pop(b"ALPH", None) == alpha
    assert {kind: zlib.decompress(value) for kind, value in found.items()} == {
        kind: value for kind, value in expected.items() if value is not None
    }
    assert data == join_chunks(split_chunks(data))


@given(prefixes, strings)
def test_any_prefix_is_read_back(prefix, coded):
    string = pack_latent(prefix, coded)
    assert unpack_latent(string) == (prefix, coded)
    values = {
        name: struct.unpack_from(layout, string, offset)[0]
        for name, (offset, layout) in LATENT_PREFIX.items()
    }
    assert list(values.values()) == [prefix.quality, prefix.shift, prefix.skipped, prefix.crc]
    old = struct.pack("<HBI", prefix.quality, prefix.shift, prefix.crc) + coded
    assert unpack_latent(upgrade_latent(old)) == (replace(prefix, skipped=0), coded)


def test_any_flipped_bit_is_refused():
    data = FULL.pack()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            Container.unpack(bytes(changed))


def whole_chunks(data: bytes) -> list[bytes]:
    """The bytes of every chunk, the last included."""
    parts, at = [], 5
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at + 4 : at + 8], "little")
        parts.append(data[at:end])
        at = end
    return parts


def test_a_chunk_of_another_file_is_refused():
    """Also of the same length. The checksum of the file must not be a CRC of all of its bytes:
    behind a part with its own CRC, that depends on the lengths alone."""
    one, other = (replace(FULL, alpha=alpha).pack() for alpha in (b"alpha", b"other"))
    parts = whole_chunks(one)
    parts[1] = whole_chunks(other)[1]
    with pytest.raises(BitstreamError, match="its checksum does not match"):
        Container.unpack(one[:5] + b"".join(parts))


def test_any_deleted_doubled_or_swapped_chunk_is_refused():
    """As bytes; and, but for an order that means nothing, with a right checksum of the file."""
    data = FULL.pack()
    parts, chunks = whole_chunks(data), split_chunks(data)
    assert data[:5] + b"".join(parts) == data and len(parts) == 6
    changes = [[*range(k), *range(k + 1, 6)] for k in range(6)]
    changes += [[*range(k + 1), *range(k, 6)] for k in range(6)]
    for a, b in itertools.combinations(range(6), 2):
        order = list(range(6))
        order[a], order[b] = b, a
        changes.append(order)
    for order in changes:
        with pytest.raises(BitstreamError):
            Container.unpack(data[:5] + b"".join(parts[k] for k in order))
        if 5 not in order or order.count(5) > 1 or order[-1] != 5:
            continue
        repaired = join_chunks(chunks[k] for k in order[:-1])
        if order[0] != 0 or len(set(order)) < len(order) or 1 not in order:
            with pytest.raises(BitstreamError, match="first chunk|twice|holds none"):
                Container.unpack(repaired)
        else:  # metadata missing or in another order
            Container.unpack(repaired)


@example(b"\0", True, True)
@example(b"\1zy", True, True)
@given(st.binary(max_size=300), st.booleans(), st.booleans())
def test_noise_is_refused_or_unpacks_to_its_bytes(noise, begins_right, ends_right):
    content = SMALLEST.pack()[13:HEADER_BYTES] + noise if begins_right else noise
    data = join_chunks([(b"IMAG", content)]) if ends_right else b"\x8fCMB\x01" + content
    try:
        container = Container.unpack(data)
    except BitstreamError:
        # Behind a right header, all that can be wrong is the length of the z string.
        assert not (begins_right and ends_right and noise[:1] == b"\0")
        return
    assert container.pack() == data


def test_smallest_container_is_accepted_and_one_byte_less_is_refused():
    data = SMALLEST.pack()
    assert len(data) == 59 and Container.unpack(data) == SMALLEST
    for length in range(5, 59):
        with pytest.raises(BitstreamError, match=f"truncated: it has only {length} bytes"):
            Container.unpack(data[:length])
    assert Header.unpack(data[:30]).width == 3
    for length in range(5, 30):
        with pytest.raises(BitstreamError, match=f"truncated: it has only {length} bytes"):
            Header.unpack(data[:length])
    with pytest.raises(BitstreamError, match="truncated: it has only 4 bytes"):
        Header.unpack(data[:4])


@pytest.mark.parametrize("z_bytes", [0, 127, 128, 100_000])
def test_version_1_costs_at_most_24_bytes_more_than_version_0(z_bytes):
    z, prefix = bytes(z_bytes), LatentPrefix(100, 0, 0, 0)
    data = replace(SMALLEST, z=z).pack()
    assert Container.unpack(data).z == z
    assert len(data) - (37 + z_bytes) <= 24
    assert len(pack_latent(prefix, b"")) == 8  # 7 of the 37 were this prefix


def test_foreign_file_type_is_named():
    for data in (b"", b"\x8fCM", b"\x89PNG\r\n\x1a\n" + bytes(100)):
        with pytest.raises(BitstreamError, match="does not begin with its signature"):
            Container.unpack(data)


def test_version_is_read_from_five_bytes():
    with pytest.raises(BitstreamError, match="version 9, this program reads versions up to 1"):
        Container.unpack(b"\x8fCMB\x09")


def test_z_string_must_fit_the_payload():
    data = SMALLEST.pack()
    assert len(Container.unpack(with_field(data, "z length", 8)).z) == 8
    for length in (9, 2**32 - 1):
        with pytest.raises(BitstreamError, match=f"string of {length} in a payload of 8 bytes"):
            Container.unpack(with_field(data, "z length", length))


@pytest.mark.parametrize("number", [b"", b"\x80", b"\x80\x00", b"\xff\xff\xff\xff\xff\x01"])
def test_the_length_of_the_z_string_must_be_one_number(number):
    ((kind, content),) = split_chunks(SMALLEST.pack())
    with pytest.raises(BitstreamError, match="no LEB128 number"):
        Container.unpack(join_chunks([(kind, content[:Z_LENGTH_AT] + number)]))


def test_unknown_chunks_are_skipped_where_they_may_be():
    image, *others = split_chunks(FULL.pack())
    known = [image, (b"newT", b"anything"), *others, (b"newT", b"again")]
    assert Container.unpack(join_chunks(known)) == FULL
    with pytest.raises(BitstreamError, match="chunk 'NewT', which this program does not know"):
        Container.unpack(join_chunks([image, (b"NewT", b"anything"), *others]))


def test_alpha_must_be_there_where_it_is_declared_and_nowhere_else():
    image, alpha, *_ = split_chunks(FULL.pack())
    opaque = split_chunks(SMALLEST.pack())[0]
    with pytest.raises(BitstreamError, match="declares an alpha channel, and it holds none"):
        Container.unpack(join_chunks([image]))
    with pytest.raises(BitstreamError, match="declares no alpha channel, and it holds one"):
        Container.unpack(join_chunks([opaque, alpha]))


@pytest.mark.parametrize(
    ("name", "kind", "limit"),
    [("exif", b"exif", 2**24), ("icc_profile", b"iccp", 2**20), ("xmp", b"xmpd", 2**24)],
)
def test_metadata_is_limited_when_it_is_given_and_when_it_expands(name, kind, limit):
    image, *_ = split_chunks(SMALLEST.pack())
    bomb = zlib.compress(bytes(limit + 1), 9)
    assert len(bomb) < 20_000
    with pytest.raises(BitstreamError, match=f"expands to more than {limit} bytes"):
        Container.unpack(join_chunks([image, (kind, bomb)]))
    fits = replace(SMALLEST, metadata=Metadata(**{name: bytes(limit)}))
    assert Container.unpack(fits.pack()) == fits
    with pytest.raises(InvalidArgumentError, match=f"`{name}` must have at most {limit} bytes"):
        Metadata(**{name: bytes(limit + 1)})
    with pytest.raises(InvalidArgumentError, match=f"`{name}` must be bytes or None, got str"):
        Metadata(**{name: "text"})


@pytest.mark.parametrize("kind", [b"1abc", b"ab c", b"\xe4bcd", bytes(4)])
def test_the_type_of_a_chunk_must_be_letters(kind):
    image, *_ = split_chunks(SMALLEST.pack())
    with pytest.raises(BitstreamError, match="must be four letters"):
        Container.unpack(join_chunks([image, (kind, b"")]))


@pytest.mark.parametrize(
    "content", [b"", b"noise", zlib.compress(b"cut")[:-1], zlib.compress(b"") + b"1"]
)
def test_metadata_must_be_one_zlib_stream(content):
    image, *_ = split_chunks(SMALLEST.pack())
    with pytest.raises(BitstreamError, match="chunk 'exif' is malformed"):
        Container.unpack(join_chunks([image, (b"exif", content)]))


# Version 0: decoded, and no longer written.


@pytest.mark.parametrize("path", sorted(GOLDEN_0.glob("*.cmb")), ids=lambda path: path.stem)
def test_version_0_is_read_field_by_field(path):
    data = path.read_bytes()
    width, height, z_length = struct.unpack_from("<III", data, 14)
    container = Container.unpack(data)
    assert container.header == Header(0, data[6:14], width, height, data[5] == 1, False)
    assert Header.unpack(data[:HEADER_BYTES]) == container.header
    assert container.z == data[26 : 26 + z_length] and container.metadata == NO_METADATA
    y = data[26 + z_length : -4]
    assert container.y == y[:3] + b"\0" + y[3:]


def test_damage_in_version_0_is_refused():
    data = (GOLDEN_0 / "pixel.cmb").read_bytes()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            Container.unpack(bytes(changed))
    for length in range(len(data)):
        with pytest.raises(BitstreamError, match="truncated|signature"):
            Container.unpack(data[:length])
    for at, value, reason in ((5, b"\2", "malformed: flags 2"), (22, b"\xff" * 4, "z string of")):
        body = data[:at] + value + data[at + len(value) : -4]
        with pytest.raises(BitstreamError, match=reason):
            Container.unpack(body + struct.pack("<I", zlib.crc32(body)))


def test_a_short_y_string_is_refused():
    assert unpack_latent(bytes(8)) == (LatentPrefix(0, 0, 0, 0), b"")
    with pytest.raises(BitstreamError, match="y string of 7 bytes is truncated"):
        unpack_latent(bytes(7))


@given(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20), max_size=4))
def test_symbol_crc_covers_little_endian_int32(blocks):
    expected = zlib.crc32(b"".join(struct.pack("<i", s) for block in blocks for s in block))
    for dtype in ("<i4", ">i4", "<i8"):
        assert symbols_crc([np.array(block, dtype) for block in blocks]) == expected
    strided = [np.repeat(np.array(block, np.int32), 2)[::2] for block in blocks]
    assert symbols_crc(strided) == expected

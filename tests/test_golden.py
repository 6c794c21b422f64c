"""Files that every later version has to decode, and a decoder written from docs/format.md alone."""

import hashlib
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from codec_helpers import load_image, recording
from golden.make import METADATA
from safetensors.numpy import load_file

import cmamba_ref
from cmamba_ref import CMamba
from cmamba_ref.codec.container import Container
from cmamba_ref.codec.metadata import NO_METADATA
from cmamba_ref.entropy import latent_coder

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["pixel", "colour", "grey", "noise", "alpha", "full"]
OLD = GOLDEN / "version0"  # of the first four images
FILES = [*(f"{name}.cmb" for name in NAMES), *(f"version0/{name}.cmb" for name in NAMES[:4])]


@pytest.fixture(scope="module")
def model() -> CMamba:
    return CMamba.from_pretrained(GOLDEN / "model")


@pytest.mark.parametrize("file", FILES)
def test_golden_files_decode_to_the_stored_images(model, file):
    path = GOLDEN / file
    decoded = cmamba_ref.decode(path.read_bytes(), model)
    expected = load_image(GOLDEN / f"{path.stem}.decoded.png")
    assert decoded.shape == expected.shape
    assert np.abs(decoded.astype(int) - expected.astype(int)).max() <= 1
    if decoded.shape[2:] in ((2,), (4,)):
        original = load_image(GOLDEN / f"{path.stem}.png")
        np.testing.assert_array_equal(decoded[..., -1], original[..., -1])


@pytest.mark.parametrize("name", NAMES)
def test_golden_images_encode_to_equivalent_files(model, name):
    """Not to the same bytes on every machine: g_a runs in float32, and a symbol may differ.

    The encoder that made the files padded by replication, see `cmamba_ref.model.pad`.
    """
    stored = (GOLDEN / f"{name}.cmb").read_bytes()
    file, metadata = read_file(stored), METADATA if name == "full" else NO_METADATA
    with (
        mock.patch.object(latent_coder, "SKIPPED_TABLES", file.skipped),
        mock.patch("cmamba_ref.model.pad", pad_by_replication),
    ):
        data = cmamba_ref.encode(
            load_image(GOLDEN / f"{name}.png"), model, 0.01 * file.quality, metadata=metadata
        )
    assert len(data) == pytest.approx(len(stored), rel=0.01, abs=4)
    decoded = cmamba_ref.decode(data, model)
    expected = load_image(GOLDEN / f"{name}.decoded.png")
    assert np.abs(decoded.astype(int) - expected.astype(int)).mean() < 0.1


def pad_by_replication(x: torch.Tensor) -> torch.Tensor:
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % 64, 0, -height % 64), mode="replicate")


def test_golden_files_stay_small():
    assert (GOLDEN / "model" / "model.safetensors").stat().st_size <= 500_000
    assert {p.relative_to(GOLDEN).as_posix() for p in GOLDEN.rglob("*.cmb")} == set(FILES)


# The page's decoder: NumPy and the standard library, nothing of the package's coder.


@dataclass
class File:
    """The fields of a file, as the page names them."""

    model_id: bytes
    width: int
    height: int
    flags: int
    quality: int
    shift: int
    skipped: int
    symbols_check: int
    z: bytes
    y: bytes
    others: dict[bytes, bytes]


def number(data: bytes) -> int:
    return int.from_bytes(data, "little")


def read_file(data: bytes) -> File:
    assert data[:4] == b"\x8fCMB"
    return read_version_0(data) if data[4] == 0 else read_version_1(data)


def read_version_0(data: bytes) -> File:
    assert data[5] in (0, 1) and zlib.crc32(data[:-4]) == number(data[-4:])
    width, height, z_length = struct.unpack_from("<III", data, 14)
    y = data[26 + z_length : -4]
    return File(
        *(data[6:14], width, height, data[5], number(y[0:2]), y[2], 0, number(y[3:7])),
        z=data[26 : 26 + z_length],
        y=y[7:],
        others={},
    )


def read_version_1(data: bytes) -> File:
    chunks, at, checked = [], 5, data[:5]
    while not chunks or chunks[-1][0] != b"IEND":
        start, end = at, at + 8 + number(data[at + 4 : at + 8])
        assert zlib.crc32(data[at:end]) == number(data[end : end + 4])
        chunks.append((data[at : at + 4], data[at + 8 : end]))
        checked += data[start:end] * (chunks[-1][0] != b"IEND")
        at = end + 4
    (first, image), *others, (_, check) = chunks
    assert data[4] == 1 and first == b"IMAG" and at == len(data)
    assert number(check) == zlib.crc32(checked)
    z_length, z_start = read_varint(image, 17)
    y = image[z_start + z_length :]
    return File(
        model_id=image[1:9],
        width=number(image[9:13]),
        height=number(image[13:17]),
        flags=image[0],
        quality=number(y[0:2]),
        shift=y[2],
        skipped=y[3],
        symbols_check=number(y[4:8]),
        z=image[z_start : z_start + z_length],
        y=y[8:],
        others=dict(others),
    )


def read_alpha(data: bytes, width: int, height: int) -> np.ndarray:
    """A grey PNG by its own specification."""
    assert struct.unpack(">II", data[16:24]) == (width, height) and data[24:29] == b"\x08\0\0\0\0"
    pixels, at = b"", 33
    while data[at + 4 : at + 8] == b"IDAT":
        length = int.from_bytes(data[at : at + 4], "big")
        pixels += data[at + 8 : at + 8 + length]
        at += 12 + length
    values = np.frombuffer(zlib.decompress(pixels), np.uint8).astype(int)
    coded = values.reshape(height, width + 1)
    rows = np.zeros((height + 1, width + 1), int)  # a row above and a column before, of zeros
    for y in range(height):
        for x in range(width):
            a, b, c = rows[y + 1, x], rows[y, x + 1], rows[y, x]
            nearest = min((a, b, c), key=lambda value: abs(a + b - c - value))
            predicted = (0, a, b, (a + b) // 2, nearest)[coded[y, 0]]
            rows[y + 1, x + 1] = (coded[y, x + 1] + predicted) % 256
    return rows[1:, 1:]


@dataclass
class Table:
    """One table: cumulative frequencies and the symbol of its first entry."""

    cumulative: list[int]
    offset: int


def read_tables(tensors: dict[str, np.ndarray], prefix: str) -> list[Table]:
    cdf, starts, offsets = (
        tensors[f"{prefix}.stored.{k}"].tolist() for k in ("cdf", "starts", "offsets")
    )
    return [
        Table(cdf[a:b], offset)
        for a, b, offset in zip(starts[:-1], starts[1:], offsets, strict=True)
    ]


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position


def read_symbols(tables: list[Table], data: bytes, blocks: list[list[int]]) -> list[int]:
    """All symbols of a rANS string, from the table indexes of its blocks."""
    lanes = data[0] + 1
    escape_bytes, at_escape = read_varint(data, 1)
    at_states = at_escape + escape_bytes
    at_word = at_states + -(-34 * lanes // 8)
    packed = int.from_bytes(data[at_states:at_word], "little")
    states = [packed >> 34 * lane & (1 << 34) - 1 for lane in range(lanes)]
    symbols = []
    for block in blocks:
        for j, index in enumerate(block):
            cumulative, offset = tables[index].cumulative, tables[index].offset
            x = states[j % lanes]
            slot = x % 65536
            entry = int(np.searchsorted(cumulative, slot, side="right")) - 1
            frequency = cumulative[entry + 1] - cumulative[entry]
            x = frequency * (x // 65536) + slot - cumulative[entry]
            if x < 1 << 18:
                x = x * 65536 + int.from_bytes(data[at_word : at_word + 2], "little")
                at_word += 2
            states[j % lanes] = x
            symbol = offset + entry
            if entry == len(cumulative) - 2:
                value, at_escape = read_varint(data, at_escape)
                symbol = offset - 1 - value // 2 if value % 2 else symbol + value // 2
            symbols.append(symbol)
    assert at_word == len(data) and at_escape == at_states and set(states) == {1 << 18}
    return symbols


def level(log_scale: np.ndarray, shift: int) -> np.ndarray:
    """The table of each symbol of y."""
    low, high = np.log(0.11), np.log(256)
    position = (log_scale - low) / ((high - low) / 63)
    return np.floor(position + 0.5 + shift / 65536).clip(0, 63).astype(int)


@pytest.mark.parametrize("path", FILES)
def test_independent_decoder_reads_golden_files(model, path):
    """It takes the log-scales from ours, which the networks make, and does all else itself."""
    data = (GOLDEN / path).read_bytes()
    tensors = load_file(GOLDEN / "model" / "model.safetensors")
    file = read_file(data)
    with recording() as seen:
        decoded = cmamba_ref.decode(data, model)
    (ours,) = seen

    rows, columns = -(-file.height // 64), -(-file.width // 64)
    z_tables = read_tables(tensors, "entropy_bottleneck")
    z_block = [c for c in range(len(z_tables)) for _ in range(rows * columns)]
    z = read_symbols(z_tables, file.z, [z_block])
    y_tables = read_tables(tensors, "gaussian_conditional")
    y_levels = np.split(level(ours.log_scales, file.shift), 2)
    y = np.zeros(16 * 16 * rows * columns, "<i4")
    is_coded = np.concatenate(y_levels) >= file.skipped
    y[is_coded] = read_symbols(
        y_tables, file.y, [levels[levels >= file.skipped].tolist() for levels in y_levels]
    )

    assert zlib.crc32(np.array(z, dtype="<i4").tobytes() + y.tobytes()) == file.symbols_check
    assert z + y.tolist() == ours.symbols.tolist()
    if file.flags & 2:
        alpha = read_alpha(file.others[b"ALPH"], file.width, file.height)
        np.testing.assert_array_equal(alpha, decoded[..., -1])


def test_golden_files_exercise_the_format(model):
    """Of both versions: grey and colour, several lanes, escapes in both strings, fractions of a
    quality; of version 1 also alpha, metadata and skipped symbols."""
    new = [read_file((GOLDEN / f"{name}.cmb").read_bytes()) for name in NAMES]
    old = [read_file((OLD / f"{name}.cmb").read_bytes()) for name in NAMES[:4]]
    for files in (new, old):
        assert {f.flags & 1 for f in files} == {0, 1}
        assert any(f.quality % 100 for f in files)
        assert any(f.y[0] > 0 for f in files), "more than one lane"
        assert any(f.y[1] > 0 for f in files) and any(f.z[1] > 0 for f in files), "escapes"
    assert {f.flags for f in new} == {0, 1, 2, 3}
    assert {kind for f in new for kind in f.others} == {b"ALPH", b"exif", b"iccp", b"xmpd"}


def test_skipped_symbols_are_zero_on_both_sides(model):
    """In `full`, written with so many skipped tables that they hold a third of the symbols."""
    data = (GOLDEN / "full.cmb").read_bytes()
    file = read_file(data)
    with recording() as seen:
        cmamba_ref.decode(data, model)
    levels = level(seen[0].log_scales, file.shift)
    assert file.skipped > 0 and 0.1 < (levels < file.skipped).mean() < 0.9


def test_metadata_is_stored_as_specified(model):
    file = read_file((GOLDEN / "full.cmb").read_bytes())
    found = {kind: zlib.decompress(data) for kind, data in file.others.items() if kind != b"ALPH"}
    assert found == {b"exif": METADATA.exif, b"iccp": METADATA.icc_profile, b"xmpd": METADATA.xmp}


def test_model_id_follows_the_specification(model):
    tensors = load_file(GOLDEN / "model" / "model.safetensors")
    names = {np.dtype("float32"): "torch.float32", np.dtype("int32"): "torch.int32"}
    digest = hashlib.sha256()
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {names[values.dtype]} {list(values.shape)}\n".encode())
        digest.update(values.tobytes())
    file = read_file((GOLDEN / "pixel.cmb").read_bytes())
    assert file.model_id == model.model_id == digest.digest()[:8]


@pytest.mark.parametrize("prefix", ["gaussian_conditional", "entropy_bottleneck"])
def test_changed_table_entry_is_detected(model, prefix):
    """By the id; and if the id were blind to it, by the check of the symbols."""
    data = (GOLDEN / "noise.cmb").read_bytes()
    with recording() as seen:
        cmamba_ref.decode(data, model)
    first = 0 if prefix == "entropy_bottleneck" else -seen[0].log_scales.size
    table, symbol = seen[0].indexes[first], seen[0].symbols[first]
    changed = CMamba.from_pretrained(GOLDEN / "model")
    stored = getattr(changed, prefix).stored
    entry = stored.starts[table] + symbol - stored.offsets[table]
    stored.cdf[entry + 1] -= 1  # the first symbol's entry gives one unit to the next
    with pytest.raises(cmamba_ref.BitstreamError, match=model.model_id.hex()):
        cmamba_ref.decode(data, changed)
    container = Container.unpack(data)
    strings = [[container.y], [container.z]]
    with pytest.raises(cmamba_ref.BitstreamError):
        changed.decode_latent(strings, (3, 3))
    model.decode_latent(strings, (3, 3))


def test_annotated_example_is_a_golden_file(root):
    page = (root / "docs" / "format.md").read_text(encoding="utf-8")
    example = page.split("```hex\n")[1].split("```")[0]
    hexadecimal = "".join(line.split("|")[0] for line in example.splitlines())
    assert bytes.fromhex(hexadecimal) == (GOLDEN / "pixel.cmb").read_bytes()

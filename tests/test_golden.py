"""Files that every later version has to decode, and a decoder written from docs/format.md alone."""

import hashlib
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from codec_helpers import load_image, recording
from safetensors.numpy import load_file

import cmamba_ref
from cmamba_ref import CMamba

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["pixel", "colour", "grey", "noise"]


@pytest.fixture(scope="module")
def model() -> CMamba:
    return CMamba.from_pretrained(GOLDEN / "model")


@pytest.mark.parametrize("name", NAMES)
def test_golden_files_decode_to_the_stored_images(model, name):
    decoded = cmamba_ref.decode((GOLDEN / f"{name}.cmb").read_bytes(), model)
    expected = load_image(GOLDEN / f"{name}.decoded.png")
    assert decoded.shape == expected.shape
    assert np.abs(decoded.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_golden_images_encode_to_equivalent_files(model, name):
    """Not to the same bytes on every machine: g_a runs in float32, and a symbol may differ."""
    stored = (GOLDEN / f"{name}.cmb").read_bytes()
    quality = 0.01 * read_file(stored).quality
    data = cmamba_ref.encode(load_image(GOLDEN / f"{name}.png"), model, quality)
    assert len(data) == pytest.approx(len(stored), rel=0.01, abs=4)
    decoded = cmamba_ref.decode(data, model)
    expected = load_image(GOLDEN / f"{name}.decoded.png")
    assert np.abs(decoded.astype(int) - expected.astype(int)).mean() < 0.1


def test_golden_files_stay_small():
    assert (GOLDEN / "model" / "model.safetensors").stat().st_size <= 500_000
    assert {p.stem for p in GOLDEN.glob("*.cmb")} == set(NAMES)


# The page's decoder: NumPy and the standard library, nothing of the package's coder.


@dataclass
class File:
    """The fields of a file, as the page names them."""

    model_id: bytes
    width: int
    height: int
    grey: bool
    quality: int
    shift: int
    symbols_check: int
    z: bytes
    y: bytes


def read_file(data: bytes) -> File:
    assert data[:4] == b"\x8fCMB" and data[4] == 0 and data[5] in (0, 1)
    assert zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "little")
    width, height, z_length = struct.unpack_from("<III", data, 14)
    y_string = data[26 + z_length : -4]
    return File(
        model_id=data[6:14],
        width=width,
        height=height,
        grey=data[5] == 1,
        quality=int.from_bytes(y_string[0:2], "little"),
        shift=y_string[2],
        symbols_check=int.from_bytes(y_string[3:7], "little"),
        z=data[26 : 26 + z_length],
        y=y_string[7:],
    )


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


@pytest.mark.parametrize("name", NAMES)
def test_independent_decoder_reads_golden_files(model, name):
    """It takes the log-scales from ours, which the networks make, and does all else itself."""
    data = (GOLDEN / f"{name}.cmb").read_bytes()
    tensors = load_file(GOLDEN / "model" / "model.safetensors")
    file = read_file(data)
    with recording() as seen:
        cmamba_ref.decode(data, model)
    (ours,) = seen

    rows, columns = -(-file.height // 64), -(-file.width // 64)
    z_tables = read_tables(tensors, "entropy_bottleneck")
    z_block = [c for c in range(len(z_tables)) for _ in range(rows * columns)]
    z = read_symbols(z_tables, file.z, [z_block])
    y_tables = read_tables(tensors, "gaussian_conditional")
    y_blocks = [s.tolist() for s in np.split(level(ours.log_scales, file.shift), 2)]
    assert sum(map(len, y_blocks)) == 16 * 16 * rows * columns
    y = read_symbols(y_tables, file.y, y_blocks)

    assert zlib.crc32(np.array(z + y, dtype="<i4").tobytes()) == file.symbols_check
    assert z + y == ours.symbols.tolist()


def test_golden_files_exercise_the_format(model):
    """Grey and colour, several lanes, escapes in both strings, fractions of a quality."""
    files = [read_file((GOLDEN / f"{name}.cmb").read_bytes()) for name in NAMES]
    assert {f.grey for f in files} == {False, True}
    assert any(f.quality % 100 for f in files)
    assert any(f.y[0] > 0 for f in files), "more than one lane"
    assert any(f.y[1] > 0 for f in files) and any(f.z[1] > 0 for f in files), "escapes"


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
    file = read_file(data)
    y_string = data[26 + len(file.z) : -4]
    with pytest.raises(cmamba_ref.BitstreamError):
        changed.decode_latent([[y_string], [file.z]], (3, 3))
    model.decode_latent([[y_string], [file.z]], (3, 3))


def test_annotated_example_is_a_golden_file(root):
    page = (root / "docs" / "format.md").read_text(encoding="utf-8")
    example = page.split("```hex\n")[1].split("```")[0]
    hexadecimal = "".join(line.split("|")[0] for line in example.splitlines())
    assert bytes.fromhex(hexadecimal) == (GOLDEN / "pixel.cmb").read_bytes()

"""Models, images and recordings for the tests of the codec, and commands in other processes.

CMAMBA_TEST_MODEL: a directory of weights to test in place of the bundled ones.
"""

import dataclasses
import functools
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook

import cmamba_ref
from cmamba_ref import CMamba, CMambaConfig
from cmamba_ref.config import TINY
from cmamba_ref.entropy import latent_coder, rans
from cmamba_ref.nn.context import ContextModel

TESTS = Path(__file__).resolve().parent
# For other processes: the modules that this one finds, and one thread each.
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
QUALITIES = (1, 2.5, 4, 6.3, 8)

SMALL = dataclasses.replace(
    TINY,
    name="small-random",
    widths=(8, 8, 16),
    latent_channels=16,
    hyper_widths=(16, 8),
    slices=2,
    cae_width=16,
    lrp_widths=(16, 8),
    lrp=True,
    bypass=False,
)
ONE_RATE = dataclasses.replace(SMALL, name="small-random-one-rate", lmbdas=())


@functools.cache
def shipped_model() -> CMamba:
    """The default model, `tiny`."""
    return CMamba.from_pretrained(os.environ.get("CMAMBA_TEST_MODEL", "tiny"))


def random_model(config: CMambaConfig = SMALL, seed: int = 0) -> CMamba:
    """A model of random weights with tables, whose scales and symbols spread over many values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = CMamba(config).eval()
        with torch.no_grad():
            for parameter in [*made.h_s.parameters(), *made.context.parameters()]:
                parameter.add_(0.05 * torch.randn_like(parameter))
            for cae in made.context.cae:
                log_scale = cae.head.bias.chunk(2)[1]  # type: ignore[union-attr, operator]
                log_scale.copy_(torch.linspace(4, 0, len(log_scale)))
                cae.head.weight.mul_(0.2)  # type: ignore[union-attr, operator]
            made.h_a[-1].weight.mul_(4)  # type: ignore[operator]
    made.update()
    return made


def make_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A uint8 image `[H, W, 3]`: a gradient, waves and some noise."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[0:height, 0:width]
    channels = [
        128 + 60 * np.sin(row / (5 + 3 * c) + seed) * np.cos(column / (9 - 2 * c)) + column % 64
        for c in range(3)
    ]
    values = np.stack(channels, axis=-1) + rng.normal(0, 6, (height, width, 3))
    return values.round().clip(0, 255).astype(np.uint8)


def load_image(path: Path) -> np.ndarray:
    """A PNG as a uint8 array, with its alpha channel."""
    with Image.open(path) as image:
        return np.asarray(image)


def as_input(image: np.ndarray) -> torch.Tensor:
    """A uint8 image `[H, W, 3]` as the model takes it, `[1, 3, H, W]` in 0...1."""
    return torch.tensor(image).permute(2, 0, 1)[None] / 255


@dataclasses.dataclass
class Recording:
    """All that the coding of one image went through.

    Attributes:
        symbols: all symbols in coding order, z then y, skipped ones as 0.
        indexes: the table index of each of them.
        log_scales: of all of y, float64, in coding order.
        y_bar: the input of g_s, float64.
    """

    symbols: np.ndarray
    indexes: np.ndarray
    log_scales: np.ndarray
    y_bar: np.ndarray


@contextmanager
def recording() -> Iterator[list[Recording]]:
    """Watch the coding (either way) of one image; the list holds the recording afterwards."""
    seen: list[Recording] = []
    symbols: list[np.ndarray] = []
    z_indexes: list[np.ndarray] = []
    y_indexes: list[np.ndarray] = []
    log_scales: list[np.ndarray] = []
    y_bars: list[np.ndarray] = []
    encode, take = rans.encode, rans.Decoder.take
    scale_index, symbols_crc = latent_coder.scale_index, latent_coder.symbols_crc

    def seen_encode(tables, blocks, lanes=None):
        z_indexes[:] = [blocks[0][1]]  # y is coded before z, and decoded after it
        return encode(tables, blocks, lanes)

    def seen_take(decoder, index):
        z_indexes[:] = z_indexes or [index]
        return take(decoder, index)

    def seen_index(scales, shift):
        index = scale_index(scales, shift)
        log_scales.append(scales.flatten().cpu().numpy())
        y_indexes.append(index.flatten().cpu().numpy())
        return index

    def seen_crc(blocks):
        symbols[:] = blocks
        return symbols_crc(blocks)

    def seen_module(module, args, output):
        if isinstance(module, ContextModel):
            y_bars.append(output.detach().cpu().numpy())

    hook = register_module_forward_hook(seen_module)
    try:
        with (
            mock.patch.object(rans, "encode", seen_encode),
            mock.patch.object(rans.Decoder, "take", seen_take),
            mock.patch.object(latent_coder, "scale_index", seen_index),
            mock.patch.object(latent_coder, "symbols_crc", seen_crc),
        ):
            yield seen
    finally:
        hook.remove()
    (y_bar,) = y_bars
    all_symbols = np.concatenate([block.ravel() for block in symbols]).astype(np.int32)
    indexes = np.concatenate([z_indexes[0].ravel(), *y_indexes])
    seen.append(Recording(all_symbols, indexes, np.concatenate(log_scales), y_bar))


def assert_same_coding(decoded: Recording, encoded: Recording) -> None:
    """Symbols equal, and y_bar within the promised 1e-9."""
    assert np.array_equal(decoded.symbols, encoded.symbols)
    assert np.array_equal(decoded.indexes, encoded.indexes)
    assert np.abs(decoded.y_bar - encoded.y_bar).max() <= 1e-9


@dataclasses.dataclass
class RoundTrip:
    """An image through a file on disk."""

    size: int
    image: np.ndarray
    decoded: np.ndarray
    encoder: Recording


def round_trip(model: CMamba, image: np.ndarray, quality: float | None, path: Path) -> RoundTrip:
    with recording() as at_encoder:
        path.write_bytes(cmamba_ref.encode(image, model, quality))
    data = path.read_bytes()
    with recording() as at_decoder:
        decoded = cmamba_ref.decode(data, model)
    assert decoded.shape == image.shape and decoded.dtype == np.uint8
    assert_same_coding(at_decoder[0], at_encoder[0])
    return RoundTrip(len(data), image, decoded, at_encoder[0])


@contextmanager
def without_onednn() -> Iterator[None]:
    """Convolutions by other code, in another order of summation."""
    torch.backends.mkldnn.enabled = False  # `torch.backends.mkldnn.flags` warns
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = True


# A file as docs/format.md has it: five bytes, then chunks of type, length, data and CRC. Of the
# first chunk, by its data: name of the field, offset, struct format.
START = 5
HEADER = {
    "flags": (0, "<B"),
    "model id": (1, "8s"),
    "width": (9, "<I"),
    "height": (13, "<I"),
}
Z_LENGTH_AT = 17
LATENT_PREFIX = {
    "quality": (0, "<H"),
    "shift": (2, "<B"),
    "skipped": (3, "<B"),
    "symbols' check": (4, "<I"),
}

Chunk = tuple[bytes, bytes]


def split_chunks(data: bytes) -> list[Chunk]:
    """Type and data of every chunk of a file but the last, which holds the file's checksum."""
    chunks, at = [], START
    while data[at : at + 4] != b"IEND":
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        chunks.append((data[at : at + 4], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def join_chunks(chunks: Iterable[Chunk], start: bytes = b"\x8fCMB\x01") -> bytes:
    """A file of these chunks, with right checksums."""
    parts = [kind + struct.pack("<I", len(content)) + content for kind, content in chunks]
    check = zlib.crc32(start + b"".join(parts))
    parts.append(b"IEND" + struct.pack("<II", 4, check))
    return start + b"".join(part + struct.pack("<I", zlib.crc32(part)) for part in parts)


def split_image(content: bytes) -> tuple[bytes, bytes, bytes]:
    """The data of the first chunk: its fields, the z string and the y string."""
    at = Z_LENGTH_AT
    length = 0
    while True:
        length |= (content[at] & 127) << 7 * (at - Z_LENGTH_AT)
        at += 1
        if content[at - 1] < 128:
            return content[:Z_LENGTH_AT], content[at : at + length], content[at + length :]


def join_image(fields: bytes, z: bytes, y: bytes, z_length: int | None = None) -> bytes:
    """The data of the first chunk; with another length of z than its own if that is given."""
    length, number = len(z) if z_length is None else z_length, b""
    while length >= 128:
        number += bytes([length & 127 | 128])
        length >>= 7
    return fields + number + bytes([length]) + z + y


def field_of(data: bytes, name: str):
    """The value of one field of the header or of the y string."""
    fields, _, y = split_image(split_chunks(data)[0][1])
    offset, layout = (HEADER | LATENT_PREFIX)[name]
    return struct.unpack_from(layout, fields if name in HEADER else y, offset)[0]


def with_field(data: bytes, name: str, value) -> bytes:
    """The file with one field of the header or of the y string replaced, and right checksums."""
    (kind, content), *others = split_chunks(data)
    fields, z, y = split_image(content)
    if name == "z length":
        return join_chunks([(kind, join_image(fields, z, y, value)), *others])
    offset, layout = (HEADER | LATENT_PREFIX)[name]
    changed = bytearray(fields if name in HEADER else y)
    struct.pack_into(layout, changed, offset, value)
    parts = (bytes(changed), z, y) if name in HEADER else (fields, z, bytes(changed))
    return join_chunks([(kind, join_image(*parts)), *others])


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG, with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def run_elsewhere(function: str, *arguments: Path) -> None:
    """Call a function of a test module, "module.function", with paths in a process of its own."""
    module, name = function.split(".")
    code = f"import sys, pathlib, {module}; {module}.{name}(*map(pathlib.Path, sys.argv[1:]))"
    done = run_python("-W", "error", "-c", code, *map(str, arguments))
    assert done.returncode == 0, done.stderr


def run_python(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with options of `subprocess.run`."""
    options = {"env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 600} | options
    return subprocess.run([sys.executable, *arguments], **options)


def start_cmamba(*arguments: str) -> subprocess.Popen[str]:
    """The command `cmamba` in a process group of its own, just started."""
    return subprocess.Popen(
        [sys.executable, "-m", "cmamba_ref", *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

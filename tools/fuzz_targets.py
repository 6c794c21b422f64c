"""The targets of tools/fuzz.py: the ways in which bytes from elsewhere enter the package.

A target uses an input as a program would. It returns the outcome as a short string, or raises an
error that docs/reliability.md names; anything else is a finding. atheris is not needed here, so
that the tests try every target wherever they run.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import resource
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize

from cmamba_ref import CMamba, MemoryLimitError, cli, codec, pillow_plugin
from cmamba_ref.cli.demo import DEMO_IMAGE
from cmamba_ref.codec import container
from cmamba_ref.codec.alpha import pack_alpha, unpack_alpha
from cmamba_ref.codec.images import parse_image
from cmamba_ref.codec.output import png_bytes
from cmamba_ref.entropy import rans
from cmamba_ref.entropy.gaussian import is_skipped
from cmamba_ref.entropy.latent_coder import SKIPPED_TABLES, LatentSymbols, hyper_latent_shape
from cmamba_ref.entropy.tables import gaussian_tables, tables_from_pmfs
from cmamba_ref.errors import BitstreamError, CMambaError, ImageError, PillowError, WeightsError
from cmamba_ref.weight_difference import pack, unpack
from cmamba_ref.weights import CONFIG_FILE, WEIGHTS_FILE

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
MEMORY_LIMIT = 1 << 30  # bytes of address space beyond what the process had before
MAX_PIXELS = 1_000_000  # of images, so that what is allowed stays far within the memory

Change = Callable[[bytes], bytes]


class UnexpectedError(Exception):
    """A target did what its documentation rules out, without an error of its own."""


def limit_memory() -> None:
    """Let this process take no more than `MEMORY_LIMIT` beyond what it has. Linux only."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def change_all(data: bytes, change: Change) -> bytes:
    return change(data)


def check_image(image: np.ndarray, shape: tuple[int, ...]) -> str:
    if image.shape != shape or image.dtype != np.uint8:
        raise UnexpectedError(f"{image.dtype}{image.shape} where {shape} was declared")
    return "image"


# ---------------------------------------------------------------- files


@cache
def golden_model() -> CMamba:
    """Return the small model that made the golden files."""
    return CMamba.from_pretrained(GOLDEN / "model")


def golden_files() -> list[bytes]:
    return [path.read_bytes() for path in sorted(GOLDEN.rglob("*.cmb"))]


def mutate_chunk(data: bytes, change: Change) -> bytes:
    """Change what one chunk of a .cmb file holds and make all checksums right.

    So that what lies behind them is reached; metadata is changed as it is when inflated. Of a file
    of version 0, all is changed.
    """
    if data[4:5] == b"\0":
        body = change(data[:-4])
        return body + struct.pack("<I", zlib.crc32(body))
    position, chunks = 5, []
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        chunks.append((kind, data[position + 8 : position + 8 + length]))
        position += 12 + length
    chosen = zlib.crc32(data) % max(len(chunks) - 1, 1)
    body = checked = data[:5]
    for k, (kind, content) in enumerate(chunks):
        if kind == b"IEND":
            content = struct.pack("<I", zlib.crc32(checked))
        elif k == chosen:
            content = mutate_content(kind, content, change)
        chunk = struct.pack("<4sI", kind, len(content)) + content
        checked += chunk
        body += chunk + struct.pack("<I", zlib.crc32(chunk))
    return body


def mutate_content(kind: bytes, content: bytes, change: Change) -> bytes:
    if kind == b"ALPH":
        return mutate_png(content, change)
    if kind in container.METADATA_TYPES.values():
        with contextlib.suppress(zlib.error):
            return zlib.compress(change(zlib.decompress(content)))
    return change(content)


def decode(data: bytes) -> str:
    image = codec.decode(data, golden_model())
    return check_image(image, container.Header.unpack(data).shape)


# ---------------------------------------------------------------- alpha

ALPHA_SIZE = 20, 31  # height and width


def alpha_channels() -> list[bytes]:
    """Alpha channels: opaque, a slope, noise."""
    noise = np.random.default_rng(0).integers(0, 256, ALPHA_SIZE)
    slope = np.broadcast_to(np.arange(ALPHA_SIZE[1]) * 8, ALPHA_SIZE)
    return [pack_alpha(np.array(a, np.uint8)) for a in (np.full(ALPHA_SIZE, 255), slope, noise)]


def mutate_png(data: bytes, change: Change) -> bytes:
    """Change one chunk of a PNG and make its checksum right; pixels as they are when inflated."""
    position, parts = 8, []
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        parts.append((kind, data[position + 8 : position + 8 + length]))
        position += 12 + length
    chosen, png = zlib.crc32(data) % max(len(parts), 1), data[:8]
    for k, (kind, content) in enumerate(parts):
        if k == chosen and kind == b"IDAT":
            with contextlib.suppress(zlib.error):
                content = zlib.compress(change(zlib.decompress(content)))
        elif k == chosen:
            content = change(content)
        checksum = zlib.crc32(kind + content)
        png += struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", checksum)
    return png


def read_alpha(data: bytes) -> str:
    return check_image(unpack_alpha(data, *ALPHA_SIZE), ALPHA_SIZE)


def show_info(data: bytes) -> str:
    out, err = io.StringIO(), io.StringIO()
    with tempfile.NamedTemporaryFile(suffix=".cmb") as file:
        Path(file.name).write_bytes(data)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(["info", file.name])
    message = err.getvalue().replace(file.name, "file")
    if (code, bool(out.getvalue()), message.count("\n")) not in ((0, True, 0), (1, False, 1)):
        raise UnexpectedError(f"exit code {code}, stderr {message!r:.200}")
    return message.strip() or "described"


def open_with_pillow(data: bytes) -> str:
    pillow_plugin.use_model(golden_model())
    with Image.open(io.BytesIO(data), formats=[pillow_plugin.FORMAT]) as opened:
        opened.load()
        image = np.asarray(opened)
    return check_image(image, container.Header.unpack(data).shape)


# ---------------------------------------------------------------- symbols


@cache
def symbol_blocks() -> list[tuple[np.ndarray, np.ndarray]]:
    """Symbols and table indexes of a string, some of the symbols far outside their tables."""
    rng, blocks = np.random.default_rng(7), []
    for count in (10, 300, 40):
        indexes = rng.integers(0, 64, count)
        symbols = np.rint(rng.standard_t(2, count) * np.exp(indexes / 12)).astype(np.int64)
        symbols[::17] = rng.integers(-(2**31), 2**31, len(symbols[::17]))
        blocks.append((symbols, indexes))
    return blocks


def sound_streams() -> list[bytes]:
    tables = golden_model().gaussian_conditional.stored.tables()
    return [rans.encode(tables, symbol_blocks(), lanes) for lanes in (1, 2, 5, 64, 256)]


def read_stream(data: bytes) -> str:
    decoder = rans.Decoder(golden_model().gaussian_conditional.stored.tables(), data)
    for _, indexes in symbol_blocks():
        symbols = decoder.take(indexes)
        if symbols.shape != indexes.shape or symbols.dtype != np.int32:
            raise UnexpectedError(f"{symbols.dtype}{symbols.shape}")
    decoder.finish()
    return "symbols"


@torch.no_grad()
def decode_forged(data: bytes) -> str:
    """Decode a file of arbitrary symbols, which an encoder would never choose.

    The input is the seed that they are drawn with. They are coded as the context model demands.
    """
    rng, coder = np.random.default_rng(list(data)), golden_model().latent_coder
    magnitude, part = 2.0 ** rng.uniform(0, 31), rng.choice([0.001, 0.1, 1.0])
    height, width = (int(side) for side in rng.integers(1, 140, 2))
    y, log_scales = [], []

    def draw(shape: Sequence[int]) -> torch.Tensor:
        usual, wild = rng.normal(0, 1, shape), rng.uniform(-magnitude, magnitude, shape)
        return torch.from_numpy(np.rint(np.where(rng.random(shape) < part, wild, usual)))

    def code(_: int, means: torch.Tensor, scales_of_slice: torch.Tensor) -> torch.Tensor:
        if not scales_of_slice.isfinite().all():
            raise BitstreamError("the scales are not finite")
        y.append(draw(means.shape))
        y[-1][is_skipped(scales_of_slice, SKIPPED_TABLES)] = 0
        log_scales.append(scales_of_slice)
        return y[-1] + means

    path = coder.float64_modules()
    z = draw((1, coder.config.hyper_widths[-1], *hyper_latent_shape(height, width)))
    y_bar = path["context"](path["h_s"](z + coder.medians()), code)
    quality = int(rng.integers(100, 801)) / 100
    symbols = LatentSymbols(z, y, log_scales, y_bar)
    (y_string,), (z_string,) = coder.encode(symbols, quality)["strings"]
    model_id = golden_model().model_id
    return decode(container.Container(model_id, width, height, False, y_string, z_string).pack())


# ---------------------------------------------------------------- weights


def golden_config() -> bytes:
    return (GOLDEN / "model" / CONFIG_FILE).read_bytes()


@cache
def golden_weights() -> tuple[bytes, bytes]:
    """Return the weights file in two parts: its JSON with the length of that, and the tensors."""
    whole = (GOLDEN / "model" / WEIGHTS_FILE).read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    return whole[:end], whole[end:]


def load_model(config: bytes, weights: bytes) -> CMamba:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        (Path(folder) / CONFIG_FILE).write_bytes(config)
        (Path(folder) / WEIGHTS_FILE).write_bytes(weights)
        return CMamba.from_pretrained(folder)


def load_config(data: bytes) -> str:
    load_model(data, b"".join(golden_weights()))
    return "model"


def load_weights_header(data: bytes) -> str:
    load_model(golden_config(), data + golden_weights()[1])
    return "model"


def mutate_weights_header(data: bytes, change: Change) -> bytes:
    """Change the JSON and make its length right."""
    text = change(data[8:])
    return len(text).to_bytes(8, "little") + text


def short_tables() -> list[bytes]:
    """Tables with few entries, so that mutations hit what matters."""
    channels = golden_model().config.hyper_widths[-1]
    tables = {
        "gaussian_conditional": gaussian_tables([0.11] * 64),
        "entropy_bottleneck": tables_from_pmfs([(-1, [0.2, 0.5], 0.3)] * channels),
    }
    tensors = {
        f"{part}.stored.{name}": torch.from_numpy(getattr(tables[part], name))
        for part in tables
        for name in ("cdf", "starts", "offsets")
    }
    return [serialize(tensors)]


def mutate_tables(data: bytes, change: Change) -> bytes:
    """Change elements of one tensor, or how many there are."""
    try:
        tensors = deserialize(data)
    except SafetensorError:
        return change(data)
    name = sorted(tensors)[zlib.crc32(data) % len(tensors)]
    elements = change(tensors[name].numpy().tobytes())
    whole = np.frombuffer(elements[: len(elements) // 4 * 4], np.int32)
    return serialize({**tensors, name: torch.from_numpy(whole.copy())})


@cache
def golden_arrays() -> dict[str, np.ndarray]:
    """Return the weights of the golden model, rounded to float16."""
    state = golden_model().state_dict()
    return {n: t.half().numpy() if t.is_floating_point() else t.numpy() for n, t in state.items()}


def small_difference() -> list[bytes]:
    """A difference of two tensors, from weights of the golden model."""
    arrays = golden_arrays()
    part = {name: arrays[name] for name in ("g_a.0.bias", "gaussian_conditional.stored.starts")}
    changed = {"g_a.0.bias": part["g_a.0.bias"] + np.float16(0.1)}
    return [pack(part | changed, part)]


def unpack_difference(data: bytes) -> str:
    arrays = unpack(data, lambda model_id: golden_arrays())
    return f"{len(arrays)} tensors"


def mutate_difference(data: bytes, change: Change) -> bytes:
    """Change what is compressed."""
    return gzip.compress(change(gzip.decompress(data)), mtime=0)


def code_with_tables(data: bytes) -> str:
    """Send an image through a file with tables, where they are accepted."""
    try:
        tables = deserialize(data)
    except SafetensorError:  # the target safetensors-header tries such files
        return "no tables"
    state = deserialize(b"".join(golden_weights()))
    model = load_model(golden_config(), serialize({**state, **tables}))
    image = np.arange(20 * 70 * 3, dtype=np.uint32).astype(np.uint8).reshape(20, 70, 3)
    try:
        decoded = codec.decode(codec.encode(image, model), model)
    except CMambaError as error:  # tables that were accepted have to do
        raise UnexpectedError(f"loaded, but: {error}") from error
    return "loaded, " + check_image(decoded, image.shape)


# ---------------------------------------------------------------- images


def sound_images() -> list[bytes]:
    """Small images in the formats that people have, some with EXIF and a profile."""
    with Image.open(DEMO_IMAGE) as image:
        colour = image.convert("RGB").crop((200, 150, 233, 170))
    alpha = Image.linear_gradient("L").resize(colour.size)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] = (1, 100)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    xmp = b'<x tiff:Orientation="6"/>'
    # Formats that do not know an option ignore it.
    carried = {"exif": exif, "icc_profile": profile, "compression": "tiff_lzw", "lossless": True}
    carried["xmp"] = xmp
    files = []
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM"):
        for mode, options in (("RGB", carried), ("L", {"progressive": True}), ("1", {})):
            buffer = io.BytesIO()
            colour.convert(mode).save(buffer, kind, **options)
            files.append(buffer.getvalue())
    for kind in ("PNG", "WEBP", "TIFF"):
        for mode in ("RGBA", "LA"):
            buffer, image = io.BytesIO(), colour.convert(mode)
            image.putalpha(alpha)
            image.save(buffer, kind, **carried | ({} if mode == "RGBA" else {"icc_profile": None}))
            files.append(buffer.getvalue())
    for mode in ("P", "L"):
        buffer = io.BytesIO()
        colour.convert(mode).save(buffer, "PNG", transparency=7)
        files.append(buffer.getvalue())
    return files


def read_image(data: bytes) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about what it repairs
        image, metadata = parse_image(data, "file", max_pixels=MAX_PIXELS, keep_metadata=True)
        flat, _ = parse_image(data, "file", max_pixels=MAX_PIXELS, background=(1, 2, 3))
    kind = {(): "grey", (2,): "grey with alpha", (3,): "colour", (4,): "colour with alpha"}
    if image.shape[2:] not in kind or image.dtype != np.uint8:
        raise UnexpectedError(f"{image.dtype}{image.shape}")
    if not 0 < image.shape[0] * image.shape[1] <= MAX_PIXELS:
        raise UnexpectedError(f"{image.shape} where {MAX_PIXELS} pixels are allowed")
    if flat.shape[:2] != image.shape[:2] or flat.shape[2:] not in ((), (3,)):
        raise UnexpectedError(f"{flat.shape} on a background")
    again, kept = parse_image(png_bytes(image, metadata), "png", keep_metadata=True)
    if not np.array_equal(again, image) or kept != metadata:
        raise UnexpectedError("another image or other metadata after a PNG")
    return kind[image.shape[2:]]


# ---------------------------------------------------------------- all targets


@dataclass(frozen=True)
class Target:
    """One way in which bytes from elsewhere enter the package.

    Attributes:
        use: do with an input what a user would; raises UnexpectedError where the result is not as
            promised.
        errors: that `use` may raise.
        seeds: make valid inputs.
        mutate: an input, given a change of bytes: goes deeper than that change of all of it would.
    """

    use: Callable[[bytes], str]
    errors: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]
    mutate: Callable[[bytes, Change], bytes] = change_all


REFUSED = (BitstreamError, MemoryLimitError)
BY_PILLOW = (PillowError, UnidentifiedImageError, Image.DecompressionBombError, MemoryLimitError)
TARGETS = {
    "container": Target(decode, REFUSED, golden_files, mutate_chunk),
    "alpha": Target(read_alpha, (BitstreamError,), alpha_channels, mutate_png),
    "rans-stream": Target(read_stream, (BitstreamError,), sound_streams),
    "forged-symbols": Target(decode_forged, REFUSED, lambda: [bytes([k]) * 4 for k in range(8)]),
    "tables": Target(code_with_tables, (WeightsError,), short_tables, mutate_tables),
    "safetensors-header": Target(
        load_weights_header, (WeightsError,), lambda: [golden_weights()[0]], mutate_weights_header
    ),
    "difference": Target(unpack_difference, (WeightsError,), small_difference, mutate_difference),
    "config": Target(load_config, (WeightsError,), lambda: [golden_config()]),
    "info": Target(show_info, (), golden_files, mutate_chunk),
    "pillow": Target(open_with_pillow, BY_PILLOW, golden_files, mutate_chunk),
    "image": Target(read_image, (ImageError,), sound_images),
}

"""Mutate valid files, weights and images at random, and check what the package makes of them.

    python tools/fuzz.py --minutes 60 --seed 1 -o fuzz.json

Every input has to end in a sound result or in an error that the documentation names, within
limits of CPU time and memory. Anything else is a finding: the input and the traceback go into the
folder of `--findings`, and the exit status is 1. `--replay` tries findings again.

An input with an outcome that is new for its target is kept and mutated further. Inputs are a
function of the seed alone, up to where the time ends. Linux only, for the limits.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import hashlib
import io
import json
import multiprocessing
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import provenance
import resident
import torch
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError
from safetensors.torch import load as deserialize
from safetensors.torch import load_file
from safetensors.torch import save as serialize

from cmamba_ref import CMamba, MemoryLimitError, cli, codec, pillow_plugin
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.cli.demo import PHOTOGRAPH
from cmamba_ref.codec import container
from cmamba_ref.codec.container import HEADER_BYTES
from cmamba_ref.codec.images import parse_image
from cmamba_ref.config import CMambaConfig
from cmamba_ref.entropy import gaussian, latent_coder, latent_prefix, rans
from cmamba_ref.entropy.precision import float64_copy
from cmamba_ref.entropy.tables import gaussian_tables, tables_from_pmfs
from cmamba_ref.errors import BitstreamError, CMambaError, ImageError, PillowError, WeightsError
from cmamba_ref.weights import CONFIG_FILE, WEIGHTS_FILE

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
MEMORY_LIMIT = 1 << 30  # bytes of address space beyond what the process had before
SECONDS_LIMIT = 5  # of CPU time; a trial is ended after four times as long
DEADLINE = 600.0  # of wall-clock time: other work on the machine counts
MAX_PIXELS = 1_000_000  # of images, so that what is allowed stays far within the memory
BATCH = 100  # inputs that are drawn at a time, and tried by one process if it lives
MOST_KEPT = 1000  # inputs per target
MOST_EXAMPLE_BYTES = 300
# Behind the signature, the version, the flags and the model id: mutations go deepest there.
BEHIND_ID = 14
SIZES = (0, 1, 63, 64, 65, 500, 9_999, 10_000, 65_535, 2**20, 2**31 - 1, 2**31, 2**32 - 1)

Generator = np.random.Generator


# ---------------------------------------------------------------- mutations


def mutate(data: bytes, others: Sequence[bytes], rng: Generator, begin: int = 0) -> bytes:
    """Mutate an input once, in one of six ways; two of them may reach what lies before `begin`."""
    if len(data) <= begin + 1:
        return data + rng.bytes(8)
    changed, kind = np.frombuffer(data, np.uint8).copy(), rng.integers(6)
    if kind == 0:  # flipped bits
        for bit in rng.integers(8 * begin, 8 * len(data), rng.integers(1, 40)):
            changed[bit // 8] ^= 1 << bit % 8
        return changed.tobytes()
    if kind == 1:  # other bytes
        places = rng.integers(begin, len(data), rng.integers(1, 8))
        changed[places] = rng.integers(0, 256, len(places))
        return changed.tobytes()
    if kind == 2:  # truncation
        return data[: int(rng.integers(len(data)))]
    if kind == 3:  # the beginning of another input
        other = others[int(rng.integers(len(others)))] or data
        cut = int(rng.integers(min(len(data), len(other))))
        return other[:cut] + data[cut:]
    if kind == 4:  # noise in the place of a piece
        cut, end = sorted(rng.integers(begin, len(data), 2))
        return data[:cut] + rng.bytes(int(rng.integers(0, 50))) + data[end:]
    size = int(rng.choice([1, 2, 4, 8]))  # a little-endian number at an end of its range
    top, place = 2 ** (8 * size), int(rng.integers(begin, len(data)))
    value = (0, 1, top // 2 - 1, top // 2, top - 2, top - 1)[int(rng.integers(6))]
    return data[:place] + value.to_bytes(size, "little") + data[place + size :]


def mutate_often(data: bytes, others: Sequence[bytes], rng: Generator) -> bytes:
    """Mutate an input one to four times."""
    for _ in range(min(int(rng.geometric(0.6)), 4)):
        data = mutate(data, others, rng)
    return data


def completed(data: bytes) -> bytes:
    """Return a .cmb file with a right checksum, and what is shorter than one as it is."""
    return data[:-4] + struct.pack("<I", zlib.crc32(data[:-4])) if len(data) > 4 else data


def mutate_file(data: bytes, others: Sequence[bytes], rng: Generator) -> bytes:
    """Mutate a .cmb file; half of the results have a right checksum."""
    kind = rng.integers(6)
    if kind == 0 and len(data) > HEADER_BYTES:  # another size
        data = data[:14] + struct.pack("<II", *map(int, rng.choice(SIZES, 2))) + data[22:]
    elif kind < 3:
        data = mutate(data, others, rng, BEHIND_ID)
    else:
        data = mutate_often(data, others, rng)
    return completed(data) if rng.integers(2) else data


def _mutate_head(data: bytes, others: Sequence[bytes], rng: Generator) -> bytes:
    end = HEADER_BYTES + 7  # with the prefix of y
    begin = 5 if rng.integers(8) else 0  # mostly behind signature and version
    changed = mutate(data[:end], [other[:end] for other in others], rng, begin) + data[end:]
    return completed(changed) if rng.integers(2) else changed


def _mutate_image(data: bytes, others: Sequence[bytes], rng: Generator) -> bytes:
    data = mutate_often(data, others, rng)
    return with_png_checksums(data) if rng.integers(2) else data


def with_png_checksums(data: bytes) -> bytes:
    """Return a PNG file with right checksums of its chunks, and other files as they are."""
    position, parts = 8, [data[:8]]
    if parts[0] != b"\x89PNG\r\n\x1a\n":
        return data
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        if end + 4 > len(data):
            break
        parts += [data[position:end], struct.pack(">I", zlib.crc32(data[position + 4 : end]))]
        position = end + 4
    return b"".join([*parts, data[position:]])


def _mutate_weights(data: bytes, others: Sequence[bytes], rng: Generator) -> bytes:
    if rng.integers(2):
        data = _other_number(data, rng)
    if rng.integers(2):
        data = mutate_often(data, others, rng)
    if rng.integers(2) and len(data) >= 8:  # the length of the JSON made right
        data = (len(data) - 8).to_bytes(8, "little") + data[8:]
    return data


def _other_number(data: bytes, rng: Generator) -> bytes:
    """Replace one of the numbers in a text."""
    found = list(re.finditer(rb"\d{1,999}", data))
    if not found:
        return data
    match = found[rng.integers(len(found))]
    n = int(match[0])
    others = (0, 1, n + 1, n - 1, 2 * n, -n, 2**31, 2**63, 2**64, 10**50)
    return data[: match.start()] + b"%d" % others[rng.integers(len(others))] + data[match.end() :]


# All keys of a configuration, and what may stand where something else belongs.
_KEYS = tuple(f.name for f in fields(CMambaConfig))
_VALUES = [json.dumps(value) for value in (
    None, True, False, 0, 1, 2, 3, -1, 8, 16, 17, 1024, 65_536, 65_537, 2**31, 2**63, 10**40, 0.5,
    1e-300, 1e300, float("nan"), float("inf"), "", "8", "a" * 1000, [], {}, [8, 8, 16], [[8]] * 3,
    [0, 0, 0], [1, 1, 1], [1024] * 3, [65_536] * 3, [0.01, 0.02], [0.01] * 655, [1e308] * 8,
    [True] * 3, ["x"] * 2, {"a": 1}, "haar", [1, 15], [1] * 16,
)]  # fmt: skip


def _mutate_config(data: bytes, others: Sequence[bytes], rng: Generator) -> bytes:
    kind = rng.integers(3)
    if kind == 0:
        return mutate_often(data, others, rng)
    if kind == 1:
        return _other_number(data, rng)
    values = json.loads(_golden(CONFIG_FILE))
    for _ in range(int(rng.integers(1, 3))):
        key = _KEYS[rng.integers(len(_KEYS))]
        chosen = json.loads(_VALUES[rng.integers(len(_VALUES))])
        if isinstance(values.get(key), list) and values[key] and rng.integers(2):
            values[key][rng.integers(len(values[key]))] = chosen
        else:
            values[key] = chosen
    return json.dumps(values).encode()


def _mutate_tables(data: bytes, others: Sequence[bytes], rng: Generator) -> bytes:
    """Change elements of int32 tables `[n]`, put some in or take some out."""
    tensors = {name: t.numpy() for name, t in sorted(deserialize(data).items())}
    for _ in range(int(rng.integers(1, 4))):
        name, kind = list(tensors)[rng.integers(len(tensors))], rng.integers(8)
        array = tensors[name].copy()
        place = int(rng.integers(max(1, array.size)))
        if kind == 0 or not array.size:
            array = np.insert(array, place, int(rng.integers(-2, 65_540)))
        elif kind == 1:
            array = np.delete(array, place)
        elif kind < 5:
            values = (0, 1, -1, 65_535, 65_536, 2**31 - 1, -(2**31), int(array[place - 1]))
            array[place] = values[rng.integers(len(values))]
        else:
            array[place] = np.clip(int(array[place]) + rng.integers(-3, 4), -(2**31), 2**31 - 1)
        tensors[name] = array
    return serialize({name: torch.from_numpy(array) for name, array in tensors.items()})


# ---------------------------------------------------------------- targets


class UnexpectedError(Exception):
    """A target did what its documentation rules out, without an error of its own."""


@cache
def _golden(name: str) -> bytes:
    return (GOLDEN / "model" / name).read_bytes()


@cache
def golden_model() -> CMamba:
    """Return the small model that made the golden files."""
    return CMamba.from_pretrained(GOLDEN / "model")


@cache
def _golden_files() -> list[bytes]:
    return [path.read_bytes() for path in sorted(GOLDEN.glob("*.cmb"))]


_scratch = tempfile.TemporaryDirectory(prefix="fuzz-")  # removed by the process that made it


def _load(config: bytes | None = None, weights: bytes | None = None) -> CMamba:
    """Load the golden model from disk, with another configuration or other weights."""
    for file, data in ((CONFIG_FILE, config), (WEIGHTS_FILE, weights)):
        (Path(_scratch.name) / file).write_bytes(_golden(file) if data is None else data)
    return CMamba.from_pretrained(_scratch.name)


def _check(image: np.ndarray, shape: tuple[int, ...]) -> str:
    if image.shape != shape or image.dtype != np.uint8:
        raise UnexpectedError(f"{image.dtype}{image.shape} where {shape} was declared")
    return "picture"


def _decode(data: bytes) -> str:
    image = codec.decode(data, golden_model())
    header = container.Header.unpack(data)
    return _check(image, (header.height, header.width, *(() if header.grey else (3,))))


def _info(data: bytes) -> str:
    path = Path(_scratch.name) / "file.cmb"
    path.write_bytes(data)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["info", str(path)])
    said = err.getvalue().replace(str(path), "file")
    if (code, bool(out.getvalue()), said.count("\n")) not in ((0, True, 0), (1, False, 1)):
        raise UnexpectedError(f"exit code {code}, stderr {said!r:.200}")
    return said.strip() or "described"


def _open_with_pillow(data: bytes) -> str:
    pillow_plugin.use_model(golden_model())
    with Image.open(io.BytesIO(data), formats=[pillow_plugin.FORMAT]) as opened:
        width, height = opened.size
        opened.load()
        image = np.asarray(opened)
    return _check(image, (height, width, *image.shape[2:]))


def _images() -> list[bytes]:
    """Small images in the formats that people have, some with EXIF and a profile."""
    with Image.open(PHOTOGRAPH) as photograph:
        colour = photograph.convert("RGB").crop((200, 150, 233, 170))
    palette, grey = colour.quantize(40), colour.convert("L")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.ImageDescription] = "an image of the tests"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] = (1, 100)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile[:24] + bytes(12) + profile[36:]  # the time at which it was made
    carried = {"exif": exif, "icc_profile": profile}
    wanted: list[tuple[Image.Image, str, dict]] = [
        (colour, "PNG", carried),
        (palette, "PNG", {}),
        (colour.convert("1"), "PNG", {}),
        (colour, "JPEG", carried),
        (colour, "JPEG", {"progressive": True, "subsampling": 0}),
        (grey, "JPEG", {}),
        (colour, "WEBP", {"lossless": True, **carried}),
        (colour, "WEBP", {}),
        (palette, "GIF", {}),
        (colour, "TIFF", {"compression": "tiff_lzw", **carried}),
        (grey, "TIFF", {"compression": "tiff_adobe_deflate"}),
        (colour, "TIFF", {}),
        (colour, "BMP", {}),
        (colour, "PPM", {}),
    ]
    buffers = [io.BytesIO() for _ in wanted]
    for buffer, (image, kind, options) in zip(buffers, wanted, strict=True):
        image.save(buffer, kind, **options)
    return [buffer.getvalue() for buffer in buffers]


def _read_image(data: bytes) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about what it repairs
        image = parse_image(data, "file", max_pixels=MAX_PIXELS)
    _check(image, (*image.shape[:2], *((3,) if image.ndim == 3 else ())))
    if not 0 < image.shape[0] * image.shape[1] <= MAX_PIXELS:
        raise UnexpectedError(f"{image.shape} where {MAX_PIXELS} pixels are allowed")
    return "colour" if image.ndim == 3 else "grey"


@cache
def _blocks() -> list[tuple[np.ndarray, np.ndarray]]:
    """Symbols and table indexes of a string, some of the symbols far outside their tables."""
    rng, blocks = np.random.default_rng(7), []
    for count in (10, 300, 40):
        indexes = rng.integers(0, 64, count)
        symbols = np.rint(rng.standard_t(2, count) * np.exp(indexes / 12)).astype(np.int64)
        symbols[::17] = rng.integers(-(2**31), 2**31, len(symbols[::17]))
        blocks.append((symbols, indexes))
    return blocks


def _streams() -> list[bytes]:
    tables = golden_model().gaussian_conditional.stored.tables()
    return [rans.encode(tables, _blocks(), lanes) for lanes in (1, 2, 5, 64, 256)]


def _read_stream(data: bytes) -> str:
    decoder = rans.Decoder(golden_model().gaussian_conditional.stored.tables(), data)
    for _, indexes in _blocks():
        symbols = decoder.take(indexes)
        if symbols.shape != indexes.shape or symbols.dtype != np.int32:
            raise UnexpectedError(f"{symbols.dtype}{symbols.shape}")
    decoder.finish()
    return "symbols"


@cache
def _coding_path() -> list[torch.nn.Module]:
    model = golden_model()
    return [float64_copy(m, torch.device("cpu")) for m in (model.h_s, model.context)]


def _forge(data: bytes) -> str:
    """Decode a file of arbitrary symbols, coded as the context model then demands."""
    rng, model = np.random.default_rng(list(data)), golden_model()
    magnitude, part = 2.0 ** rng.uniform(0, 31), rng.choice([0.001, 0.1, 1.0])
    height, width = (int(side) for side in rng.integers(1, 140, 2))
    rows, columns = latent_coder.hyper_latent_shape(height, width)
    channels = model.config.hyper_widths[-1]
    blocks, indexes = [], []

    def draw(shape: Sequence[int]) -> torch.Tensor:
        usual, wild = rng.normal(0, 1, shape), rng.uniform(-magnitude, magnitude, shape)
        symbols = np.rint(np.where(rng.random(shape) < part, wild, usual))
        blocks.append(symbols.astype(np.int32).ravel())
        return torch.from_numpy(symbols)

    def code(_: int, means: torch.Tensor, log_scales: torch.Tensor) -> torch.Tensor:
        if not log_scales.isfinite().all():
            raise BitstreamError("the scales are not finite")
        indexes.append(gaussian.scale_index(log_scales, 0).to(torch.int32).flatten().numpy())
        return draw(means.shape) + means

    h_s, context = _coding_path()
    with torch.no_grad():
        z_hat = draw((1, channels, rows, columns)) + model.entropy_bottleneck.medians.double()
        context(h_s(z_hat), code)
    z_index = np.repeat(np.arange(channels, dtype=np.int32), rows * columns)
    z, *y = blocks
    prefix = latent_prefix.LatentPrefix(
        int(rng.integers(100, 801)), 0, latent_prefix.symbols_crc(blocks)
    )
    y_tables = model.gaussian_conditional.stored.tables()
    coded = rans.encode(y_tables, list(zip(y, indexes, strict=True)))
    z_string = rans.encode(model.entropy_bottleneck.stored.tables(), [(z, z_index)])
    y_string = latent_prefix.pack_latent(prefix, coded)
    return _decode(
        container.Container(model.model_id, width, height, False, y_string, z_string).pack()
    )


def _weights_header() -> bytes:
    whole = _golden(WEIGHTS_FILE)
    return whole[: 8 + int.from_bytes(whole[:8], "little")]


def _load_weights(data: bytes) -> str:
    _load(weights=data + _golden(WEIGHTS_FILE)[len(_weights_header()) :])
    return "model"


def _load_config(data: bytes) -> str:
    _load(config=data)
    return "model"


@cache
def _state() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "model" / WEIGHTS_FILE)


def _tables() -> list[bytes]:
    """The real tables, and short ones, in which mutations hit more often."""
    state, short = _state(), {}
    for part, tables in (
        ("gaussian_conditional", gaussian_tables([0.11] * 64)),
        (
            "entropy_bottleneck",
            tables_from_pmfs([(-1, [0.2, 0.5], 0.3)] * golden_model().config.hyper_widths[-1]),
        ),
    ):
        for name in ("cdf", "starts", "offsets"):
            short[f"{part}.stored.{name}"] = torch.from_numpy(getattr(tables, name))
    return [
        serialize({name: t for name, t in state.items() if ".stored." in name}),
        serialize(short),
    ]


def _code_with_tables(data: bytes) -> str:
    """Send an image through a file with tables, where they are accepted."""
    state = _state() | deserialize(data)
    model = _load(weights=serialize(state))
    image = np.arange(20 * 70 * 3, dtype=np.uint32).astype(np.uint8).reshape(20, 70, 3)
    try:
        decoded = codec.decode(codec.encode(image, model), model)
    except CMambaError as error:  # tables that were accepted have to do
        raise UnexpectedError(f"loaded, but: {error}") from error
    return "loaded, " + _check(decoded, image.shape)


@dataclass(frozen=True)
class Target:
    """One way in which bytes from elsewhere enter the package.

    Attributes:
        share: of the trials, relative to the others: what is quick and goes deep gets more.
        errors: that `use` may raise.
        seeds: make valid inputs.
        use: do with an input what a user would, and say what it ended in; raises UnexpectedError
            where the result is not what is promised.
        mutate: an input, given others and a generator.
    """

    share: int
    errors: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]
    use: Callable[[bytes], str]
    mutate: Callable[[bytes, Sequence[bytes], Generator], bytes] = mutate_often


_REFUSED = (BitstreamError, MemoryLimitError)
_BY_PILLOW = (PillowError, UnidentifiedImageError, Image.DecompressionBombError, MemoryLimitError)
TARGETS = {
    "container": Target(4, _REFUSED, _golden_files, _decode, mutate_file),
    "header": Target(3, _REFUSED, _golden_files, _decode, _mutate_head),
    "rANS stream": Target(5, (BitstreamError,), _streams, _read_stream),
    "forged symbols": Target(1, _REFUSED, lambda: [bytes([k]) * 4 for k in range(8)], _forge),
    "tables": Target(2, (WeightsError,), _tables, _code_with_tables, _mutate_tables),
    "safetensors header": Target(
        1, (WeightsError,), lambda: [_weights_header()], _load_weights, _mutate_weights
    ),
    "config.json": Target(
        2, (WeightsError,), lambda: [_golden(CONFIG_FILE)], _load_config, _mutate_config
    ),
    "cmamba info": Target(2, (), _golden_files, _info, mutate_file),
    "Pillow": Target(2, _BY_PILLOW, _golden_files, _open_with_pillow, mutate_file),
    "photograph": Target(3, (ImageError,), _images, _read_image, _mutate_image),
}


# ---------------------------------------------------------------- trials


Input = tuple[str, bytes]  # the name of a target, and what it is given


class Trial(NamedTuple):
    """The result of one input.

    Attributes:
        outcome: "picture" and the like, or type and template of the error.
        finding: what is wrong, with a traceback if there is one; empty where all is well.
        seconds: of CPU time.
        memory: bytes by which the process grew at the most.
    """

    outcome: str
    finding: str = ""
    seconds: float = 0.0
    memory: int = 0


def attempt(inputs: Sequence[Input]) -> Iterator[Trial]:
    """Try inputs, each in the process of the one before if that is still there.

    This process must have no other threads.
    """
    left, context = list(inputs), multiprocessing.get_context("fork")  # torch is there already
    while left:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_attempt_here, args=(there, left))
        process.start()
        there.close()
        finding = f"no end within {DEADLINE} s"
        try:
            while left and here.poll(DEADLINE):
                yield here.recv()
                del left[0]
        except EOFError:
            process.join()
            code = process.exitcode or 0
            finding = f"died with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
        finally:
            process.kill()
            process.join()
            here.close()
        if left:
            yield Trial(finding, f"{finding}; stderr has a traceback")
            del left[0]


def _attempt_here(connection: Connection, inputs: Sequence[Input]) -> None:
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, chain=True)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    gc.freeze()
    for name, data in inputs:
        # Timers for each trial, and no limit for the process: that counts by the kernel's ticks,
        # which drift away from `process_time`, and would end trials that have hardly begun.
        faulthandler.dump_traceback_later(DEADLINE - 1)
        signal.setitimer(signal.ITIMER_PROF, 4 * SECONDS_LIMIT)
        resident.restart_peak()
        before, start, finding = resident.resident_bytes() or 0, time.process_time(), ""
        try:
            outcome = template(TARGETS[name].use(data))
        except Exception as error:  # noqa: BLE001  # others than the target's are the findings
            outcome = template(f"{type(error).__name__}: {error}")
            if not isinstance(error, TARGETS[name].errors):
                finding = traceback.format_exc()
        seconds = time.process_time() - start
        if seconds > SECONDS_LIMIT and not finding:
            finding = f"took {seconds:.1f} s of CPU time"
        grown = max((resident.peak_bytes() or 0) - before, 0)
        connection.send(Trial(outcome, finding, seconds, grown))
    signal.setitimer(signal.ITIMER_PROF, 0)
    faulthandler.cancel_dump_traceback_later()


def template(text: str) -> str:
    """Return a message without what differs from input to input, so that reasons are counted."""
    text = re.sub(r"""'[^']*'|"[^"]*"|\[[^\]]*\]""", "…", text)
    word = re.compile(r"[`(]*[A-Za-z][A-Za-z-]*[`);:,.]*")
    words = [w if word.fullmatch(w) else "…" for w in text.split()]
    return re.sub(r"(… )+", "… ", " ".join(words))[:90].strip()


# ---------------------------------------------------------------- a run


class Run:
    """One run: its inputs and their outcomes.

    Args:
        seed: of all that is drawn.
        findings: folder for inputs that are findings; made when there is one.
    """

    def __init__(self, seed: int, findings: Path) -> None:
        self.findings = findings
        self.outcomes = {name: Counter[str]() for name in TARGETS}
        self.examples: dict[tuple[str, str], bytes] = {}
        self.found: list[dict[str, str]] = []
        self.slowest = self.largest = 0.0, ""
        self.seeds = {name: target.seeds() for name, target in TARGETS.items()}
        self._rng = np.random.default_rng(seed)
        self._names = [name for name, target in TARGETS.items() for _ in range(target.share)]
        self._kept: dict[str, list[bytes]] = {name: [] for name in TARGETS}

    def draw(self) -> Input:
        """Draw a target, and mutate an input of it."""
        name = self._names[self._rng.integers(len(self._names))]
        seeds, kept = self.seeds[name], self._kept[name]
        chosen = kept if kept and self._rng.integers(2) else seeds
        data = chosen[self._rng.integers(len(chosen))]
        return name, TARGETS[name].mutate(data, [*seeds, *kept[-20:]], self._rng)

    def attempt(self, inputs: Sequence[Input]) -> None:
        """Try inputs; keep those whose outcome is new, and save those that are findings."""
        for (name, data), trial in zip(inputs, attempt(inputs), strict=True):
            self._note(name, data, trial)

    def _note(self, name: str, data: bytes, trial: Trial) -> None:
        key = name, trial.outcome
        if trial.outcome not in self.outcomes[name] and not trial.finding:
            self._kept[name] = [*self._kept[name], data][-MOST_KEPT:]
        self.outcomes[name][trial.outcome] += 1
        self.slowest = max(self.slowest, (round(trial.seconds, 3), ": ".join(key)))
        self.largest = max(self.largest, (trial.memory, ": ".join(key)))
        if len(data) <= min(MOST_EXAMPLE_BYTES, len(self.examples.get(key, bytes(10**6))) - 1):
            self.examples[key] = data
        if trial.finding:
            known = sum(f["target"] == name and f["outcome"] == trial.outcome for f in self.found)
            digest = hashlib.sha256(data).hexdigest()[:16]
            self.found.append({"target": name, "outcome": trial.outcome, "sha256": digest})
            if known < 5:  # of one kind a few are enough
                self.findings.mkdir(parents=True, exist_ok=True)
                stem = self.findings / f"{name.replace(' ', '-')}-{digest}"
                stem.with_suffix(".bin").write_bytes(data)
                stem.with_suffix(".txt").write_text(trial.finding)
                print(f"finding: {stem}.bin: {trial.outcome}", file=sys.stderr)

    def as_json(self) -> dict[str, object]:
        """Counts of this run."""
        return {
            "trials": sum(sum(counts.values()) for counts in self.outcomes.values()),
            "outcomes": {n: dict(counts.most_common()) for n, counts in self.outcomes.items()},
            "slowest": dict(zip(("seconds", "input"), self.slowest, strict=True)),
            "largest": dict(zip(("bytes", "input"), self.largest, strict=True)),
            "findings": self.found,
        }


def replay(paths: list[Path]) -> int:
    """Try inputs that a run has saved, and print the outcomes; 1 if one is a finding."""
    by_stem, is_wrong = {name.replace(" ", "-"): name for name in TARGETS}, False
    inputs = [(by_stem[path.stem.rpartition("-")[0]], path.read_bytes()) for path in paths]
    for path, trial in zip(paths, attempt(inputs), strict=True):
        is_wrong |= bool(trial.finding)
        print(f"{path}: {trial.outcome}, {trial.seconds:.2f} s, {trial.memory >> 20} MiB")
        print(trial.finding)
    return int(is_wrong)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, folder = parser.add_argument, Path("runs/fuzz")
    add("--minutes", type=float, default=5.0, help="how long; default: %(default)s")
    add("--trials", type=int, help="end after so many trials, if that comes first")
    add("--seed", type=int, default=0, help="of all that is drawn; default: %(default)s")
    add("-o", "--output", type=Path, help="JSON to write")
    add("--findings", type=Path, default=folder, help="folder for findings; default: %(default)s")
    add("--replay", nargs="+", type=Path, metavar="FILE", help="only try these findings again")
    add("--examples", type=Path, help="JSON to write, the smallest input of each outcome")
    arguments = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a process with other threads must not fork
    if args.replay:
        return replay(args.replay)
    run, start = Run(args.seed, args.findings), time.monotonic()
    _decode(_golden_files()[0])  # what a first call sets up is there in every process
    try:
        run.attempt([(name, data) for name, seeds in run.seeds.items() for data in seeds])
        left = sys.maxsize if args.trials is None else args.trials
        while left > 0 and time.monotonic() - start < 60 * args.minutes:
            run.attempt([run.draw() for _ in range(min(left, BATCH))])
            left -= BATCH
    except KeyboardInterrupt:
        print("interrupted; what was done is kept", file=sys.stderr)
    result = {
        "seed": args.seed,
        "minutes": round((time.monotonic() - start) / 60, 2),
        **run.as_json(),
        "limits": {"bytes": MEMORY_LIMIT, "cpu_seconds": SECONDS_LIMIT, "seconds": DEADLINE},
        "meta": provenance.of_run("fuzz.py", arguments)
        | {"versions": provenance.versions("torch", "numpy", "safetensors", "pillow")},
    }
    if args.output is not None:
        write_atomically(args.output, (json.dumps(result) + "\n").encode())
    if args.examples is not None:
        rows = [json.dumps([*key, data.hex()]) for key, data in sorted(run.examples.items())]
        write_atomically(args.examples, ("[\n" + ",\n".join(rows) + "\n]\n").encode())
    print(json.dumps({key: value for key, value in result.items() if key != "outcomes"}, indent=2))
    return 1 if run.found else 0


if __name__ == "__main__":
    sys.exit(main())

"""What `tools/fuzz.py` attacks: every way in which bytes from elsewhere enter the package.

A target has sound inputs, a way to damage one, and a way to use the result.  Using it ends in a
short text, `picture`, `model` and the like, or in one of the errors that its documentation names.
All of them work on the small model and the files in `tests/golden`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import struct
import sys
import tempfile
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError
from safetensors.torch import load as deserialize
from safetensors.torch import load_file
from safetensors.torch import save as serialize

from cmamba_ref import CMamba, MemoryLimitError, cli, codec, pillow_plugin
from cmamba_ref.codec import container
from cmamba_ref.codec.images import parse_image
from cmamba_ref.config import CMambaConfig
from cmamba_ref.entropy import latent_coder, rans
from cmamba_ref.entropy.tables import gaussian_tables, tables_from_pmfs
from cmamba_ref.errors import (
    BitstreamError,
    CMambaError,
    ImageError,
    InvalidArgumentError,
    PillowError,
    WeightsError,
)
from cmamba_ref.weights import CONFIG_FILE, WEIGHTS_FILE

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))

from codec_helpers import HEADER_BYTES, picture, with_field  # noqa: E402
from hostile_helpers import completed, damage, damage_again  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"


class UnexpectedError(Exception):
    """A target did what its documentation rules out, without an error of its own."""


@cache
def golden_model() -> CMamba:
    """The small model that made the golden files."""
    return CMamba.from_pretrained(GOLDEN / "model")


@cache
def golden_files() -> list[bytes]:
    """The golden files, sorted by name."""
    return [path.read_bytes() for path in sorted(GOLDEN.glob("*.cmb"))]


@cache
def scratch() -> Path:
    """A directory of this process, gone at its end, with a copy of the golden model."""
    folder = tempfile.TemporaryDirectory(prefix="fuzz-")
    _keep.append(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (Path(folder.name) / name).write_bytes((GOLDEN / "model" / name).read_bytes())
    return Path(folder.name)


_keep: list[tempfile.TemporaryDirectory] = []


class Target(ABC):
    """One way in.

    Attributes:
        share: trials out of `sum of all shares`: what is quick and goes deep gets more.
        errors: what `use` may raise.
    """

    share: int
    errors: tuple[type[Exception], ...]

    @abstractmethod
    def seeds(self) -> list[bytes]:
        """Sound inputs."""

    def damaged(self, data: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
        """`data` with one to four kinds of damage."""
        for _ in range(min(int(rng.geometric(0.6)), 4)):
            data = damage_again(data, others, rng)
        return data

    @abstractmethod
    def use(self, data: bytes) -> str:
        """Do with the input what a user would.

        Raises:
            UnexpectedError: the result is not what is promised.
            any of `errors`: the input is refused.
        """


class _File(Target):
    """A whole .cmb file; half of the damaged ones have a right checksum."""

    errors = (BitstreamError, MemoryLimitError)

    def seeds(self) -> list[bytes]:
        return golden_files()

    def damaged(self, data: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
        if data in golden_files():
            data = damage(data, golden_files(), int(rng.integers(6)), rng)
        if rng.integers(2):
            data = super().damaged(data, others, rng)
        return completed(data) if rng.integers(2) else data

    def use(self, data: bytes) -> str:
        image = codec.decode(data, golden_model())
        header = container.Header.unpack(data)
        shape = (header.height, header.width, *(() if header.grey else (3,)))
        if image.shape != shape or image.dtype != np.uint8:
            raise UnexpectedError(f"{image.dtype}{image.shape} where {shape} was declared")
        return "picture"


class Container(_File):
    """`decode`: the file as a whole."""

    share = 4


class Header(_File):
    """`decode`: the header and the prefix of y, the rest sound."""

    share = 3

    def damaged(self, data: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
        head, rest = data[: HEADER_BYTES + 7], data[HEADER_BYTES + 7 :]
        heads = [other[: HEADER_BYTES + 7] for other in others]
        # Mostly behind the signature and the version, which would end the matter.
        begin = 5 if rng.integers(8) else 0
        changed = damage_again(head, heads, rng, begin) + rest
        return completed(changed) if rng.integers(2) else changed


class Info(_File):
    """`cmamba info`, on a file on disk."""

    share = 2
    errors = ()

    def use(self, data: bytes) -> str:
        path = scratch() / "file.cmb"
        path.write_bytes(data)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(["info", str(path)])
        said = err.getvalue().replace(str(path), "file")
        if (code, bool(out.getvalue()), said.count("\n")) not in ((0, True, 0), (1, False, 1)):
            raise UnexpectedError(f"exit code {code}, stderr {said!r:.200}")
        return said.strip() or "described"


class Pillow(_File):
    """`Image.open` and `load`, through the plugin."""

    share = 2
    errors = (
        PillowError,
        UnidentifiedImageError,
        Image.DecompressionBombError,
        MemoryLimitError,
    )

    def use(self, data: bytes) -> str:
        pillow_plugin.use_model(golden_model())
        with Image.open(io.BytesIO(data), formats=[pillow_plugin.FORMAT]) as opened:
            declared = opened.size
            opened.load()
            shape = np.asarray(opened).shape
        if shape[:2] != declared[::-1]:
            raise UnexpectedError(f"{shape} where {declared} was declared")
        return "picture"


class Photograph(Target):
    """`read_image`: the picture that `cmamba encode` is given, in the formats that people have."""

    share = 3
    errors = (ImageError,)
    max_pixels = 1_000_000  # so that what is allowed stays far within the worker's memory

    def seeds(self) -> list[bytes]:
        colour = Image.fromarray(picture(20, 33))
        kinds = {"P": colour.quantize(40), "L": colour.convert("L"), "1": colour.convert("1")}
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        exif[ExifTags.Base.ImageDescription] = "a picture of the tests"
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] = (1, 100)
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        profile = profile[:24] + bytes(12) + profile[36:]  # the time at which it was made
        carried = {"exif": exif, "icc_profile": profile}

        def saved(image: Image.Image, kind: str, **options: object) -> bytes:
            buffer = io.BytesIO()
            image.save(buffer, kind, **options)
            return buffer.getvalue()

        return [
            saved(colour, "PNG", **carried),
            saved(kinds["P"], "PNG"),
            saved(kinds["1"], "PNG"),
            saved(colour, "JPEG", **carried),
            saved(colour, "JPEG", progressive=True, subsampling=0),
            saved(kinds["L"], "JPEG"),
            saved(colour, "WEBP", lossless=True, **carried),
            saved(colour, "WEBP"),
            saved(kinds["P"], "GIF"),
            saved(colour, "TIFF", compression="tiff_lzw", **carried),
            saved(kinds["L"], "TIFF", compression="tiff_adobe_deflate"),
            saved(colour, "TIFF"),
            saved(colour, "BMP"),
            saved(colour, "PPM"),
        ]

    def damaged(self, data: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
        data = super().damaged(data, others, rng)
        return _with_png_checksums(data) if rng.integers(2) else data

    def use(self, data: bytes) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about what it repairs
            image = parse_image(data, "file", max_pixels=self.max_pixels)
        if image.dtype != np.uint8 or image.shape[2:] not in ((), (3,)):
            raise UnexpectedError(f"{image.dtype}{image.shape}")
        if not 0 < image.shape[0] * image.shape[1] <= self.max_pixels:
            raise UnexpectedError(f"{image.shape} where {self.max_pixels} pixels are allowed")
        return "colour" if image.ndim == 3 else "grey"


def _with_png_checksums(data: bytes) -> bytes:
    """A PNG file whose chunks have their checksums made right; other files as they are."""
    position, parts = 8, [data[:8]]
    if parts[0] != b"\x89PNG\r\n\x1a\n":
        return data
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        if end + 4 > len(data):
            break
        checksum = zlib.crc32(data[position + 4 : end])
        parts += [data[position:end], struct.pack(">I", checksum)]
        position = end + 4
    return b"".join([*parts, data[position:]])


class Stream(Target):
    """`rans.Decoder`: one string, three blocks."""

    share = 5
    errors = (BitstreamError,)

    @staticmethod
    @cache
    def _blocks() -> list[tuple[np.ndarray, np.ndarray]]:
        """Symbols and table indexes, some of the symbols far outside their tables."""
        rng = np.random.default_rng(7)
        blocks = []
        for count in (10, 300, 40):
            indexes = rng.integers(0, 64, count)
            symbols = np.rint(rng.standard_t(2, count) * np.exp(indexes / 12)).astype(np.int64)
            symbols[::17] = rng.integers(-(2**31), 2**31, len(symbols[::17]))
            blocks.append((symbols, indexes))
        return blocks

    @staticmethod
    def _tables():
        return golden_model().gaussian_conditional.stored.tables()

    def seeds(self) -> list[bytes]:
        return [rans.encode(self._tables(), self._blocks(), lanes) for lanes in (1, 2, 5, 64, 256)]

    def use(self, data: bytes) -> str:
        decoder = rans.Decoder(self._tables(), data)
        for _, indexes in self._blocks():
            symbols = decoder.take(indexes)
            if symbols.shape != indexes.shape or symbols.dtype != np.int32:
                raise UnexpectedError(f"{symbols.dtype}{symbols.shape}")
        decoder.finish()
        return "symbols"


class Weights(Target):
    """`from_pretrained`: the header of model.safetensors, the values behind it sound."""

    share = 1
    errors = (WeightsError,)

    def seeds(self) -> list[bytes]:
        return [self._whole()[: self._body()]]

    @staticmethod
    @cache
    def _whole() -> bytes:
        return (GOLDEN / "model" / WEIGHTS_FILE).read_bytes()

    @classmethod
    def _body(cls) -> int:
        """Where the values begin: behind a length of 8 bytes and so much JSON."""
        return 8 + int.from_bytes(cls._whole()[:8], "little")

    def damaged(self, data: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
        if rng.integers(2):
            data = _other_number(data, rng)
        if rng.integers(2):
            data = super().damaged(data, others, rng)
        if rng.integers(2) and len(data) >= 8:  # the length made right
            data = (len(data) - 8).to_bytes(8, "little") + data[8:]
        return data

    def use(self, data: bytes) -> str:
        _model(weights=data + self._whole()[self._body() :])
        return "model"


class Config(Target):
    """`from_pretrained`: config.json, the weights beside it sound."""

    share = 2
    errors = (WeightsError,)

    def seeds(self) -> list[bytes]:
        return [(GOLDEN / "model" / CONFIG_FILE).read_bytes()]

    def damaged(self, data: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
        kind = rng.integers(3)
        if kind == 0:
            return super().damaged(data, others, rng)
        if kind == 1:
            return _other_number(data, rng)
        values = json.loads(self.seeds()[0])
        for _ in range(int(rng.integers(1, 3))):
            key = _KEYS[rng.integers(len(_KEYS))]
            chosen = copy.deepcopy(_VALUES[rng.integers(len(_VALUES))])  # lists are changed below
            if isinstance(values.get(key), list) and values[key] and rng.integers(2):
                values[key][rng.integers(len(values[key]))] = chosen
            else:
                values[key] = chosen
        return json.dumps(values).encode()

    def use(self, data: bytes) -> str:
        _model(config=data)
        return "model"


# All keys that a configuration may have, those left out at their defaults among them.
_KEYS = tuple(f.name for f in fields(CMambaConfig))
# What a configuration may hold where something else belongs.
_VALUES: tuple[object, ...] = (
    None, True, False, 0, 1, 2, 3, -1, 8, 16, 17, 1024, 65_536, 65_537, 2**31, 2**63, 10**40, 0.5,
    1e-300, 1e300, float("nan"), float("inf"), "", "8", "a" * 1000, [], {}, [8, 8, 16], [[8]] * 3,
    [0, 0, 0], [1, 1, 1], [1024] * 3, [65_536] * 3, [0.01, 0.02], [0.01] * 655, [1e308] * 8,
    [True] * 3, ["x"] * 2, {"a": 1}, "haar", [1, 15], [1] * 16,
)  # fmt: skip


def _other_number(data: bytes, rng: np.random.Generator) -> bytes:
    """Text with one of its numbers replaced by another one."""
    digits = np.frombuffer(data, np.uint8)
    inside = (digits >= ord("0")) & (digits <= ord("9"))
    begins = np.flatnonzero(np.diff(inside, prepend=False) & inside)
    if not begins.size:
        return data
    begin = int(rng.choice(begins))
    end = begin
    while end < len(data) and inside[end]:
        end += 1
    number = int(data[begin:end]) if end - begin < 1000 else 0
    others = (0, 1, number + 1, number - 1, 2 * number, -number, 2**31, 2**63, 2**64, 10**50)
    return data[:begin] + str(others[rng.integers(len(others))]).encode() + data[end:]


class Tables(Target):
    """`from_pretrained` and the coder: integer tables of other values and lengths.

    An input is the table section of a model.safetensors; where its tables are accepted, a picture
    goes through a file with them.
    """

    share = 2
    errors = (WeightsError,)

    @staticmethod
    @cache
    def _state() -> dict[str, torch.Tensor]:
        return load_file(GOLDEN / "model" / WEIGHTS_FILE)

    def seeds(self) -> list[bytes]:
        """The real tables, and short ones, in which damage hits more often."""
        real = {name: t for name, t in self._state().items() if ".stored." in name}
        channels = golden_model().config.hyper_widths[-1]
        short = {}
        for part, tables in (
            ("gaussian_conditional", gaussian_tables([0.11] * 64)),
            ("entropy_bottleneck", tables_from_pmfs([(-1, [0.2, 0.5], 0.3)] * channels)),
        ):
            for name in ("cdf", "starts", "offsets"):
                short[f"{part}.stored.{name}"] = torch.from_numpy(getattr(tables, name))
        return [serialize(real), serialize(short)]

    def damaged(self, data: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
        tensors = {name: t.numpy() for name, t in deserialize(data).items()}
        names = sorted(tensors)  # safetensors gives them in any order
        for _ in range(int(rng.integers(1, 4))):
            name = names[rng.integers(len(names))]
            tensors[name] = _other_integers(tensors[name], rng)
        return serialize({name: torch.from_numpy(array) for name, array in tensors.items()})

    def use(self, data: bytes) -> str:
        state = self._state() | deserialize(data)
        model = _model(weights=serialize(state))
        image = picture(20, 70)
        try:
            decoded = codec.decode(codec.encode(image, model), model)
        except CMambaError as error:  # tables that were accepted have to do
            raise UnexpectedError(f"loaded, but: {error}") from error
        if decoded.shape != image.shape:
            raise UnexpectedError(f"{decoded.shape} where {image.shape} was encoded")
        return "loaded, picture"


def _other_integers(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An int32 array `[n]` with elements changed, put in or taken out."""
    kind, array = rng.integers(8), array.copy()
    if kind == 0 or not array.size:
        return np.insert(array, int(rng.integers(array.size + 1)), int(rng.integers(-2, 65_540)))
    place = int(rng.integers(array.size))
    if kind == 1:
        return np.delete(array, place)
    if kind < 5:
        values = [0, 1, -1, 65_535, 65_536, 2**31 - 1, -(2**31), int(array[place - 1])]
        array[place] = values[rng.integers(len(values))]
    else:
        array[place] = np.clip(int(array[place]) + int(rng.integers(-3, 4)), -(2**31), 2**31 - 1)
    return array


class Forged(Target):
    """`decode`: files that a program wrote to do harm, sound but for what they say.

    Their symbols are any that int32 holds, and coded as the context model then demands.  An input
    is what the symbols are drawn from.
    """

    share = 1
    errors = (BitstreamError,)

    def seeds(self) -> list[bytes]:
        return [bytes([k]) * 4 for k in range(8)]

    def use(self, data: bytes) -> str:
        rng = np.random.default_rng(list(data))
        magnitude = 2.0 ** rng.uniform(0, 31)
        part = rng.choice([0.001, 0.1, 1.0])

        def wild(values: torch.Tensor, name: str) -> torch.Tensor:
            symbols = torch.round(values)
            drawn = torch.from_numpy(np.rint(rng.uniform(-magnitude, magnitude, symbols.shape)))
            chosen = torch.from_numpy(rng.random(symbols.shape) < part)
            return torch.where(chosen, drawn, symbols)

        image = picture(int(rng.integers(1, 140)), int(rng.integers(1, 140)))
        try:
            with mock.patch.object(latent_coder, "_to_symbols", wild):
                coded = codec.encode(image, golden_model(), float(rng.uniform(1, 8)))
        except (BitstreamError, InvalidArgumentError):
            raise
        except CMambaError as error:
            return f"no file: {error}"
        if rng.integers(2):
            coded = with_field(coded, "quality", int(rng.integers(100, 801)))
        decoded = codec.decode(coded, golden_model())
        if decoded.shape != image.shape:
            raise UnexpectedError(f"{decoded.shape} where {image.shape} was declared")
        return "picture"


def _model(config: bytes | None = None, weights: bytes | None = None) -> CMamba:
    """The golden model with another configuration or other weights, loaded from disk."""
    for file, data in ((CONFIG_FILE, config), (WEIGHTS_FILE, weights)):
        sound = (GOLDEN / "model" / file).read_bytes()
        (scratch() / file).write_bytes(sound if data is None else data)
    return CMamba.from_pretrained(scratch())


TARGETS: dict[str, Target] = {
    "container": Container(),
    "header": Header(),
    "rANS stream": Stream(),
    "forged symbols": Forged(),
    "tables": Tables(),
    "safetensors header": Weights(),
    "config.json": Config(),
    "cmamba info": Info(),
    "Pillow": Pillow(),
    "photograph": Photograph(),
}

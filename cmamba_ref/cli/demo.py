"""The demo: one image through CMamba, and the sizes of other codecs at the same PSNR."""

from __future__ import annotations

import functools
import io
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.codec import decode, encode
from cmamba_ref.codec.container import Container
from cmamba_ref.codec.images import read_image
from cmamba_ref.codec.output import write_png
from cmamba_ref.entropy.latent_prefix import QUALITY_UNITS, unpack_latent
from cmamba_ref.metrics import bits_per_pixel, ms_ssim, psnr
from cmamba_ref.model import CMamba

DEMO_IMAGE = Path(__file__).parents[1] / "data" / "coffee.png"
CREDIT = "Rachel Michetti, courtesy of Pikolo Espresso Bar, CC0"


@dataclass(frozen=True)
class BaselineCodec:
    """A codec that Pillow writes and reads, to compare ours with.

    Attributes:
        name: what readers call it.
        format: Pillow's name of it.
        options: Pillow's options at a quality.
    """

    name: str
    format: str
    options: Callable[[float], dict[str, object]]

    def is_available(self) -> bool:
        """Return whether this build of Pillow can write and read it."""
        Image.init()  # registers the formats that there are
        return self.format in Image.SAVE and self.format in Image.OPEN

    def encode(self, image: np.ndarray, quality: float) -> bytes:
        """Return the bytes of a file of a uint8 image `[H, W, 3]`."""
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, self.format, **self.options(quality))
        return buffer.getvalue()

    def decode(self, data: bytes) -> np.ndarray:
        """Return the image in such a file, uint8 `[H, W, 3]`."""
        with Image.open(io.BytesIO(data), formats=[self.format]) as image:
            return np.array(image.convert("RGB"))


BASELINES = (
    BaselineCodec(
        "JPEG",
        "JPEG",
        lambda quality: {"quality": quality, "subsampling": "4:2:0", "optimize": True},
    ),
    BaselineCodec("WebP", "WEBP", lambda quality: {"quality": quality, "method": 6}),
    # Speed 4 saves a few per cent more, at four times the time.
    BaselineCodec(
        "AVIF",
        "AVIF",
        lambda quality: {"quality": quality, "subsampling": "4:2:0", "speed": 6},
    ),
)
QUALITIES = range(1, 101)


def run(
    model: CMamba,
    quality: float | None,
    encoded: Path,
    decoded: Path,
    begin: Callable[[str], None],
) -> str:
    """Encode the bundled image into `encoded`, decode that file into `decoded`, and report in text.

    Args:
        quality: as for `cmamba_ref.encode`.
        begin: callback, called with the name of each stage.
    """
    original = read_image(DEMO_IMAGE)

    begin("encoding")
    start = time.perf_counter()
    data = encode(original, model, quality)
    encoding = time.perf_counter() - start
    write_atomically(encoded, data)

    begin("decoding")
    stored = encoded.read_bytes()
    start = time.perf_counter()
    image = decode(stored, model)
    decoding = time.perf_counter() - start
    write_png(decoded, image)

    begin("comparing")
    wanted = psnr(original, image)
    baselines = [baseline_line(codec, original, wanted, len(data)) for codec in BASELINES]
    height, width = original.shape[:2]
    megapixels = width * height / 1e6
    used, _ = unpack_latent(Container.unpack(data).y)
    setting = f" quality {used.quality / QUALITY_UNITS:g}" if used.quality else ""
    return "\n".join(
        [
            f"{DEMO_IMAGE.name}, {width}x{height} ({CREDIT}), model {model.config.name!r}",
            "",
            f"{'':<20}{'bytes':>8}{'bpp':>8}{'PSNR/dB':>9}{'MS-SSIM':>9}{'bytes/CMamba':>14}",
            _line("CMamba" + setting, original, data, image, len(data)),
            *baselines,
            "",
            f"Each baseline is at its lowest quality with a PSNR of at least {wanted:.2f} dB: JPEG",
            "with optimised tables, WebP with method 6, AVIF with speed 6; all of them in 4:2:0.",
            f"CMamba: encoded in {encoding:.2f} s ({megapixels / encoding:.2f} megapixels/s), "
            f"decoded in {decoding:.2f} s ({megapixels / decoding:.2f} megapixels/s).",
        ]
    )


def match(codec: BaselineCodec, original: np.ndarray, wanted: float) -> tuple[int, bytes] | None:
    """Return the lowest quality with a PSNR of at least `wanted` and its file, or None.

    By bisection: PSNR rises with quality, apart from wiggles of hundredths of a dB.
    """

    encode = functools.cache(functools.partial(codec.encode, original))

    def reached(quality: int) -> float:
        return psnr(original, codec.decode(encode(quality)))

    k = bisect_left(QUALITIES, wanted, key=reached)
    return (QUALITIES[k], encode(QUALITIES[k])) if k < len(QUALITIES) else None


def baseline_line(codec: BaselineCodec, original: np.ndarray, wanted: float, ours: int) -> str:
    """Return the line on a codec at the PSNR of our file, which takes `ours` bytes."""
    if not codec.is_available():
        return f"{codec.name:<20}not compared: this Pillow cannot write it"
    found = match(codec, original, wanted)
    if found is None:
        return f"{codec.name:<20}does not reach {wanted:.2f} dB even at quality {QUALITIES[-1]}"
    quality, data = found
    return _line(f"{codec.name} quality {quality}", original, data, codec.decode(data), ours)


def _line(name: str, original: np.ndarray, data: bytes, image: np.ndarray, ours: int) -> str:
    height, width = original.shape[:2]
    rate = bits_per_pixel(len(data), width, height)
    return (
        f"{name:<20}{len(data):>8}{rate:>8.3f}{psnr(original, image):>9.2f}"
        f"{ms_ssim(original, image):>9.4f}{len(data) / ours:>14.2f}"
    )

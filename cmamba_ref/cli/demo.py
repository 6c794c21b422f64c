"""The demo: one image through CMamba, and the sizes of other codecs at the same PSNR."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.codec import decode, encode
from cmamba_ref.codec.container import Container
from cmamba_ref.codec.images import read_image, write_png
from cmamba_ref.entropy.latent_prefix import QUALITY_UNITS, unpack_latent
from cmamba_ref.metrics import bits_per_pixel, ms_ssim, psnr
from cmamba_ref.model import CMamba

PHOTOGRAPH = Path(__file__).parents[1] / "data" / "coffee.png"
CREDIT = "Rachel Michetti, courtesy of Pikolo Espresso Bar, CC0"


@dataclass(frozen=True)
class Rival:
    """A codec that Pillow writes, and the settings beside its quality."""

    name: str
    options: dict[str, object] = field(default_factory=dict)

    def encode(self, image: np.ndarray, quality: int) -> bytes:
        """Return the bytes of a file of a uint8 image `[H, W, 3]`."""
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, self.name.upper(), quality=quality, **self.options)
        return buffer.getvalue()


JPEG = Rival("JPEG", {"subsampling": "4:2:0", "optimize": True})
RIVALS = (
    JPEG,
    Rival("WebP", {"method": 6}),
    # Speed 4 saves a few per cent more, at four times the time.
    Rival("AVIF", {"subsampling": "4:2:0", "speed": 6}),
)
QUALITIES = range(1, 101)


@dataclass(frozen=True)
class Match:
    """A rival's file that reaches the wanted PSNR, and the image in it."""

    quality: int
    data: bytes
    image: np.ndarray


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
    original = read_image(PHOTOGRAPH)

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
    rivals = [_rival_line(rival, original, wanted, len(data)) for rival in RIVALS]
    height, width = original.shape[:2]
    megapixels = width * height / 1e6
    used, _ = unpack_latent(Container.unpack(data).y)
    setting = f" quality {used.quality / QUALITY_UNITS:g}" if used.quality else ""
    return "\n".join(
        [
            f"{PHOTOGRAPH.name}, {width}x{height} ({CREDIT}), model {model.config.name!r}",
            "",
            f"{'':<20}{'bytes':>8}{'bpp':>8}{'PSNR/dB':>9}{'MS-SSIM':>9}{'bytes/CMamba':>14}",
            _line("CMamba" + setting, original, data, image, len(data)),
            *rivals,
            "",
            f"Each rival is at its lowest quality with a PSNR of at least {wanted:.2f} dB: JPEG",
            "with optimised tables, WebP with method 6, AVIF with speed 6; all of them in 4:2:0.",
            f"CMamba: encoded in {encoding:.2f} s ({megapixels / encoding:.2f} megapixels/s), "
            f"decoded in {decoding:.2f} s ({megapixels / decoding:.2f} megapixels/s).",
        ]
    )


def match(rival: Rival, original: np.ndarray, wanted: float) -> Match | None:
    """Return the rival at its lowest quality with a PSNR of at least `wanted`; None if none has it.

    By bisection: PSNR rises with quality, apart from wiggles of hundredths of a dB.
    """
    low, high = QUALITIES[0], QUALITIES[-1]
    found = None
    while low <= high:
        middle = (low + high) // 2
        candidate = _try(rival, original, middle)
        if psnr(original, candidate.image) >= wanted:
            found, high = candidate, middle - 1
        else:
            low = middle + 1
    return found


def _try(rival: Rival, original: np.ndarray, quality: int) -> Match:
    data = rival.encode(original, quality)
    with Image.open(io.BytesIO(data)) as image:
        return Match(quality, data, np.array(image.convert("RGB")))


def _rival_line(rival: Rival, original: np.ndarray, wanted: float, ours: int) -> str:
    Image.init()  # registers the formats that this build of Pillow has
    if rival.name.upper() not in Image.SAVE:
        return f"{rival.name:<20}not compared: this Pillow cannot write it"
    found = match(rival, original, wanted)
    if found is None:
        return f"{rival.name:<20}does not reach {wanted:.2f} dB even at quality {QUALITIES[-1]}"
    name = f"{rival.name} quality {found.quality}"
    return _line(name, original, found.data, found.image, ours)


def _line(name: str, original: np.ndarray, data: bytes, image: np.ndarray, ours: int) -> str:
    height, width = original.shape[:2]
    rate = bits_per_pixel(len(data), width, height)
    return (
        f"{name:<20}{len(data):>8}{rate:>8.3f}{psnr(original, image):>9.2f}"
        f"{ms_ssim(original, image):>9.4f}{len(data) / ours:>14.2f}"
    )

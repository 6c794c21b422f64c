"""The classical codecs that a learned one is held against, as Pillow writes and reads them.

Which of them there are depends on how Pillow was built; `is_available` says so.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, features


@dataclass(frozen=True)
class ClassicalCodec:
    """A codec and the settings with which it is run.

    Attributes:
        key: what results call it.
        name: what readers call it, with what is fixed.
        format: Pillow's name of it.
        suffix: of its files.
        library: Pillow's name of the library that does the work, for its version.
        settings: the points of its curve, from small files to large ones.
        options: Pillow's options for one of them.
    """

    key: str
    name: str
    format: str
    suffix: str
    library: str
    settings: tuple[float, ...]
    options: Callable[[float], dict[str, object]]

    def is_available(self) -> bool:
        """Whether this Pillow can write and read it."""
        Image.init()  # registers the formats that there are
        return self.format in Image.SAVE and self.format in Image.OPEN

    def version(self) -> str:
        """Name and version of the library; the version of Pillow itself is not in it."""
        return f"{self.library} {features.version(self.library)}"

    def encode(self, picture: np.ndarray, setting: float) -> bytes:
        """The bytes of a file of a uint8 picture `[H, W, 3]`."""
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, self.format, **self.options(setting))
        return buffer.getvalue()

    def decode(self, data: bytes) -> np.ndarray:
        """The picture in such a file, uint8 `[H, W, 3]`."""
        with Image.open(io.BytesIO(data), formats=[self.format]) as image:
            return np.array(image.convert("RGB"))


def _jpeg(subsampling: str) -> Callable[[float], dict[str, object]]:
    return lambda quality: {"quality": quality, "subsampling": subsampling, "optimize": True}


def _webp(quality: float) -> dict[str, object]:
    return {"quality": quality, "method": 6}  # the slowest, and the smallest files


def _jpeg2000(bpp: float) -> dict[str, object]:
    # Layers are asked for by the ratio to 24 bits.  Without the colour transform, which Pillow
    # leaves out unless asked, PSNR on Kodak is 3 dB lower.
    return {
        "quality_mode": "rates",
        "quality_layers": [24 / bpp],
        "irreversible": True,
        "mct": 1,
    }


def _avif(quality: float) -> dict[str, object]:
    # By default libaom is tuned for how pictures look, at the cost of PSNR.
    return {
        "quality": int(quality),
        "subsampling": "4:4:4",
        "speed": 4,
        "advanced": {"tune": "psnr"},
    }


CODECS = {
    codec.key: codec
    for codec in (
        ClassicalCodec(
            f"jpeg{subsampling.replace(':', '')}", f"JPEG {subsampling}, optimised tables", "JPEG",
            ".jpg", "libjpeg_turbo", (5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95),
            _jpeg(subsampling),
        )
        for subsampling in ("4:2:0", "4:4:4")
    )
} | {
    codec.key: codec
    for codec in (
        ClassicalCodec(
            "webp", "WebP, method 6", "WEBP", ".webp", "webp",
            (1, 5, 10, 20, 35, 50, 65, 80, 90), _webp,
        ),
        ClassicalCodec(
            "jpeg2000", "JPEG 2000, irreversible", "JPEG2000", ".jp2", "jpg_2000",
            (0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0), _jpeg2000,
        ),
        ClassicalCodec(
            "avif", "AVIF 4:4:4, speed 4, tune psnr", "AVIF", ".avif", "avif",
            (10, 20, 30, 40, 50, 60, 70), _avif,
        ),
    )
}  # fmt: skip

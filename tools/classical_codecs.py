"""The classical codecs that a learned one is compared with, as Pillow writes and reads them.

Which of them there are depends on how Pillow was built; `is_available` says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import features

from cmamba_ref.cli.demo import BaselineCodec


@dataclass(frozen=True)
class ClassicalCodec(BaselineCodec):
    """A codec and the settings with which it is run.

    Attributes:
        suffix: of its files.
        library: Pillow's name of the library that does the work, for its version.
        settings: the points of its curve, from small files to large ones.
    """

    suffix: str
    library: str
    settings: tuple[float, ...]

    def version(self) -> str:
        """Name and version of the library in Pillow, without the version of Pillow itself."""
        return f"Pillow, {self.library} {features.version(self.library)}"


def _jpeg(subsampling: str) -> ClassicalCodec:
    return ClassicalCodec(
        f"JPEG {subsampling}, optimised tables",
        "JPEG",
        lambda quality: {"quality": quality, "subsampling": subsampling, "optimize": True},
        ".jpg",
        "libjpeg_turbo",
        (5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95),
    )


def _jpeg2000(bpp: float) -> dict[str, object]:
    # Layers are asked for by the ratio to 24 bits. Without the colour transform, which Pillow
    # leaves out unless asked, PSNR on Kodak is 3 dB lower.
    return {
        "quality_mode": "rates",
        "quality_layers": [24 / bpp],
        "irreversible": True,
        "mct": 1,
    }


def _avif_by_default(quality: float) -> dict[str, object]:
    return {"quality": int(quality), "subsampling": "4:4:4", "speed": 4}


def _avif(quality: float) -> dict[str, object]:
    # By default libaom is tuned for how images look, at the cost of PSNR.
    return _avif_by_default(quality) | {"advanced": {"tune": "psnr"}}


# By the names that results give them.
CODECS = {
    "jpeg420": _jpeg("4:2:0"),
    "jpeg444": _jpeg("4:4:4"),
    "webp": ClassicalCodec(
        "WebP, method 6",
        "WEBP",
        lambda quality: {"quality": quality, "method": 6},  # the slowest, and the smallest files
        ".webp",
        "webp",
        (1, 5, 10, 20, 35, 50, 65, 80, 90),
    ),
    "jpeg2000": ClassicalCodec(
        "JPEG 2000, irreversible",
        "JPEG2000",
        _jpeg2000,
        ".jp2",
        "jpg_2000",
        (0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0),
    ),
    "avif": ClassicalCodec(
        "AVIF 4:4:4, speed 4, tune psnr",
        "AVIF",
        _avif,
        ".avif",
        "avif",
        (10, 20, 30, 40, 50, 60, 70),
    ),
    "avif-default": ClassicalCodec(
        "AVIF 4:4:4 tuned as by default, speed 4",
        "AVIF",
        _avif_by_default,
        ".avif",
        "avif",
        (10, 20, 30, 40, 50, 60, 70, 80),
    ),
}

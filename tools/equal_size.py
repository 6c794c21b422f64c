"""One picture through our codec and through classical ones, at about the size of our file.

A classical codec has whole qualities, so its file is seldom of exactly the wanted size: the quality
taken is the one whose file is nearest, and the size is reported as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from classical_codecs import CODECS, ClassicalCodec

import cmamba_ref
from cmamba_ref import CMamba
from cmamba_ref.metrics import MS_SSIM_MIN_SIDE, bits_per_pixel, ms_ssim, psnr

QUALITIES = range(1, 101)
# Those whose settings are such qualities.
RIVALS = ("jpeg420", "jpeg444", "webp", "avif")


@dataclass(frozen=True)
class Version:
    """A picture as one codec gives it back; all measures are of the whole picture.

    Attributes:
        name: the codec and its quality.
        picture: uint8 `[H, W, 3]`.
        size: bytes of the file.
        bpp: of the file, header included.
        psnr: in dB.
        ms_ssim: linear; None where the picture is too small for it.
    """

    name: str
    picture: np.ndarray
    size: int
    bpp: float
    psnr: float
    ms_ssim: float | None


def our_version(model: CMamba, original: np.ndarray, quality: float | None) -> Version:
    """The original through our codec; `quality` as `CMamba.check_quality` gives it."""
    data = cmamba_ref.encode(original, model, quality)
    setting = "" if quality is None else f", quality {quality:g}"
    name = f"CMamba {model.config.name}{setting}"
    return _version(name, original, data, cmamba_ref.decode(data, model))


def rival_version(key: str, original: np.ndarray, size: int) -> Version:
    """The original through a classical codec, in a file of about so many bytes."""
    codec = CODECS[key]
    quality, data = nearest_file(codec, original, size)
    return _version(f"{codec.name}, quality {quality}", original, data, codec.decode(data))


def nearest_file(codec: ClassicalCodec, original: np.ndarray, size: int) -> tuple[int, bytes]:
    """The quality whose file is nearest to `size` bytes, and that file.

    By bisection, as files grow with quality.  Of two that are as near, the smaller.
    """
    files: dict[int, bytes] = {}
    low, high = QUALITIES[0], QUALITIES[-1]
    while low <= high:
        middle = (low + high) // 2
        files[middle] = codec.encode(original, middle)
        if len(files[middle]) < size:
            low = middle + 1
        else:
            high = middle - 1
    # The last file below the size and the first one above have both been made on the way.
    return min(files.items(), key=lambda item: (abs(len(item[1]) - size), item[0]))


def versions_of(
    model: CMamba,
    original: np.ndarray,
    quality: float | None,
    rivals: tuple[str, ...],
    begin: Callable[[str], None],
) -> list[Version]:
    """Ours, then each rival's at about the size of ours.

    Args:
        begin: is told the key of each codec before its turn, "cmamba" for ours.
    """
    begin("cmamba")
    versions = [our_version(model, original, quality)]
    for key in rivals:
        begin(key)
        versions.append(rival_version(key, original, versions[0].size))
    return versions


def _version(name: str, original: np.ndarray, data: bytes, picture: np.ndarray) -> Version:
    height, width = original.shape[:2]
    is_large = min(height, width) >= MS_SSIM_MIN_SIDE
    return Version(
        name=name,
        picture=picture,
        size=len(data),
        bpp=bits_per_pixel(len(data), width, height),
        psnr=psnr(original, picture),
        ms_ssim=ms_ssim(original, picture) if is_large else None,
    )

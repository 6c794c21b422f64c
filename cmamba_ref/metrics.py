"""Rate, PSNR and MS-SSIM as the field reports them: of whole files and on 8-bit images.

Only MS-SSIM needs torch, and imports it itself: a command that prints a rate need not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from cmamba_ref.errors import InvalidArgumentError

if TYPE_CHECKING:
    import torch

# pytorch-msssim halves the image four times under an 11-pixel window.
MS_SSIM_MIN_SIDE = 161


def bits_per_pixel(file_bytes: int, width: int, height: int) -> float:
    """The rate of a file, its header included."""
    return 8 * file_bytes / (width * height)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images of one shape, in dB (inf if identical)."""
    _check_pair(a, b)
    mse = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return math.inf if mse == 0 else float(10 * np.log10(255.0**2 / mse))


def ms_ssim(a: np.ndarray, b: np.ndarray, device: torch.device | str = "cpu") -> float:
    """Multi-scale structural similarity of two uint8 images `[H, W, C]`, linear, 0...1.

    Args:
        device: computes it, in float64.

    Raises:
        InvalidArgumentError: a side is shorter than 161 pixels, where five scales do not fit.
    """
    import torch
    from pytorch_msssim import ms_ssim as ms_ssim_tensor

    _check_pair(a, b)
    if a.ndim != 3 or min(a.shape[:2]) < MS_SSIM_MIN_SIDE:
        raise InvalidArgumentError(
            f"`a` must be [H, W, C] with sides of at least {MS_SSIM_MIN_SIDE}, got "
            f"{list(a.shape)}; MS-SSIM is not defined for smaller images"
        )
    x, y = (torch.from_numpy(p).to(device).permute(2, 0, 1)[None].double() for p in (a, b))
    return float(ms_ssim_tensor(x, y, data_range=255.0))


def _check_pair(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise InvalidArgumentError(
            f"`a` and `b` must be uint8 images of one shape, got {a.dtype}{list(a.shape)} and "
            f"{b.dtype}{list(b.shape)}; round and clip to 0...255 first"
        )

"""Entropy tables fitted to the symbols of images, in the place of Gaussian ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from cmamba_ref.entropy.gaussian import LOG_SCALE_MAX, SCALE_LEVELS, scale_index
from cmamba_ref.model import CMamba

# Magnitudes that are told apart: twice as far as the widest Gaussian table reaches.
MAGNITUDES = round(2 * 4.4 * np.exp(LOG_SCALE_MAX))


def count_symbols(
    model: CMamba, images: Iterable[np.ndarray], qualities: Sequence[float | None]
) -> np.ndarray:
    """Count the symbols of y by table and magnitude, as `GaussianConditional.fit` takes them.

    Args:
        model: in eval mode.
        images: uint8 `[H, W, 3]`, each analysed at once.
        qualities: at which each image is analysed.

    Returns:
        counts, int64 `[64, MAGNITUDES + 1]`.
    """
    counts = np.zeros((SCALE_LEVELS, MAGNITUDES + 1), dtype=np.int64)
    for image in images:
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        for quality in qualities:
            symbols = model.latent_symbols(x, quality)
            for values, log_scale in zip(symbols.y, symbols.log_scales, strict=True):
                # The shift that a file chooses moves boundaries by 0.004 of a level at most.
                level = scale_index(log_scale, 0)
                magnitude = values.abs().clamp(max=MAGNITUDES).long()
                cell = (level * counts.shape[1] + magnitude).flatten().cpu().numpy()
                counts += np.bincount(cell, minlength=counts.size).reshape(counts.shape)
    return counts

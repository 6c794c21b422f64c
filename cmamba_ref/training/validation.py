"""Rate and distortion of held-out images."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cmamba_ref import codec
from cmamba_ref.codec.output import write_png
from cmamba_ref.metrics import MS_SSIM_MIN_SIDE, bits_per_pixel, ms_ssim, psnr
from cmamba_ref.model import CMamba
from cmamba_ref.training.distributed import Group
from cmamba_ref.training.objective import objective
from cmamba_ref.training.settings import Settings

logger = logging.getLogger(__name__)

# Of a variable-rate model, those of these that it has, and its best.
QUALITIES = (1.0, 3.0, 5.0, 8.0)


def qualities_of(model: CMamba) -> list[float | None]:
    """The qualities that are measured; None stands for the one rate of a model."""
    if model.gain is None:
        return [None]
    top = float(len(model.config.lmbdas))
    return [*sorted({*(q for q in QUALITIES if q <= top), top})]


@torch.no_grad()
def validate(
    model: CMamba,
    crops: Sequence[np.ndarray],
    settings: Settings,
    group: Group,
    *,
    coded: bool = False,
    samples: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Means over crops, for each quality; each process measures its part of the crops.

    Args:
        model: in eval mode, and with tables if `coded`.
        crops: uint8 `[H, W, 3]`.
        coded: code every crop to a file's bytes and back.
        samples: where to write the first crops and what the model makes of them, as PNG; None: do
            not.

    Returns:
        for each quality: `loss` (weighted as in training), `bpp` by the model's own estimate, and
        `psnr` and, of crops large enough, `ms_ssim` of 8-bit images.  If coded, `file_bpp`, the
        size of files with their headers, and `file_psnr`, of decoded ones.
    """
    results = {}
    for quality in qualities_of(model):
        rows = []
        for number in range(group.rank, len(crops), group.size):
            image = crops[number]
            row, decoded = _measure(model, image, quality, settings, coded)
            rows.append(row)
            if samples is not None and number < settings.samples:
                samples.mkdir(parents=True, exist_ok=True)
                rate = "" if quality is None else f"-quality-{quality:g}"
                write_png(samples / f"{number}{rate}.png", decoded)
                write_png(samples / f"{number}-original.png", image)
        results[str(quality)] = _means(rows, group)
    return results


def mean_loss(results: dict[str, dict[str, float]]) -> float:
    """One number to compare validations by: the mean loss over qualities."""
    return float(np.mean([measures["loss"] for measures in results.values()]))


def _measure(
    model: CMamba, image: np.ndarray, quality: float | None, settings: Settings, coded: bool
) -> tuple[dict[str, float], np.ndarray]:
    """All measures of one crop, and the crop as a decoder gives it."""
    device = next(model.parameters()).device
    x = torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float() / 255
    qualities = None if quality is None else torch.tensor([quality], device=device)
    output = model(x, qualities)
    levels = (output["x_hat"].clamp(0, 1) * 255).round()  # what is written is what counts
    losses = objective(model, {**output, "x_hat": levels / 255}, x, qualities, settings)
    reconstruction = levels[0].to("cpu", torch.uint8).permute(1, 2, 0).numpy()
    row = {
        "loss": float(losses["loss"]),
        "bpp": float(losses["bpp"]),
        "psnr": psnr(image, reconstruction),
    }
    if min(image.shape[:2]) >= MS_SSIM_MIN_SIDE and can_measure_ms_ssim():
        row["ms_ssim"] = ms_ssim(image, reconstruction, device)
    if coded:
        data = codec.encode(image, model, quality)
        reconstruction = codec.decode(data, model)
        row["file_bpp"] = bits_per_pixel(len(data), image.shape[1], image.shape[0])
        row["file_psnr"] = psnr(image, reconstruction)
    return row, reconstruction


@functools.cache
def can_measure_ms_ssim() -> bool:
    """Return whether pytorch-msssim is installed; say so once if it is not."""
    installed = importlib.util.find_spec("pytorch_msssim") is not None
    if not installed:
        logger.warning("validations leave out MS-SSIM: pytorch-msssim is not installed")
    return installed


def _means(rows: list[dict[str, float]], group: Group) -> dict[str, float]:
    """Mean of each measure over the crops of all processes."""
    names = ("loss", "bpp", "psnr", "ms_ssim", "file_bpp", "file_psnr")
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    for i, name in enumerate(names):
        values = [row[name] for row in rows if name in row]
        sums[i] = torch.tensor([sum(values), len(values)], dtype=torch.float64)
    totals = group.sum(sums).tolist()
    return {name: total / n for name, (total, n) in zip(names, totals, strict=True) if n}

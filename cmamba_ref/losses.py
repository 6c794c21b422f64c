"""The rate-distortion loss."""

from __future__ import annotations

import torch
from torch import Tensor

from cmamba_ref.errors import InvalidArgumentError
from cmamba_ref.metrics import MS_SSIM_MIN_SIDE


def bits(likelihoods: Tensor) -> Tensor:
    """Information content of each image of a batch: `[B, ...]` likelihoods to `[B]` bits."""
    return -torch.log2(likelihoods.flatten(1)).sum(dim=1)


# With the same lambda, this times 1 - MS-SSIM stands for 255^2 times the MSE: of the pairs of
# lambdas that CompressAI trained models for both with, from 1222 to 1333.
MS_SSIM_WEIGHT = 1280


def rate_distortion_loss(
    output: dict, target: Tensor, lmbda: Tensor | float, ms_ssim: float = 0.0
) -> dict[str, Tensor]:
    """`L = R(y_hat) + R(z_hat) + lambda * 255^2 * D(x, x_hat)`, per image (paper, loss).

    Args:
        output: what `CMamba.forward` returned.
        target: the images, `[B, 3, H, W]` in 0...1; for MS-SSIM, H and W at least 161.
        lmbda: trade-off, a number or one per image `[B]`.
        ms_ssim: the part of MS-SSIM in D, 0...1: 0 is the MSE, 1 is 1 - MS-SSIM, in units that suit
            the lambdas of the MSE (our choice; to have `lambda * (1 - MS-SSIM)` as in other
            publications, divide theirs by 1280).

    Returns:
        `loss`, `bpp` and `distortion`, D in units of the MSE, each `[B]`.

    Raises:
        InvalidArgumentError: no part from 0 to 1, or images too small for MS-SSIM.
    """
    if not (isinstance(ms_ssim, int | float) and 0 <= ms_ssim <= 1):
        raise InvalidArgumentError(
            f"`ms_ssim` must be a number from 0 to 1, got {ms_ssim!r}; 0 is the MSE alone"
        )
    pixels = target.shape[-2] * target.shape[-1]
    bpp = sum(bits(likelihoods) for likelihoods in output["likelihoods"].values()) / pixels
    distortion = (output["x_hat"] - target).square().flatten(1).mean(dim=1)
    if ms_ssim:
        structural = MS_SSIM_WEIGHT / 255**2 * _one_minus_ms_ssim(output["x_hat"], target)
        distortion = (1 - ms_ssim) * distortion + ms_ssim * structural
    loss = bpp + lmbda * 255**2 * distortion
    return {
        "loss": torch.as_tensor(loss),
        "bpp": torch.as_tensor(bpp),
        "distortion": distortion,
    }


def _one_minus_ms_ssim(x_hat: Tensor, target: Tensor) -> Tensor:
    from pytorch_msssim import ms_ssim

    if min(target.shape[-2:]) < MS_SSIM_MIN_SIDE:
        raise InvalidArgumentError(
            f"`target` must have sides of at least {MS_SSIM_MIN_SIDE} for MS-SSIM, got "
            f"{list(target.shape)}; use larger crops"
        )
    return 1 - ms_ssim(x_hat, target, data_range=1.0, size_average=False)

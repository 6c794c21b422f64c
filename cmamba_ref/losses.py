"""The rate-distortion loss."""

from __future__ import annotations

import torch
from torch import Tensor

from cmamba_ref.errors import InvalidArgumentError
from cmamba_ref.metrics import MS_SSIM_MIN_SIDE


def bits(likelihoods: Tensor) -> Tensor:
    """Information content of each image of a batch: `[B, ...]` likelihoods to `[B]` bits."""
    return -torch.log2(likelihoods.flatten(1)).sum(dim=1)


def rate_distortion_loss(
    output: dict, target: Tensor, lmbda: Tensor | float, distortion: str = "mse"
) -> dict[str, Tensor]:
    """`L = R(y_hat) + R(z_hat) + lambda * D(x, x_hat)`, per image (paper, loss).

    Args:
        output: what `CMamba.forward` returned.
        target: the images, `[B, 3, H, W]` in 0...1.
        lmbda: trade-off, a number or one per image `[B]`.
        distortion: `"mse"`, scaled by 255^2 as in the whole field, or `"ms-ssim"` (1 - MS-SSIM).

    Returns:
        `loss`, `bpp` and `distortion` (MSE in 0...1 units or 1 - MS-SSIM), each `[B]`.
    """
    pixels = target.shape[-2] * target.shape[-1]
    bpp = sum(bits(likelihoods) for likelihoods in output["likelihoods"].values()) / pixels
    if distortion == "mse":
        d = (output["x_hat"] - target).square().flatten(1).mean(dim=1)
        weighted = lmbda * 255**2 * d
    elif distortion == "ms-ssim":
        from pytorch_msssim import ms_ssim

        if min(target.shape[-2:]) < MS_SSIM_MIN_SIDE:
            raise InvalidArgumentError(
                f"`target` must have sides of at least {MS_SSIM_MIN_SIDE} for MS-SSIM, got "
                f"{list(target.shape)}; use larger crops"
            )
        d = 1 - ms_ssim(output["x_hat"], target, data_range=1.0, size_average=False)
        weighted = lmbda * d
    else:
        raise InvalidArgumentError(
            f'`distortion` must be "mse" or "ms-ssim", got {distortion!r}; choose one'
        )
    return {"loss": torch.as_tensor(bpp + weighted), "bpp": torch.as_tensor(bpp), "distortion": d}

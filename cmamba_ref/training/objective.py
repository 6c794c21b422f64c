"""What is minimised: the paper's loss, weighted so that no rate drowns the others."""

from __future__ import annotations

import math

from torch import Tensor

from cmamba_ref.losses import rate_distortion_loss
from cmamba_ref.model import CMamba
from cmamba_ref.training.settings import Settings


def objective(
    model: CMamba, output: dict, x: Tensor, quality: Tensor | None, settings: Settings
) -> dict[str, Tensor]:
    """The loss of each image.

    The loss of one rate grows with its lambda.  For a variable-rate model it is divided by
    (lambda / geometric mean of all lambdas)^balance: with 0 high rates dominate, with 1 low ones
    do (our choice).

    Args:
        output: what `CMamba.forward` returned for images x `[B, 3, H, W]` and qualities `[B]`.

    Returns:
        `loss`, weighted; `bpp` and `distortion` as `rate_distortion_loss` gives them, each `[B]`.
    """
    # A reconstruction under autocast has 16 bits: enough for the image, not for its error.
    output = {**output, "x_hat": output["x_hat"].float()}
    if model.gain is None or quality is None:
        return rate_distortion_loss(output, x, settings.lmbda, settings.ms_ssim)
    # Where qualities are on the host, a GPU is given what follows without waiting for it.
    lmbda = model.gain.lmbda(quality).to(x.device, non_blocking=True)
    log_lmbdas = model.gain.log_lmbdas
    centre = math.exp(sum(log_lmbdas) / len(log_lmbdas))
    losses = rate_distortion_loss(output, x, lmbda, settings.ms_ssim)
    return {**losses, "loss": losses["loss"] * (lmbda / centre) ** -settings.balance}


def minimised(loss: Tensor, settings: Settings) -> Tensor:
    """What the gradient of a crop is that of: its loss, or log(1 + loss) (our choice).

    The gradient of the loss grows with the loss. Drawn graphics at high rates have a loss of 10 to
    40 where photographs have 1 to 3; their gradients were measured 8 to 53 times as long, in other
    directions, and drowned those of the photographs in every batch that had one. The logarithm
    divides a gradient by 1 + loss, which brings both to one length.

    Args:
        loss: of each crop `[B]`, as `objective` gives it.
    """
    return loss.log1p() if settings.log_loss else loss

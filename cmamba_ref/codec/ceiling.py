"""Whether an image can gain from its quality: of graphics, the transforms lose most themselves.

Quantisation is the only part of the error that a higher quality makes smaller. What remains with
the quantiser off, `synthesize(analyze(x))`, remains at any quality (our choice of a measure).
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cmamba_ref.codec.image_codec import as_input, visible_colours
from cmamba_ref.errors import ImageWarning
from cmamba_ref.model import CMamba

# From this share of the squared error on, an image gains nothing: at most 0.2 dB.
NOTHING_GAINED = 0.95
# Parts are judged at no higher quality: near the top, fine detail of photographs gains as little.
PARTS_QUALITY = 4
PART, PARTS = 64, 2
# Parts of a smaller image would take more than a twentieth of the time to encode it.
MIN_PIXELS = 600_000


def warn_if_nothing_is_gained(
    image: np.ndarray, model: CMamba, quality: float | None, decoded: np.ndarray | None = None
) -> None:
    """Issue an `ImageWarning` if at least 95 % of an image's squared error remains at any quality.

    Args:
        image: as `cmamba_ref.encode` takes it.
        quality: it was encoded with.
        decoded: what `cmamba_ref.decode` returned for it. None to judge by the two parts of 64x64
            pixels with most detail, in at most a twentieth of the time to encode the image; images
            of less than 0.6 megapixels are then not judged.
    """
    quality = model.check_quality(quality)
    if quality is None:
        return
    if decoded is not None:
        share, where = share_at_any_quality(image, model, quality, decoded), ""
    elif image.shape[0] * image.shape[1] >= MIN_PIXELS and min(image.shape[:2]) >= PART:
        share, where = share_in_parts(image, model, min(quality, PARTS_QUALITY)), " in fine detail"
    else:
        return
    if share >= NOTHING_GAINED:
        warnings.warn(
            f"quality {quality:g} gains nothing here: {min(share, 1):.0%} of the error{where} "
            "remains at any quality, as in graphics; PNG or lossless WebP may suit them better",
            ImageWarning,
            stacklevel=2,
        )


def share_at_any_quality(
    image: np.ndarray, model: CMamba, quality: float, decoded: np.ndarray
) -> float:
    """Return the share of the squared error of a decoded image that remains with no quantiser.

    It is 0 for an image without error, and may exceed 1 a little.
    """
    colours, coded = (visible_colours(array)[0] for array in (image, decoded))
    # Row by row, and as 8 bits: of a large image nothing more is held than encoding takes.
    squares = (np.square(a.astype(np.int32) - b).sum() for a, b in zip(colours, coded, strict=True))
    error = float(sum(squares)) / colours.size / 255**2
    x = as_input(colours)
    x, unquantised = _as_coded(colours, x, _reconstructed(model, x, quality))
    return _ratio(unquantised.sub_(x).square_().mean().item(), error)


def share_in_parts(image: np.ndarray, model: CMamba, quality: float) -> float:
    """Estimate `share_at_any_quality` of the parts with most detail; the parts are coded alone."""
    colours, _ = visible_colours(image)
    parts = torch.cat([as_input(part) for part in _detailed_parts(colours)])
    both = _reconstructed(model, parts, quality, also_quantised=True)
    parts, both = _as_coded(colours, parts, both)
    unquantised, quantised = (F.mse_loss(x_hat, parts).item() for x_hat in both.chunk(2))
    return _ratio(unquantised, quantised)


def _detailed_parts(colours: np.ndarray) -> list[np.ndarray]:
    """Return the parts of `PART` x `PART` pixels in which neighbours differ most."""
    green = colours if colours.ndim == 2 else colours[..., 1]
    level = torch.from_numpy(green.astype(np.int16))
    change = (level.diff(dim=1)[1:].abs() + level.diff(dim=0)[:, 1:].abs()).float()
    cells = F.avg_pool2d(F.pad(change, (1, 0, 1, 0))[None], PART)[0]
    chosen = cells.flatten().topk(min(PARTS, cells.numel())).indices.tolist()
    corners = [(i // cells.shape[1] * PART, i % cells.shape[1] * PART) for i in chosen]
    return [colours[row : row + PART, column : column + PART] for row, column in corners]


@torch.no_grad()
def _reconstructed(
    model: CMamba, x: Tensor, quality: float, *, also_quantised: bool = False
) -> Tensor:
    """Return `synthesize(analyze(x))`, and below it in the batch the same of a rounded latent."""
    device = next(model.parameters()).device
    y = model.analyze(x.to(device), quality)
    x_hat = model.synthesize(torch.cat([y, y.round()]) if also_quantised else y, quality)
    return x_hat[..., : x.shape[-2], : x.shape[-1]].clamp(0, 1).cpu()


def _as_coded(colours: np.ndarray, *batches: Tensor) -> tuple[Tensor, ...]:
    """Return images in the channels that a decoder returns: of grey ones, the mean of all three."""
    return tuple(b.mean(1, keepdim=True) for b in batches) if colours.ndim == 2 else batches


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0

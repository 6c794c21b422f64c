"""The inside of a model at work on one image: the maps of its blocks, the latent, the bits.

    seen = observe(model, image, quality)

One `forward` in eval mode, watched through hooks; it computes what it would compute without.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from stage_clock import transform_stages
from torch import Tensor, nn

from cmamba_ref import CMamba
from cmamba_ref.entropy.gaussian import LOG_SCALE_MAX, LOG_SCALE_MIN
from cmamba_ref.nn.ablations import PlainFusion
from cmamba_ref.nn.blocks import CASSM, VSSBlock


@dataclass
class Block:
    """The outputs of one block of g_a or g_s, each `[C, h, w]`.

    Attributes:
        name: transform, place and number, for instance "g_a H/4 1".
        paths: `ssm` and `cnn` as far as the block has them, and `fused`, the output of a
            block that has both.  One that has neither (GDN) counts as `cnn`.
        alpha: the weight of the SSM path, `[C]`; the CNN path's beta is 1 - alpha.  None for a
            block without attention.
    """

    name: str
    paths: dict[str, np.ndarray]
    alpha: np.ndarray | None


@dataclass
class Observation:
    """One image in the model.

    Attributes:
        blocks: of g_a and g_s, in the order in which they are computed.
        normalised: (y - mean) / scale before quantisation, `[M, h, w]`.
        y_bits: of every element of y, `[M, h, w]`.
        z_bits: of z altogether.
    """

    blocks: list[Block]
    normalised: np.ndarray
    y_bits: np.ndarray
    z_bits: float


@torch.no_grad()
def observe(model: CMamba, x: Tensor, quality: float | None = None) -> Observation:
    """Watch one forward pass.

    Args:
        x: one image `[1, 3, H, W]` in 0...1, sides multiples of 64, so that no padding is seen.
        quality: as for `CMamba.compress`.
    """
    named = _blocks(model)
    blocks = [block for _, block in named]
    watched: list[nn.Module] = [module for block in blocks for module in _paths(block).values()]
    watched += [block.attention for block in blocks if isinstance(block, CASSM)]
    watched += model.context.cae
    latents: list[Tensor] = []
    outputs: dict[nn.Module, list[Tensor]] = {}

    def keep(module: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        # Copies: the block may go on writing into the map.
        outputs[module] = [part[0].clone() for part in parts]

    with contextlib.ExitStack() as hooks:
        for module in watched:
            hooks.callback(module.register_forward_hook(keep).remove)
        latent = model.h_a.register_forward_pre_hook(lambda _, args: latents.append(args[0][0]))
        hooks.callback(latent.remove)
        likelihoods = model(x, quality)["likelihoods"]

    of_slices = [outputs[cae] for cae in model.context.cae]
    means, log_scales = (torch.cat(part) for part in zip(*of_slices, strict=True))
    scales = log_scales.clamp(LOG_SCALE_MIN, LOG_SCALE_MAX).exp()
    seen = []
    for name, block in named:
        paths = {path: _array(outputs[module][0]) for path, module in _paths(block).items()}
        alpha = None
        if isinstance(block, CASSM):
            # The MLP gives the logits of all channels for the SSM, then those for the CNN.
            alpha = _array(outputs[block.attention][0].view(2, -1).softmax(0)[0])
        seen.append(Block(name, paths, alpha))
    return Observation(
        seen,
        ((latents[0].to(means.dtype) - means) / scales).cpu().numpy(),
        likelihoods["y"][0].log2().neg().cpu().numpy(),
        float(likelihoods["z"].log2().neg().sum()),
    )


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()


def _blocks(model: CMamba) -> list[tuple[str, nn.Module]]:
    named, count = [], Counter()
    for transform, module, halvings in (("g_a", model.g_a, 0), ("g_s", model.g_s, 4)):
        for stage, child in zip(transform_stages(transform, module, halvings), module, strict=True):
            if " blocks at " in stage:
                count[stage] += 1
                named.append((f"{stage.replace(' blocks at', '')} {count[stage]}", child))
    return named


def _paths(block: nn.Module) -> dict[str, nn.Module]:
    """The modules whose outputs are the block's paths, in the order of `Block.paths`."""
    if isinstance(block, CASSM | PlainFusion):
        return {"ssm": block.ssm, "cnn": block.cnn, "fused": block}
    return {"ssm" if isinstance(block, VSSBlock) else "cnn": block}


def receptive_field(model: CMamba, x: Tensor) -> np.ndarray:
    """How much each pixel moves the latent at the centre: the effective receptive field of g_a.

    The gradient of the sum of y's channels at the centre, its magnitudes summed over the colours,
    as in Luo et al. 2016 and Ding et al. 2022; the largest is 1.

    Args:
        x: one image `[1, 3, H, W]` in 0...1.

    Returns:
        `[H, W]`.
    """
    x = x.clone().requires_grad_()
    y = model.g_a(x)
    target = y[0, :, y.shape[-2] // 2, y.shape[-1] // 2].sum()
    (gradient,) = torch.autograd.grad(target, x)
    field = gradient[0].abs().sum(0).cpu().numpy()
    return field / max(field.max(), math.ulp(0.0))

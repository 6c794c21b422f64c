"""Widen a trained model: more latent channels, which begin with what it could not represent.

    python tools/widen.py tiny photos -o runs/wide --channels 256
    python tools/train.py --init runs/wide --data photos --out runs/wider --core-hours 1

The new model is the old one as far as its first channels go: old paths read nothing of the new
channels, so its output is the old one's plus that of the linear bypass (cmamba_ref/nn/bypass.py)
that the new channels carry.  The bypass is the best linear map of that rank from 16x16 blocks of
the image to the old model's error without quantisation (reduced-rank regression).  New slices have
fresh context models; gains are those of the old model, interpolated over lambda.

Prints the PSNR without quantisation before and after, on images that were not fitted to.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from cmamba_ref import CMamba, CMambaConfig, CMambaError
from cmamba_ref.nn.bypass import BLOCK
from cmamba_ref.nn.hadamard_init import LATENT_SCALE
from cmamba_ref.training import data

CROP = 512
HELD_OUT = 8
NEW_SLICE_CHANNELS = 64


def widened_config(old: CMambaConfig, channels: int, top: float) -> CMambaConfig:
    """The configuration with more channels, a bypass, and lambdas up to `top`.

    Raises:
        CMambaError: there is nothing to add, or it cannot be divided into slices.
    """
    added = channels - old.latent_channels
    if added < NEW_SLICE_CHANNELS or added % NEW_SLICE_CHANNELS:
        raise CMambaError(
            f"--channels must be {old.latent_channels} and a multiple of {NEW_SLICE_CHANNELS}, "
            f"got {channels}"
        )
    first, count = old.lmbdas[0], len(old.lmbdas)
    return dataclasses.replace(
        old,
        latent_channels=channels,
        slices=(*old.slice_widths, *[NEW_SLICE_CHANNELS] * (added // NEW_SLICE_CHANNELS)),
        lmbdas=tuple(first * (top / first) ** (i / (count - 1)) for i in range(count)),
        bypass=True,
    )


@torch.no_grad()
def copy_weights(old: CMamba, new: CMamba) -> None:
    """Give `new` the weights of `old`; what old channels would read of new ones is 0."""
    m, wide = old.config.latent_channels, new.config.latent_channels
    widths = old.config.slice_widths

    def columns(halves: int, slices: int) -> Tensor:
        """Where a context of so many halves of Phi' and slices has the old model's channels."""
        phi = [half * wide + torch.arange(m) for half in range(halves)]
        return torch.cat([*phi, halves * wide + torch.arange(sum(widths[:slices]))])

    inputs = {"h_a.2.weight": torch.arange(m)}
    for i in range(len(widths)):
        inputs[f"context.cae.{i}.w_sq.weight"] = columns(2, i)
        inputs[f"context.lrp.{i}.layers.0.weight"] = columns(1, i + 1)
    source = old.state_dict()
    for name, parameter in new.named_parameters():
        value = source.get(name)
        if value is None:
            continue
        if parameter.shape == value.shape:
            parameter.copy_(value)
        elif name in inputs:
            parameter.zero_()
            parameter[:, inputs[name]] = value
        elif name.startswith("gain."):
            _copy_gain(old.config, new.config, value, parameter, inverse="inverse" in name)
        else:  # latent channels come first in both, and are outputs, of h_a.0 inputs as well
            if name == "h_a.0.weight":
                parameter[:m] = 0
                parameter[:m, :m] = value
            else:
                if name.startswith(("g_a.", "g_s.")):
                    parameter.zero_()  # the bypass alone reaches the new channels
                parameter[:m] = value


def _copy_gain(
    old: CMambaConfig, new: CMambaConfig, value: Tensor, parameter: Tensor, *, inverse: bool
) -> None:
    """Old channels: interpolated over log lambda.  New ones: the best uniform quantiser's step."""
    known, wanted = np.log(old.lmbdas), np.log(new.lmbdas)
    position = np.interp(wanted, known, np.arange(len(known)))
    # Beyond the last lambda gains go on as between the last two.
    beyond = np.maximum(0, (wanted - known[-1]) / (known[-1] - known[-2]))
    low = np.minimum(position.astype(int), len(known) - 2)
    weight = torch.from_numpy(position - low + beyond).to(value)[:, None]
    parameter[:, : value.shape[1]] = value[low] * (1 - weight) + value[low + 1] * weight
    # R + lambda 255^2 MSE is least where the error D of a coefficient, step^2 / 12, is
    # 3 / (2 ln 2 lambda): MSE is a mean over three colours.
    log_step = 0.5 * (math.log(18 / math.log(2)) - wanted) - math.log(255)
    log_gain = torch.from_numpy(-math.log(LATENT_SCALE) - log_step).to(value)[:, None]
    parameter[:, value.shape[1] :] = -log_gain if inverse else log_gain


def blocks_of(x: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` to blocks `[N, 768]`."""
    return rearrange(x, "b c (h i) (w j) -> (b h w) (c i j)", i=BLOCK, j=BLOCK)


def crops(paths: list[Path]) -> Iterator[Tensor]:
    """Centre crops of images, cut to multiples of 64, as `[1, 3, H, W]` in 0...1."""
    for path in tqdm(paths, unit="image", disable=None):
        crop = data.centre_crop(data.read_rgb(path), CROP)
        height, width = (side // 64 * 64 for side in crop.shape[:2])
        yield torch.from_numpy(crop[:height, :width]).permute(2, 0, 1)[None].float() / 255


@torch.no_grad()
def fit_bypass(old: CMamba, new: CMamba, paths: list[Path]) -> None:
    """Fit the bypass of `new` to the error of `old` by reduced-rank regression."""
    quality = float(len(old.config.lmbdas))
    size = 3 * BLOCK**2
    of_inputs, of_errors = (torch.zeros(size, size, dtype=torch.float64) for _ in range(2))
    for x in crops(paths):
        error = blocks_of(x - old.synthesize(old.analyze(x, quality), quality)).double()
        inputs = blocks_of(x - 0.5).double()
        of_inputs += inputs.T @ inputs
        of_errors += inputs.T @ error
    ridge = 1e-6 * of_inputs.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    whole = torch.linalg.solve(of_inputs + ridge, of_errors)
    # The fitted errors' principal directions, as many as there are new channels.
    rank = new.config.latent_channels - old.config.latent_channels
    directions = torch.linalg.eigh(whole.T @ of_inputs @ whole)[1].flip(1)[:, :rank]
    shape = (rank, 3, BLOCK, BLOCK)
    bypass = new.get_submodule("bypass")
    to_latent = LATENT_SCALE * (whole @ directions).T.reshape(shape)
    bypass.get_parameter("analysis.weight")[-rank:] = to_latent.float()
    to_image = directions.T.reshape(shape) / LATENT_SCALE
    bypass.get_parameter("synthesis.weight")[-rank:] = to_image.float()


@torch.no_grad()
def ceiling(model: CMamba, paths: list[Path]) -> float:
    """Mean PSNR without quantisation at the best quality, in dB."""
    quality = float(len(model.config.lmbdas))
    errors = [
        float((model.synthesize(model.analyze(x, quality), quality) - x).square().mean())
        for x in crops(paths)
    ]
    return float(np.mean([-10 * math.log10(error) for error in errors]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="name or directory of a variable-rate model")
    parser.add_argument("images", type=Path, help="folder of images to fit the bypass to")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--channels", type=int, default=256, help="latent channels (default: 256)")
    parser.add_argument("--top", type=float, default=0.18, help="largest lambda (default: 0.18)")
    parser.add_argument("--limit", type=int, default=100, help="images to fit to (default: 100)")
    args = parser.parse_args(argv)
    try:
        old = CMamba.from_pretrained(args.model)
        if not old.config.variable_rate or old.config.bypass:
            raise CMambaError("the model must be a variable-rate model without a bypass")
        torch.manual_seed(0)
        new = CMamba(widened_config(old.config, args.channels, args.top)).eval()
        found = data.find_images(args.images, 64, HELD_OUT)
    except CMambaError as error:
        parser.error(str(error))
    copy_weights(old, new)
    step = max(1, len(found.train) // args.limit)
    fit_bypass(old, new, found.train[::step][: args.limit])
    before, after = (ceiling(model, found.held_out) for model in (old, new))
    print(f"PSNR without quantisation: {before:.2f} dB before, {after:.2f} dB after")
    new.update(force=True)
    new.save_pretrained(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Initial weights: g_a and g_s start as a Walsh-Hadamard transform and its inverse (our choice).

A fresh codec must first discover that neighbouring pixels are alike, and that takes thousands of
steps.  Four stages that halve the image can hold a 16x16 Walsh-Hadamard transform exactly: each
stage splits every channel that carries a coefficient into four, by sums and differences over 2x2
positions.  Where a stage has too few channels for all of them, the ones with the most energy in
an image of strong correlation are kept.  Residual blocks start as the identity, so a fresh model
reconstructs images at once, and training refines it.  The architecture is untouched.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

# Orthonormal opponent colours (rows) over RGB, and the energy that each has in natural images.
COLOURS = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
COLOUR_ENERGY = (1.0, 0.05, 0.02)
# Correlation of neighbouring pixels in the model that decides which coefficients are kept.
CORRELATION = 0.95
# The four children of a coefficient: signs of the second row and of the second column.
CHILDREN = ((1, 1), (1, -1), (-1, 1), (-1, -1))
# Initial step size: y counts coefficients in units of 16/255, the middle of the useful range.
LATENT_SCALE = 255 / 16
# Random weights are left at this share of PyTorch's own beside the transform.
NOISE = 0.01


@dataclass(frozen=True)
class Carrier:
    """One coefficient: a colour times a vertical and a horizontal Walsh function."""

    colour: int
    rows: tuple[float, ...]
    columns: tuple[float, ...]

    def child(self, row_sign: int, column_sign: int) -> Carrier:
        """The coefficient of the sum or difference of this one over 2x2 positions."""
        return Carrier(
            self.colour,
            (*self.rows, *(row_sign * value for value in self.rows)),
            (*self.columns, *(column_sign * value for value in self.columns)),
        )

    @property
    def energy(self) -> float:
        """Expected square of the (normalised) coefficient."""
        return COLOUR_ENERGY[self.colour] * _energy(self.rows) * _energy(self.columns)


@functools.cache
def _energy(signs: tuple[float, ...]) -> float:
    distance = np.abs(np.subtract.outer(np.arange(len(signs)), np.arange(len(signs))))
    return float(np.array(signs) @ CORRELATION**distance @ np.array(signs)) / len(signs)


@dataclass(frozen=True)
class Level:
    """One halving of the image.  Carriers are always the first channels of a map.

    Attributes:
        finer, coarser: carriers before and after.
        taps: (finer channel, coarser channel, row of 2x2, column of 2x2, weight).
    """

    finer: int
    coarser: int
    taps: list[tuple[int, int, int, int, float]]


def _levels(widths: list[int]) -> list[Level]:
    """The transform, from fine to coarse.

    Args:
        widths: channels after each halving; the first acts on RGB.
    """
    carriers = [Carrier(colour, (1.0,), (1.0,)) for colour in range(3)]
    levels = []
    for width in widths:
        family = [
            (parent, signs, carrier.child(*signs))
            for parent, carrier in enumerate(carriers)
            for signs in CHILDREN
        ]
        # Strongest first; the sort is stable, so that every machine keeps the same ones.
        family.sort(key=lambda member: -round(member[2].energy, 9))
        family = family[:width]
        # The parents of the first level are colours, each a mixture of the three channels.
        mixture = np.eye(len(carriers)) if levels else COLOURS
        taps = [
            (finer, channel, row, column, 0.5 * row_sign**row * column_sign**column * share)
            for channel, (parent, (row_sign, column_sign), _) in enumerate(family)
            for finer, share in enumerate(mixture[parent].tolist())
            if share
            for row in (0, 1)
            for column in (0, 1)
        ]
        levels.append(Level(len(carriers), len(family), taps))
        carriers = [child for _, _, child in family]
    return levels


@torch.no_grad()
def init_analysis(halvings: list[nn.Conv2d]) -> None:
    """Make the halvings of g_a, from fine to coarse, the transform."""
    if halvings[0].weight.is_meta:
        return  # no values to set
    levels = _levels([conv.out_channels for conv in halvings])
    for conv, level in zip(halvings, levels, strict=True):
        _install(conv, _weight(conv, level), level.coarser, dim=0)
    # The first layer sees 0...1, its coefficients are those of -0.5...0.5.
    first = halvings[0]
    first.bias.copy_(-0.5 * first.weight.sum((1, 2, 3)))  # type: ignore[union-attr]
    halvings[-1].weight.mul_(LATENT_SCALE)


@torch.no_grad()
def init_synthesis(doublings: list[nn.ConvTranspose2d], last: nn.Conv2d) -> None:
    """Make the doublings of g_s, from coarse to fine, the inverse.

    Args:
        last: the convolution before `PixelShuffle(2)`, which inverts the finest level.
    """
    if last.weight.is_meta:
        return
    widths = [last.in_channels, *(deconv.in_channels for deconv in reversed(doublings))]
    finest, *others = _levels(widths)
    for deconv, level in zip(reversed(doublings), others, strict=True):
        _install(deconv, _weight(deconv, level), level.finer, dim=1)
    finer, coarser, row, column, value = (np.array(tap) for tap in zip(*finest.taps, strict=True))
    centre = last.kernel_size[0] // 2
    transform = torch.zeros(last.weight.shape, dtype=torch.float64)
    transform[4 * finer + 2 * row + column, coarser, centre, centre] = torch.from_numpy(value)
    _install(last, transform, 4 * finest.finer, dim=0)
    nn.init.constant_(last.bias, 0.5)  # type: ignore[arg-type]  # mid-grey
    doublings[0].weight.div_(LATENT_SCALE)


def _weight(layer: nn.Conv2d | nn.ConvTranspose2d, level: Level) -> Tensor:
    """A level as the weight of a layer; either way the first axis is the coarser map's channels."""
    finer, coarser, row, column, value = zip(*level.taps, strict=True)
    first = (layer.kernel_size[0] - 1) // 2  # of the 2x2 positions, along either side
    kernel = torch.zeros(layer.weight.shape, dtype=torch.float64)
    kernel[coarser, finer, np.add(row, first), np.add(column, first)] = torch.tensor(
        value, dtype=torch.float64
    )
    return kernel


def _install(
    layer: nn.Conv2d | nn.ConvTranspose2d, transform: Tensor, carriers: int, dim: int
) -> None:
    """Give the outputs that carry coefficients the transform, under reduced noise."""
    ours = layer.weight.narrow(dim, 0, carriers)
    ours.mul_(NOISE).add_(transform.to(ours).narrow(dim, 0, carriers))
    nn.init.zeros_(layer.bias[:carriers])  # type: ignore[index]

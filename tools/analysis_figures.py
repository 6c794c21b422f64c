"""The figures of tools/analyze.py, from its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from figures import new_figure
from rd_measure import read_rgb

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PATHS = {"ssm": "SSM path", "cnn": "CNN path", "fused": "fused"}
COLOURS = {"ssm": "C0", "cnn": "C1", "fused": "C2"}

Numbers = dict[str, Any]


def draw_spectra(numbers: Numbers, _: Path) -> Figure:
    """Fig. 1: (a) spectra over both frequencies, where a block has both paths; (b) by block."""
    spectra = numbers["spectrum"]
    figure = new_figure(3.2 * max(len(spectra), 1) + 4.6, 3.6)
    figure.set_layout_engine("constrained", wspace=0.06)
    *maps, curve = np.atleast_1d(figure.subplots(1, len(spectra) + 1))
    lowest = min((np.min(s) for s in spectra.values()), default=0)
    image = None
    for axes, (path, spectrum) in zip(maps, spectra.items(), strict=True):
        extent = (-1, 1, -1, 1)
        image = axes.imshow(spectrum, vmin=lowest, vmax=0, extent=extent, origin="lower")
        axes.set_title(f"(a) {PATHS[path]}, {numbers['spectrum_of']}", fontsize=9)
        axes.set_xlabel("horizontal frequency, \N{MULTIPLICATION SIGN} \N{GREEK SMALL LETTER PI}")
        axes.set_xticks([-1, 0, 1])
        axes.set_yticks([-1, 0, 1])
    if image is not None:
        maps[0].set_ylabel("vertical frequency, \N{MULTIPLICATION SIGN} \N{GREEK SMALL LETTER PI}")
        figure.colorbar(image, ax=maps, label="relative log amplitude", shrink=0.8)
    blocks = list(numbers["log_amplitude"])
    for path, label in PATHS.items():
        at = [k for k, b in enumerate(blocks) if path in numbers["log_amplitude"][b]]
        values = [numbers["log_amplitude"][blocks[k]][path][-1] for k in at]
        if at:
            curve.plot(at, values, "o-", color=COLOURS[path], label=label)
    curve.set_xticks(range(len(blocks)), [b.removeprefix("g_a ") for b in blocks])
    curve.set_xlabel("block of g_a")
    curve.set_ylabel("log amplitude at \N{GREEK SMALL LETTER PI} relative to 0")
    curve.set_title("(b) high frequencies, block by block", fontsize=9)
    curve.grid(alpha=0.3)
    curve.legend(fontsize=8)
    return figure


def draw_correlation(numbers: Numbers, _: Path) -> Figure:
    """Fig. 6: the correlation at each distance, written into its place."""
    correlation = np.array(numbers["correlation"])
    reach = len(correlation) // 2
    figure = new_figure(5.2, 4.4)
    axes = figure.subplots()
    away = np.abs(np.where(_is_middle(correlation), 0, correlation))
    # The middle is 1 by definition; the colours are for the rest.
    top = max(away.max(), 0.01)
    extent = (-reach - 0.5, reach + 0.5, reach + 0.5, -reach - 0.5)
    image = axes.imshow(np.abs(correlation), vmin=0, vmax=top, extent=extent, cmap="viridis")
    for (down, right), value in np.ndenumerate(correlation):
        colour = "black" if abs(value) > 0.6 * top else "white"
        place = (right - reach, down - reach)
        axes.text(*place, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xlabel("positions to the right")
    axes.set_ylabel("positions down")
    axes.set_title("correlation of (y - mean) / scale", fontsize=10)
    figure.colorbar(image, label="magnitude", extend="max")
    return figure


def _is_middle(square: np.ndarray) -> np.ndarray:
    mask = np.zeros(square.shape, bool)
    mask[len(square) // 2, len(square) // 2] = True
    return mask


def draw_fusion(numbers: Numbers, _: Path) -> Figure | None:
    """The weights of each block: a dot per channel, a line at their mean."""
    blocks = numbers["fusion"]
    if not blocks:
        return None
    figure = new_figure(1.4 + 1.3 * len(blocks), 3.8)
    axes = figure.subplots()
    for k, fusion in enumerate(blocks.values()):
        alpha = np.array(fusion["alpha"])
        # Side by side in order of channels, so that equal weights do not hide each other.
        axes.plot(k + np.linspace(-0.3, 0.3, len(alpha)), alpha, ".", markersize=4, color="C0")
        axes.hlines(alpha.mean(), k - 0.35, k + 0.35, color="C3")
        spread = fusion["deviation_over_pictures"]
        text = f"mean {alpha.mean():.2f}\n\N{PLUS-MINUS SIGN}{spread:.3f}"
        axes.text(k, 1.02, text, ha="center", va="bottom", fontsize=7)
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle="--")
    axes.set_ylim(0, 1.16)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.set_xticks(range(len(blocks)), list(blocks), fontsize=8)
    axes.set_ylabel("alpha, weight of the SSM path\n(beta = 1 - alpha)")
    axes.set_title("weights by channel; \N{PLUS-MINUS SIGN}: deviation over pictures", fontsize=9)
    return figure


def draw_bits(numbers: Numbers, picture: Path) -> Figure:
    """The picture, all bits of y, and those of each slice, in bits per pixel."""
    slices = np.array(numbers["bits"]["map"]) / 16**2  # a position of y is 16x16 pixels
    panels = {"y, all slices": slices.sum(axis=0)}
    panels |= {f"slice {k + 1}": part for k, part in enumerate(slices)}
    columns = min(3, len(panels) + 1)
    rows = -(-(len(panels) + 1) // columns)
    height, width = slices.shape[1:]
    figure = new_figure(4 * columns, (3.3 * height / width + 0.4) * rows)
    axes = list(np.atleast_1d(figure.subplots(rows, columns)).flat)
    for ax in axes:
        ax.set_axis_off()
    axes[0].imshow(read_rgb(picture)[: 16 * height, : 16 * width])
    axes[0].set_title(numbers["bits"]["picture"], fontsize=9)
    for ax, (title, bits) in zip(axes[1:], panels.items(), strict=False):
        image = ax.imshow(bits, vmin=0, cmap="magma")
        ax.set_title(f"{title}: {bits.mean():.3f} bpp", fontsize=9)
        figure.colorbar(image, ax=ax, shrink=0.8)
    return figure


def draw_field(numbers: Numbers, _: Path) -> Figure:
    """The receptive field on a logarithmic scale, and how far out its sum has been reached."""
    field = np.array(numbers["field"])
    half = len(field) * numbers["field_square"] / 2
    figure = new_figure(9, 3.8)
    left, right = figure.subplots(1, 2)
    shown = np.log10(np.maximum(field / field.max(), 1e-6))
    image = left.imshow(shown, vmin=-6, vmax=0, extent=(-half, half, half, -half))
    left.set_xlabel("pixels from the centre")
    left.set_title("effective receptive field of g_a", fontsize=9)
    figure.colorbar(image, ax=left, label="log10 of the gradient's magnitude")
    place = (np.arange(len(field)) + 0.5) * numbers["field_square"] - half
    distance = np.maximum(*np.abs(np.meshgrid(place, place)))
    sides = np.unique(distance)
    reached = [field[distance <= side].sum() / field.sum() for side in sides]
    right.plot(sides, reached)
    right.set_xlabel("half the side of a square about the centre, pixels")
    right.set_ylabel("part of the gradient inside")
    right.set_ylim(0, 1.02)
    right.grid(alpha=0.3)
    return figure


# By the name of the file.
FIGURES = {
    "spectra": draw_spectra,
    "correlation": draw_correlation,
    "fusion": draw_fusion,
    "bits": draw_bits,
    "field": draw_field,
}

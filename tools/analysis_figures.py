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
BY_PI = "frequency, \N{MULTIPLICATION SIGN} \N{GREEK SMALL LETTER PI}"

Numbers = dict[str, Any]


def draw_spectra(numbers: Numbers, _: Path) -> Figure:
    """Fig. 1: (a) spectra over both frequencies, where a block has both paths; (b) by block."""
    spectra = numbers["spectrum"]
    figure = new_figure(3.2 * max(len(spectra), 1) + 4.6, 3.6)
    figure.set_layout_engine("constrained", wspace=0.06)
    *maps, curve = np.atleast_1d(figure.subplots(1, len(spectra) + 1))
    lowest = min((np.min(s) for s in spectra.values()), default=0)
    for axes, (path, spectrum) in zip(maps, spectra.items(), strict=True):
        image = axes.imshow(spectrum, vmin=lowest, vmax=0, extent=(-1, 1, -1, 1), origin="lower")
        axes.set(xlabel=f"horizontal {BY_PI}", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
        axes.set_title(f"(a) {PATHS[path]}, {numbers['spectrum_of']}", fontsize=9)
        if axes is maps[-1]:
            figure.colorbar(image, ax=maps, label="relative log amplitude", shrink=0.8)
            maps[0].set_ylabel(f"vertical {BY_PI}")
    blocks = numbers["log_amplitude"]
    for k, (path, label) in enumerate(PATHS.items()):
        points = [(i, b[path][-1]) for i, b in enumerate(blocks.values()) if path in b]
        if points:
            curve.plot(*zip(*points, strict=True), "o-", color=f"C{k}", label=label)
    curve.set_xticks(range(len(blocks)), [b.removeprefix("g_a ") for b in blocks])
    relative = "log amplitude at \N{GREEK SMALL LETTER PI} relative to 0"
    curve.set(xlabel="block of g_a", ylabel=relative)
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
    away = np.abs(correlation)
    # The middle is 1 by definition; the colours are for the rest.
    top = max(np.delete(away.ravel(), away.size // 2).max(), 0.01)
    extent = (-reach - 0.5, reach + 0.5, reach + 0.5, -reach - 0.5)
    image = axes.imshow(away, vmin=0, vmax=top, extent=extent, cmap="viridis")
    for (down, right), value in np.ndenumerate(correlation):
        colour = "black" if abs(value) > 0.6 * top else "white"
        place = (right - reach, down - reach)
        axes.text(*place, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set(xlabel="positions to the right", ylabel="positions down")
    axes.set_title("correlation of (y - mean) / scale", fontsize=10)
    figure.colorbar(image, label="magnitude", extend="max")
    return figure


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
        spread = fusion["deviation_over_images"]
        text = f"mean {alpha.mean():.2f}\n\N{PLUS-MINUS SIGN}{spread:.3f}"
        axes.text(k, 1.02, text, ha="center", va="bottom", fontsize=7)
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle="--")
    axes.set(ylim=(0, 1.16), yticks=np.linspace(0, 1, 6))
    axes.set_xticks(range(len(blocks)), list(blocks), fontsize=8)
    axes.set_ylabel("alpha, weight of the SSM path\n(beta = 1 - alpha)")
    axes.set_title("weights by channel; \N{PLUS-MINUS SIGN}: deviation over images", fontsize=9)
    return figure


def draw_bits(numbers: Numbers, image: Path) -> Figure:
    """The image, all bits of y, and those of each slice, in bits per pixel."""
    slices = np.array(numbers["bits"]["map"]) / 16**2  # a position of y is 16x16 pixels
    panels = {"y, all slices": slices.sum(axis=0)}
    panels |= {f"slice {k + 1}": part for k, part in enumerate(slices)}
    columns = min(3, len(panels) + 1)
    rows = -(-(len(panels) + 1) // columns)
    height, width = slices.shape[1:]
    figure = new_figure(4 * columns, (3.3 * height / width + 0.4) * rows)
    first, *others = np.atleast_1d(figure.subplots(rows, columns)).flat
    for axes in (first, *others):
        axes.set_axis_off()
    first.imshow(read_rgb(image)[: 16 * height, : 16 * width])
    first.set_title(numbers["bits"]["image"], fontsize=9)
    for axes, (title, bits) in zip(others, panels.items(), strict=False):
        shown = axes.imshow(bits, vmin=0, cmap="magma")
        axes.set_title(f"{title}: {bits.mean():.3f} bpp", fontsize=9)
        figure.colorbar(shown, ax=axes, shrink=0.8)
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
    right.plot(sides, [field[distance <= side].sum() / field.sum() for side in sides])
    across = "half the side of a square about the centre, pixels"
    right.set(xlabel=across, ylabel="part of the gradient inside", ylim=(0, 1.02))
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

"""Statistics of maps: Fourier spectra, spatial correlation, bits by slice.  NumPy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Spectra of maps of any size are brought to this many frequencies per axis, -pi to pi.
GRID = 33
# Correlation is taken up to this many positions away.
REACH = 3
# Added to amplitudes, so that a frequency that a map does not have at all has a logarithm.
FLOOR = 1e-12


def log_spectrum(maps: np.ndarray) -> np.ndarray:
    """Log amplitude over frequency relative to that at frequency 0, mean over channels.

    Natural logarithm; the mean is over logarithms, as in Park & Kim 2022, whose relative log
    amplitude this is.  Between the frequencies of the map it is interpolated.

    Args:
        maps: `[C, h, w]`.

    Returns:
        `[GRID, GRID]` over vertical and horizontal frequencies from -pi to pi, 0 in the middle.
    """
    amplitude = np.abs(np.fft.fft2(maps.astype(np.float64)))
    log_amplitude = np.log(amplitude + FLOOR).mean(axis=0)
    wanted = np.linspace(-np.pi, np.pi, GRID)
    for axis in (0, 1):
        present = 2 * np.pi * np.fft.fftfreq(log_amplitude.shape[axis])
        log_amplitude = np.apply_along_axis(
            lambda line, at=present: np.interp(wanted, at, line, period=2 * np.pi),
            axis,
            log_amplitude,
        )
    return log_amplitude - log_amplitude[GRID // 2, GRID // 2]


def half_diagonal(spectrum: np.ndarray) -> np.ndarray:
    """The values of a spectrum from its middle to a corner: frequencies 0 to pi in both axes."""
    return np.diagonal(spectrum)[GRID // 2 :]


def spatial_correlation(normalised: np.ndarray) -> np.ndarray:
    """Correlation of a normalised latent with itself, moved; all channels and positions together.

    Sums of products over roots of sums of squares, both over the positions that overlap, after the
    mean of each channel was subtracted: a channel that is never coded may keep a constant distance
    from its mean, which costs no bits and would look like correlation.

    Args:
        normalised: (y - mean) / scale, `[M, h, w]`.

    Returns:
        `[2 REACH + 1, 2 REACH + 1]`, vertical and horizontal distances, 1 in the middle; 0 where
        the map is too small, or constant.
    """
    values = normalised - normalised.mean(axis=(1, 2), keepdims=True, dtype=np.float64)
    _, height, width = values.shape
    side = 2 * REACH + 1
    correlation = np.zeros((side, side))
    for down in range(-REACH, REACH + 1):
        for right in range(-REACH, REACH + 1):
            here = values[:, _staying(down, height), _staying(right, width)]
            there = values[:, _staying(-down, height), _staying(-right, width)]
            norm = np.sqrt((here**2).sum() * (there**2).sum())
            if norm > 0:
                correlation[down + REACH, right + REACH] = (here * there).sum() / norm
    return correlation


def _staying(move: int, size: int) -> slice:
    """The positions of an axis that are still on it after a move."""
    return slice(max(0, -move), max(0, size - max(0, move)))


def bits_by_slice(y_bits: np.ndarray, slice_widths: Sequence[int]) -> np.ndarray:
    """Add up the bits of each slice at each position: `[M, h, w]` to `[slices, h, w]`."""
    begins = np.cumsum([0, *slice_widths[:-1]])
    return np.add.reduceat(y_bits, begins, axis=0)


def pooled(field: np.ndarray, factor: int) -> np.ndarray:
    """Means over squares of `factor` x `factor`: `[H, W]` to `[H/factor, W/factor]`."""
    height, width = field.shape
    return field.reshape(height // factor, factor, width // factor, factor).mean(axis=(1, 3))

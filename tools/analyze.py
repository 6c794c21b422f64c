"""Analyse a model over a folder of images: the paper's Figs. 1 and 6, and more.

    python tools/analyze.py photos -o analysis
    python tools/analyze.py photos -o analysis --model runs/mine/model --quality 6 --image a.png
    python tools/analyze.py photos -o analysis --ceiling

Writes into the folder of -o:

    spectra.png      Fig. 1: (a) Fourier spectra of the last block of g_a with both paths, for the
                     SSM path, the CNN path and the block's output; (b) log amplitude of the highest
                     frequency relative to the lowest, block by block. The paper compares three
                     models there; these are the paths of one model
    correlation.png  Fig. 6: autocorrelation of the normalised latent (y - mean) / scale up to
                     3 positions away; the less, the more the model has explained
    fusion.png       how CA-SSM weights its paths: alpha (SSM) of every channel of each block; beta
                     (CNN) is 1 - alpha
    bits.png         the bits of each slice over one image: the first, or the --image, which may
                     be any file; one that is not in the folder is in no mean
    field.png        effective receptive field of g_a, from the centre of each image
    analysis.json    all numbers that are drawn, means over images, and provenance; with --ceiling
                     also `ceiling`, one object per quality, which is printed too:
                       psnr             of the decoded files, dB, mean over images
                       psnr_ceiling     of synthesize(analyze(x)), the quantiser off: about the most
                                        that these weights reach at any rate
                       share_of_error   mean squared error with the quantiser off over that of the
                                        decoded files, each a mean over images: the share of the
                                        error that no rate removes
                     All three are of 8-bit images at their full size

Images are cut to multiples of 64 pixels, so that no padding is in the numbers; those that are
smaller or cannot be read are named and left out, and the exit status is then 1. Finished images are
kept (analysis.json.partial): after Ctrl-C, exit status 130, the same command resumes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from analysis_figures import FIGURES
from figures import new_figure, save
from observe import observe, receptive_field
from partial_results import PartialResults
from provenance import of_run, versions
from rd_measure import image_paths, read_rgb
from tqdm import tqdm

import cmamba_ref
from cmamba_ref import CMamba, CMambaError
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.errors import explain
from cmamba_ref.metrics import psnr
from cmamba_ref.model import MULTIPLE

# The receptive field is taken on the middle of an image, of at most this side, and drawn and kept
# as means over squares.
FIELD_SIDE, FIELD_SQUARE = 256, 4
# Spectra of maps of any size are brought to this many frequencies per axis, -pi to pi.
GRID = 33
# Added to amplitudes, so that a frequency that a map does not have at all has a logarithm.
FLOOR = 1e-12
REACH = 3  # of the correlation, in positions
CEILING = (
    "quality {quality}: PSNR {psnr:.2f} dB, {psnr_ceiling:.2f} dB with the quantiser off, which "
    "leaves {share_of_error:.1%} of the squared error"
)

Numbers = dict[str, Any]


# ---------------------------------------------------------------- statistics


def log_spectrum(maps: np.ndarray) -> np.ndarray:
    """Return log amplitude over frequency relative to frequency 0, mean over channels.

    Natural logarithm; the mean is over logarithms, as in Park & Kim 2022, whose relative log
    amplitude this is. Between the frequencies of the map it is interpolated.

    Args:
        maps: `[C, h, w]`.

    Returns:
        `[GRID, GRID]` over vertical and horizontal frequencies from -pi to pi, 0 in the middle.
    """
    spectrum = np.log(np.abs(np.fft.fft2(maps.astype(np.float64))) + FLOOR).mean(axis=0)
    wanted = np.linspace(-np.pi, np.pi, GRID)
    for _ in range(2):  # one axis, then the other
        present = 2 * np.pi * np.fft.fftfreq(len(spectrum))
        lines = [np.interp(wanted, present, line, period=2 * np.pi) for line in spectrum.T]
        spectrum = np.array(lines)
    return spectrum - spectrum[GRID // 2, GRID // 2]


def half_diagonal(spectrum: np.ndarray) -> np.ndarray:
    """Return a spectrum from its middle to a corner: frequencies 0 to pi in both axes."""
    return np.diagonal(spectrum)[GRID // 2 :]


def spatial_correlation(normalised: np.ndarray) -> np.ndarray:
    """Return the autocorrelation of a normalised latent, over all channels and positions.

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
    correlation = np.zeros((2 * REACH + 1, 2 * REACH + 1))
    for at in np.ndindex(correlation.shape):
        down, right = (distance - REACH for distance in at)
        here = values[:, max(0, -down) : height - down, max(0, -right) : width - right]
        there = values[:, max(0, down) : height + down, max(0, right) : width + right]
        if abs(down) < height and abs(right) < width:
            norm = np.sqrt((here**2).sum() * (there**2).sum())
            correlation[at] = (here * there).sum() / norm if norm > 0 else 0
    return correlation


def bits_by_slice(y_bits: np.ndarray, slice_widths: Sequence[int]) -> np.ndarray:
    """Add up the bits of each slice at each position: `[M, h, w]` to `[slices, h, w]`."""
    return np.add.reduceat(y_bits, np.cumsum([0, *slice_widths[:-1]]), axis=0)


# ---------------------------------------------------------------- one image


def numbers_of(model: CMamba, image: np.ndarray, quality: float | None) -> Numbers:
    """Return all numbers of one image, as JSON holds them.

    Args:
        image: uint8 `[H, W, 3]`.

    Raises:
        CMambaError: a side has less than 64 pixels, or the quality is out of range.
    """
    height, width = (side // MULTIPLE * MULTIPLE for side in image.shape[:2])
    if not height or not width:
        raise CMambaError(f"has a side of less than {MULTIPLE} pixels")
    x = _as_input(image[:height, :width])
    seen = observe(model, x, quality)
    spectra = {
        block.name: {path: log_spectrum(maps) for path, maps in block.paths.items()}
        for block in seen.blocks
        if block.name.startswith("g_a")
    }
    # Of the last block with both paths, if there is one.
    shown = [name for name, paths in spectra.items() if "fused" in paths][-1:]
    bits = bits_by_slice(seen.y_bits, model.config.slice_widths)
    return {
        "spectrum_of": shown[0] if shown else None,
        "spectrum": {path: s.tolist() for name in shown for path, s in spectra[name].items()},
        "log_amplitude": {
            name: {path: half_diagonal(spectrum).tolist() for path, spectrum in paths.items()}
            for name, paths in spectra.items()
        },
        "correlation": spatial_correlation(seen.normalised).tolist(),
        "alpha": {b.name: b.alpha.tolist() for b in seen.blocks if b.alpha is not None},
        "bits": {
            "y_bpp": (bits.sum(axis=(1, 2)) / (width * height)).tolist(),
            "z_bpp": seen.z_bits / (width * height),
            "map": bits.tolist(),
        },
        "field": _field(model, x),
    }


def _as_input(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255


def _field(model: CMamba, x: torch.Tensor) -> list[list[float]]:
    """The receptive field on the middle of an image, with zeros around a smaller one."""
    height, width = (min(side, FIELD_SIDE) for side in x.shape[-2:])
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    field = receptive_field(model, x[..., top : top + height, left : left + width])
    down, right = (FIELD_SIDE - height) // 2, (FIELD_SIDE - width) // 2
    framed = np.zeros((FIELD_SIDE, FIELD_SIDE))
    framed[down : down + height, right : right + width] = field
    side = FIELD_SIDE // FIELD_SQUARE
    return framed.reshape(side, FIELD_SQUARE, side, FIELD_SQUARE).mean(axis=(1, 3)).tolist()


def ceiling_of(model: CMamba, image: np.ndarray, qualities: list[float | None]) -> list[Numbers]:
    """Measure PSNR and squared error of an image's real files, and those with the quantiser off.

    Args:
        image: uint8 `[H, W, 3]`, any size.

    Returns:
        one object per quality.
    """
    x, (height, width) = _as_input(image), image.shape[:2]
    rows = []
    for quality in qualities:
        decoded = cmamba_ref.decode(cmamba_ref.encode(image, model, quality), model)
        with torch.no_grad():
            x_hat = model.synthesize(model.analyze(x, quality), quality)[0, :, :height, :width]
        unquantised = (x_hat.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        row = {}
        for name, other in (("", decoded), ("_ceiling", unquantised)):
            row["psnr" + name] = psnr(image, other)
            row["mse" + name] = float(np.mean((image.astype(np.float64) - other) ** 2))
        rows.append(row)
    return rows


# ---------------------------------------------------------------- means


def means_of(rows: Sequence[Numbers], qualities: Sequence[float | None]) -> Numbers:
    """Average everything over images but the map of bits; errors before their ratio.

    Args:
        rows: what `numbers_of` returned for each image, and `ceiling_of` under `ceiling`.
        qualities: those of `ceiling_of`.
    """
    averaged = ("spectrum", "log_amplitude", "correlation", "field")
    alphas = {block: [row["alpha"][block] for row in rows] for block in rows[0]["alpha"]}
    numbers = {
        "spectrum_of": rows[0]["spectrum_of"],
        **{key: _mean([row[key] for row in rows]) for key in averaged},
        "field_square": FIELD_SQUARE,
        "fusion": {
            block: {
                "alpha": np.mean(values, axis=0).tolist(),
                # How much the weights follow the content: what a fixed weight would not have.
                "deviation_over_images": float(np.std(values, axis=0).mean()),
            }
            for block, values in alphas.items()
        },
        "bits": {key: _mean([row["bits"][key] for row in rows]) for key in ("y_bpp", "z_bpp")},
    }
    for k, quality in enumerate(qualities):
        mean = _mean([row["ceiling"][k] for row in rows])
        error, ceiling = mean.pop("mse"), mean.pop("mse_ceiling")
        share = ceiling / error if error else 0.0
        numbers.setdefault("ceiling", []).append(
            {"quality": quality, **mean, "share_of_error": share}
        )
    return numbers


def _mean(values: list) -> Any:
    """The mean of numbers, or of lists and objects of numbers, element by element."""
    if isinstance(values[0], dict):
        return {key: _mean([value[key] for value in values]) for key in values[0]}
    return np.mean(values, axis=0).tolist()


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, help="folder of images with sides of at least 64 pixels")
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    add("--model", default="tiny", help="name or directory (default: tiny)")
    add("--quality", type=float, help="default: 4, where a model has qualities")
    add("--limit", type=int, metavar="N", help="only the first N images")
    shown_help = "the image of bits.png: one of the folder, or another file (default: the first)"
    add("--image", metavar="NAME", help=shown_help)
    ceiling = (
        "also PSNR with the quantiser off, and the share of the error that no rate removes, at "
        "these qualities (default: all whole ones)"
    )
    add("--ceiling", nargs="*", type=float, metavar="QUALITY", help=ceiling)
    add("--fresh", action="store_true", help="discard what an earlier run left unfinished")
    args = parser.parse_args(argv)
    provenance = {
        **of_run("analyze.py", argv),
        "versions": versions("cmamba-ref", "torch", "numpy"),
    }
    conditions = {key: provenance[key] for key in provenance if key not in ("command", "date")}
    output = args.output / "analysis.json"
    try:
        paths = image_paths(args.folder, args.limit)
        names = {path.name: path for path in paths}
        shown = names.get(args.image, Path(args.image)) if args.image else paths[0]
        if not shown.is_file():
            raise CMambaError(f"--image must be an image or a file, got {args.image!r}")
        model = CMamba.from_pretrained(args.model)
        quality = model.check_quality(args.quality)
        whole = range(1, len(model.config.lmbdas) + 1)
        ceilings: list[float | None] = []
        if args.ceiling is not None:
            ceilings = [model.check_quality(q) for q in args.ceiling or whole or [None]]
        args.output.mkdir(parents=True, exist_ok=True)
        kept = PartialResults(output, conditions, fresh=args.fresh)
        new_figure(1, 1)  # before any work, not after all of it
    except ImportError as error:
        parser.error(f"{error}; in a clone: python -m pip install '.[eval]'")
    except (CMambaError, OSError) as error:
        parser.error(str(error))

    seen: dict[Path, Numbers] = {}
    bad = 0
    try:
        for path in tqdm(dict.fromkeys([*paths, shown]), unit="image", disable=None):
            # An image that is not in the folder is in no mean.
            at = ceilings if path in paths else []
            try:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                key = f"{model.model_id.hex()} {quality} {at} {digest}"
                if key not in kept.results:
                    image = read_rgb(path)
                    found = numbers_of(model, image, quality)
                    kept.add(key, found | {"ceiling": ceiling_of(model, image, at)})
            except Exception as error:
                if (text := explain(error)) is None:
                    raise
                bad += 1
                tqdm.write(f"left out: {path.name}: {text}", file=sys.stderr)
                continue
            seen[path] = kept.results[key]
    except KeyboardInterrupt:
        print(f"interrupted; {len(kept.results)} images are kept in {kept.path}", file=sys.stderr)
        return 130
    used = [path for path in paths if path in seen]
    if not used:
        print(f"no image in {args.folder} that can be analysed", file=sys.stderr)
        return 1

    shown = shown if shown in seen else used[0]
    numbers = means_of([seen[path] for path in used], ceilings)
    numbers["bits"] |= {"image": shown.name, "map": seen[shown]["bits"]["map"]}
    for name, draw in FIGURES.items():
        if (figure := draw(numbers, shown)) is not None:
            save(figure, args.output / f"{name}.png")
    numbers["meta"] = {
        **provenance,
        "model": {"name": model.config.name, "id": model.model_id.hex(), "quality": quality},
        "images": {"folder": args.folder.resolve().name, "names": [path.name for path in used]},
    }
    write_atomically(output, (json.dumps(numbers) + "\n").encode())
    kept.discard()
    for row in numbers.get("ceiling", []):
        print(CEILING.format(**row))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

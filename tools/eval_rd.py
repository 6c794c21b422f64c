"""Rate and distortion of a model on a folder of pictures, measured on real files, beside JPEG.

    python tools/eval_rd.py photos -o rd.json
    python tools/eval_rd.py photos --model tiny --qualities 1 4 8

Every picture is encoded to a file and decoded from it.  Rate is the size of the file, header
included; PSNR and MS-SSIM are those of the decoded 8-bit pictures, averaged over pictures.  The
JSON has CompressAI's layout (one list per measure, one entry per quality), one object per codec,
and says under `meta` what it was measured with.  BD-rate is against JPEG 4:2:0 on the same
pictures, by PSNR with piecewise cubic interpolation, over the range of PSNR that both reach.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from provenance import of_run
from tqdm import tqdm

import cmamba_ref
from cmamba_ref import CMamba, CMambaError
from cmamba_ref.demo import JPEG
from cmamba_ref.files import write_atomically
from cmamba_ref.images import read_image
from cmamba_ref.metrics import MS_SSIM_MIN_SIDE, bits_per_pixel, ms_ssim, psnr

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
JPEG_QUALITIES = (5, 10, 20, 30, 40, 50, 60, 70, 80, 90)
MEASURES = ("bpp", "psnr-rgb", "ms-ssim-rgb", "encoding_time", "decoding_time")

# A codec at one quality: picture and a path to write to; gives the picture back, and two times.
Codec = Callable[[np.ndarray, Path], tuple[np.ndarray, float, float]]


def cmamba_codec(model: CMamba, quality: float | None) -> Codec:
    """Our codec, through a file."""

    def code(picture: np.ndarray, path: Path) -> tuple[np.ndarray, float, float]:
        start = time.perf_counter()
        write_atomically(path, cmamba_ref.encode(model, picture, quality))
        encoded = time.perf_counter()
        decoded = cmamba_ref.decode(path.read_bytes(), model)
        return decoded, encoded - start, time.perf_counter() - encoded

    return code


def jpeg_codec(quality: int) -> Codec:
    """JPEG 4:2:0 with optimised tables, as Pillow writes it."""

    def code(picture: np.ndarray, path: Path) -> tuple[np.ndarray, float, float]:
        start = time.perf_counter()
        write_atomically(path, JPEG.encode(picture, quality))
        encoded = time.perf_counter()
        with Image.open(path) as image:
            decoded = np.array(image.convert("RGB"))
        return decoded, encoded - start, time.perf_counter() - encoded

    return code


def measure(code: Codec, pictures: list[np.ndarray], path: Path) -> list[dict[str, float]]:
    """All measures of one codec at one quality, for each picture."""
    rows = []
    for picture in pictures:
        decoded, encoding, decoding = code(picture, path)
        height, width = picture.shape[:2]
        rows.append(
            {
                "bpp": bits_per_pixel(path.stat().st_size, width, height),
                "psnr-rgb": psnr(picture, decoded),
                "ms-ssim-rgb": ms_ssim(picture, decoded),
                "encoding_time": encoding,
                "decoding_time": decoding,
            }
        )
    return rows


def bd_rate(anchor: dict[str, list[float]], test: dict[str, list[float]]) -> float:
    """Bjontegaard delta rate of `test` against `anchor` in per cent, negative where it saves.

    Needs the package `bjontegaard` (extra `eval`).

    Raises:
        ValueError: fewer than four points, or no PSNR that both reach.
    """
    from bjontegaard import bd_rate as bjontegaard_delta_rate

    points = []
    for results in (anchor, test):
        pairs = sorted(zip(results["bpp"], results["psnr-rgb"], strict=True))
        points += [np.array(column) for column in zip(*pairs, strict=True)]
    ranges = [(curve.min(), curve.max()) for curve in points[1::2]]
    if min(len(curve) for curve in points) < 4:
        raise ValueError("it takes four points of each codec")
    if max(low for low, _ in ranges) >= min(high for _, high in ranges):
        raise ValueError("there is no PSNR that both codecs reach")
    percent = bjontegaard_delta_rate(
        *points, method="pchip", require_matching_points=False, min_overlap=0
    )
    assert isinstance(percent, float)  # a tuple only where interpolators are asked for
    return percent


def provenance(
    folder: Path, names: list[str], model: CMamba, command: list[str]
) -> dict[str, object]:
    """What the numbers were measured with."""
    return {
        **of_run("eval_rd.py", command),
        "versions": {
            "cmamba-ref": cmamba_ref.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
        "model": {"name": model.config.name, "id": model.model_id.hex()},
        "pictures": {"folder": folder.resolve().name, "names": names},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, help="folder of pictures with sides of at least 161 pixels")
    add("--model", default="tiny", help="name or directory (default: tiny)")
    add("--qualities", type=float, nargs="+", help="default: every whole quality of the model")
    add("--limit", type=int, help="only the first so many pictures")
    add("-o", "--output", type=Path, help="write the JSON here")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.output and not args.output.parent.is_dir():
        parser.error(f"-o must lie in an existing directory, got {str(args.output)!r}")

    paths = sorted(p for p in args.folder.glob("*") if p.suffix.lower() in SUFFIXES)[: args.limit]
    if not paths:
        parser.error(f"no pictures in {str(args.folder)!r}")
    try:
        pictures = [read_image(path) for path in paths]
        model = CMamba.from_pretrained(args.model)
        for quality in args.qualities or ():
            model.check_quality(quality)
    except (CMambaError, OSError) as error:
        parser.error(str(error))
    for path, picture in zip(paths, pictures, strict=True):
        if min(picture.shape[:2]) < MS_SSIM_MIN_SIDE:
            parser.error(f"{path} has a side of less than {MS_SSIM_MIN_SIDE} pixels")
    # A grey picture is measured as three equal planes, by every codec.
    pictures = [p if p.ndim == 3 else np.stack([p] * 3, axis=-1) for p in pictures]

    qualities = args.qualities or (
        [float(q) for q in range(1, len(model.config.lmbdas) + 1)]
        if model.config.variable_rate
        else [None]
    )
    runs = [("cmamba", quality, cmamba_codec(model, quality)) for quality in qualities]
    runs += [("jpeg420", quality, jpeg_codec(quality)) for quality in JPEG_QUALITIES]
    report: dict[str, dict] = {
        name: {
            "name": description,
            "results": {"quality": [], **{key: [] for key in MEASURES}},
            "per_picture": [],
        }
        for name, description in (
            ("cmamba", f"CMamba {model.config.name}"),
            ("jpeg420", "JPEG 4:2:0, optimised tables"),
        )
    }
    # The first call of a model sets things up; that is not the time of a picture.
    cmamba_ref.decode(cmamba_ref.encode(model, pictures[0], qualities[0]), model)
    with tempfile.TemporaryDirectory() as scratch, tqdm(runs, disable=None) as progress:
        for name, quality, code in progress:
            rows = measure(code, pictures, Path(scratch) / "file")
            results = report[name]["results"]
            results["quality"].append(quality)
            for key in MEASURES:
                results[key].append(float(np.mean([row[key] for row in rows])))
            report[name]["per_picture"].append(rows)
            means = "  ".join(f"{key} {results[key][-1]:8.4f}" for key in MEASURES)
            tqdm.write(f"{name:<8} quality {str(quality):<5} {means}", file=sys.stdout)
    report["meta"] = provenance(args.folder, [path.name for path in paths], model, argv)
    try:
        rate = bd_rate(report["jpeg420"]["results"], report["cmamba"]["results"])
    except (ImportError, ValueError) as error:
        print(f"no BD-rate: {error}")
    else:
        report["meta"]["bd_rate_vs_jpeg420_percent"] = round(rate, 2)
        print(f"BD-rate against JPEG 4:2:0 by PSNR: {rate:+.1f} %")
    if args.output:
        write_atomically(args.output, (json.dumps(report, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())

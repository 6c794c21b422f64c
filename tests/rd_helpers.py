"""Curves whose BD-rates are known, in files as tools write them."""

import json
from pathlib import Path

VTM = [(0.06, 26.1), (0.12, 28.6), (0.25, 31.3), (0.49, 34.3), (0.9, 37.4)]
MS_SSIM = [0.9, 0.95, 0.97, 0.99, 0.995]


def scaled(points, factor=0.5):
    """A codec that takes so much of the rate for the same quality."""
    return [(factor * rate, quality) for rate, quality in points]


def write_results(folder: Path) -> Path:
    """What tools/eval_rd.py would write: JPEG at twice VTM's rate, and ours at 1.2 times VTM's."""
    ours, jpeg = (list(zip(*scaled(VTM, factor), strict=True)) for factor in (1.2, 2))
    content = {
        "cmamba": {
            "name": "CMamba <random>",
            "results": {
                "quality": [1, 2, 3, 4, 5],
                "bpp": ours[0],
                "psnr-rgb": ours[1],
                "ms-ssim-rgb": MS_SSIM,
                "encoding_time": [0.111, 0.2, 0.3, 0.4, 0.5],
            },
            "per_image": [],
        },
        "jpeg420": {"name": "JPEG", "results": {"bpp": jpeg[0], "psnr-rgb": jpeg[1]}},
        "meta": {"commit": "abc1234", "machine": "an abacus", "images": {"folder": "kodak"}},
    }
    path = folder / "rd.json"
    path.write_text(json.dumps(content))
    return path


def write_anchors(folder: Path) -> Path:
    """A table of published points on two sets of images, with one curve that is too short."""
    rates, psnr = zip(*VTM, strict=True)
    curve = {"bpp": rates, "psnr": psnr, "source": "table 7"}
    content = {"kodak": {"VTM-9.1": curve, "short": {"bpp": [0.1], "psnr": [30]}}}
    path = folder / "anchors.json"
    path.write_text(json.dumps(content | {"clic": {"VTM-9.1": curve}, "other": {}}))
    return path

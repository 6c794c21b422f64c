"""Write the golden files anew: `python tests/golden/make.py`, from the root of the repository.

Only needed when the format's version changes: files that exist must decode for ever.  The model is
kept where there is one; `--model` draws another, which makes every file new.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

GOLDEN = Path(__file__).resolve().parent
sys.path[:0] = [str(GOLDEN.parents[1]), str(GOLDEN.parent)]

from codec_helpers import SMALL, make_image, random_model  # noqa: E402

import cmamba_ref  # noqa: E402


def noise(height: int, width: int) -> np.ndarray:
    """What no entropy model expects, `[H, W, 3]`: its symbols escape."""
    return np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)


PICTURES = {
    "pixel": (np.array([[[200, 120, 40]]], dtype=np.uint8), 1.0),
    "colour": (make_image(61, 83), 6.3),
    "grey": (make_image(64, 130, seed=1)[..., 1], 1.37),
    "noise": (noise(150, 170), 8.0),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="store_true", help="draw a new random model first")
    if parser.parse_args(argv).model:
        random_model(SMALL).save_pretrained(GOLDEN / "model")
    model = cmamba_ref.CMamba.from_pretrained(GOLDEN / "model")
    for name, (image, quality) in PICTURES.items():
        data = cmamba_ref.encode(image, model, quality)
        (GOLDEN / f"{name}.cmb").write_bytes(data)
        Image.fromarray(image).save(GOLDEN / f"{name}.png")
        Image.fromarray(cmamba_ref.decode(data, model)).save(GOLDEN / f"{name}.decoded.png")
        print(f"{name}: {len(data)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write the golden files anew: `python tests/golden/make.py`, from the root of the repository.

Only needed when the format's version changes: files that exist must decode for ever.  The model is
kept where there is one; `--model` draws another, which makes every file new.
"""

import argparse
import sys
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

GOLDEN = Path(__file__).resolve().parent
sys.path[:0] = [str(GOLDEN.parents[1]), str(GOLDEN.parent)]

from codec_helpers import SMALL, make_image, random_model  # noqa: E402

import cmamba_ref  # noqa: E402
from cmamba_ref.codec.metadata import NO_METADATA, Metadata  # noqa: E402
from cmamba_ref.entropy import latent_coder  # noqa: E402


def noise(height: int, width: int) -> np.ndarray:
    """What no entropy model expects, `[H, W, 3]`: its symbols escape."""
    return np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)


def with_alpha(image: np.ndarray) -> np.ndarray:
    """The image with a disc of soft edge in it, and nothing around that."""
    row, column = np.mgrid[: image.shape[0], : image.shape[1]]
    distance = np.hypot(row - image.shape[0] / 2, column - image.shape[1] / 2)
    return np.dstack([image, (40 * (24 - distance)).clip(0, 255).astype(np.uint8)])


IMAGES = {
    "pixel": (np.array([[[200, 120, 40]]], dtype=np.uint8), 1.0),
    "colour": (make_image(61, 83), 6.3),
    "grey": (make_image(64, 130, seed=1)[..., 1], 1.37),
    "noise": (noise(150, 170), 8.0),
    "alpha": (with_alpha(make_image(61, 83)), 5.0),
    "full": (with_alpha(make_image(64, 70, seed=1)[..., 1]), 2.0),
}
# Of "full"; the profile is none, but nobody reads it here.
METADATA = Metadata(exif=b"MM\0*\0\0\0\x08" + bytes(6), icc_profile=bytes(range(200)), xmp=b"<x/>")
SKIPPED = 30


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="store_true", help="draw a new random model first")
    if parser.parse_args(argv).model:
        random_model(SMALL).save_pretrained(GOLDEN / "model")
    model = cmamba_ref.CMamba.from_pretrained(GOLDEN / "model")
    for name, (image, quality) in IMAGES.items():
        with mock.patch.object(latent_coder, "SKIPPED_TABLES", SKIPPED * (name == "full")):
            metadata = METADATA if name == "full" else NO_METADATA
            data = cmamba_ref.encode(image, model, quality, metadata=metadata)
        (GOLDEN / f"{name}.cmb").write_bytes(data)
        Image.fromarray(image).save(GOLDEN / f"{name}.png")
        Image.fromarray(cmamba_ref.decode(data, model)).save(GOLDEN / f"{name}.decoded.png")
        print(f"{name}: {len(data)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())

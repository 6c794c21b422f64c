"""The image formats that are read, with HEIC where pillow-heif is installed, and written."""

from __future__ import annotations

import functools
from contextlib import suppress

from PIL import Image

# What Pillow registers and does not decode, or only with another program.
NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF")
# What images are decoded to, with Pillow's names.
OUTPUT_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
OURS = ".cmb"  # registered by `cmamba_ref.pillow_plugin`
HEIF_SUFFIXES = (".heic", ".heif")
HEIF_HINT = "HEIC needs pillow-heif (pip install pillow-heif)"


@functools.cache
def register_heif() -> None:
    """Let Pillow read HEIC, if pillow-heif is installed."""
    with suppress(ImportError):
        import pillow_heif  # pyright: ignore[reportMissingImports]

        pillow_heif.register_heif_opener()


def suffixes() -> tuple[str, ...]:
    """Return the suffixes of the files to take of a folder of images, in lower case."""
    register_heif()
    found = Image.registered_extensions().items()
    return tuple(sorted(s for s, name in found if name not in NOT_DECODED and s != OURS))


def is_heif(start: bytes) -> bool:
    """Return whether a file that starts with these 12 bytes is HEIC, or HEIF of another codec."""
    brands = (b"heic", b"heim", b"heis", b"heix", b"hevc", b"hevx", b"mif1", b"msf1")
    return start[4:8] == b"ftyp" and start[8:12] in brands

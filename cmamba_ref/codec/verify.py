"""Verify that files decode: existing ones, and one that is being written."""

from __future__ import annotations

import numpy as np

from cmamba_ref.codec import image_codec
from cmamba_ref.codec.container import Container
from cmamba_ref.errors import BitstreamError
from cmamba_ref.model import CMamba


def verify_file(data: bytes, model: CMamba, *, max_pixels: int, max_memory: int | None) -> str:
    """Check a file down to its symbols, with `model` or the bundled model that made it.

    Args:
        data: the bytes of a `.cmb` file.
        max_pixels, max_memory: as in `cmamba_ref.decode`.

    Returns:
        A description of the file in a few words.

    Raises:
        ModelMismatchError: header and checksum are right, but the model it needs is not available.
        BitstreamError: damaged, truncated or too large.
        MemoryLimitError: more memory is needed than there is or than is allowed.
    """
    container = Container.unpack(data)
    model = image_codec.model_for(container.model_id, [model])
    image_codec.check_symbols(container, model, max_pixels=max_pixels, max_memory=max_memory)
    colours = "grey" if container.grey else "colour"
    colours += "" if container.alpha is None else " with alpha"
    return f"{container.width}x{container.height}, {colours}, model {model.config.name!r}"


def verify_encoded(
    stored: bytes,
    data: bytes,
    image: np.ndarray,
    model: CMamba,
    *,
    max_pixels: int,
    max_memory: int | None,
) -> np.ndarray:
    """Check the bytes of a file after `data` was written to it, or bytes that are about to be sent.

    Decoding compares the symbols with the check that the encoder computed from its own. The
    colours have no other copy to compare with: the encoder makes none. Alpha must be the same.

    Args:
        stored: the bytes read back.
        data: the bytes that `cmamba_ref.encode` returned for `image`.

    Returns:
        the decoded image.

    Raises:
        BitstreamError: other bytes, or bytes that do not decode to an image of that size.
    """
    if stored != data:
        raise BitstreamError("the bytes read back are not those written; check the disk")
    decoded = image_codec.decode(stored, model, max_pixels=max_pixels, max_memory=max_memory)
    if decoded.shape != image.shape:
        raise BitstreamError(
            f"an image of shape {list(image.shape)} came back as {list(decoded.shape)}"
        )
    if image_codec.has_alpha(image) and not np.array_equal(decoded[..., -1], image[..., -1]):
        raise BitstreamError("the alpha channel came back changed")
    return decoded

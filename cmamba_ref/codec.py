"""Pictures to bytes and back: what a file of this codec is made of."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from cmamba_ref import identity, memory
from cmamba_ref.bitstream import Container
from cmamba_ref.entropy.latent_coder import MULTIPLE, hyper_latent_shape
from cmamba_ref.errors import BitstreamError, InvalidArgumentError, OtherModelError
from cmamba_ref.model import CMamba

DEFAULT_MODEL = "tiny"
# Larger pictures are refused, when encoding and before anything is allocated when decoding.  What
# counts is the size after padding: a line of 1x100,000 pixels takes the memory of 64x100,032.
DEFAULT_MAX_PIXELS = 100_000_000


_loading = threading.Lock()


def shipped_model(name: str) -> CMamba:
    """A model that ships with the package, loaded once, on the CPU."""
    with _loading:  # a cache by itself lets threads load one each
        return _load_shipped(name)


@functools.cache
def _load_shipped(name: str) -> CMamba:
    return CMamba.from_pretrained(name)


def default_model() -> CMamba:
    """The model that ships with the package and is used where none is named."""
    return shipped_model(DEFAULT_MODEL)


def model_for(model_id: bytes, given: Iterable[CMamba]) -> CMamba:
    """The model of that id, among those `given` and then among those that ship.

    Raises:
        OtherModelError: it is none of them.
    """
    for model in given:
        if model.model_id == model_id:
            return model
    name = identity.name_of(model_id)
    if name is None:
        raise OtherModelError(
            f"the file needs model {model_id.hex()}, which is not available; "
            "docs/models.md lists the bundled models"
        )
    return shipped_model(name)


def encode(
    model: CMamba | None,
    image: np.ndarray,
    quality: float | None = None,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    max_memory: int | None = None,
) -> bytes:
    """Encode a picture.

    Args:
        model: `None` for the model that ships.
        image: uint8 `[H, W, 3]` in sRGB, or `[H, W]` grey; any size up to `max_pixels`.
        quality: 1 (small) to 8 (good), any number in between in steps of 0.01; `None` for the
            default of 4, and for a model of one rate.
        max_pixels: refuse larger pictures; sides count as padded to multiples of 64.
        max_memory: refuse pictures that will take more bytes than this on the CPU; None for what is
            available there, as far as the system tells.

    Returns:
        the bytes of a `.cmb` file, see docs/format.md.

    Raises:
        InvalidArgumentError: wrong shape, type, size or quality.
        MemoryLimitError: more memory is needed than there is or than is allowed.
    """
    model = model or default_model()
    if not isinstance(image, np.ndarray):
        raise InvalidArgumentError(
            f"`image` must be a NumPy array, got {type(image).__name__}; convert it first"
        )
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise InvalidArgumentError(
            f"`image` must be uint8 [H, W, 3] or [H, W], got {image.dtype}{list(image.shape)}; "
            "convert it to 8-bit RGB first"
        )
    height, width = image.shape[:2]
    rows, columns = hyper_latent_shape(height, width)
    if not 0 < rows * columns * MULTIPLE**2 <= max_pixels:
        raise InvalidArgumentError(
            f"`image` must have 1 to {max_pixels} pixels when its sides are padded to multiples of "
            f"{MULTIPLE}, got {width}x{height}; raise `max_pixels` if there is the memory"
        )
    _check_memory(model, height, width, max_memory)
    grey = image.ndim == 2
    rgb = np.stack([image] * 3, axis=-1) if grey else np.array(image)
    x = torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 255
    (y,), (z,) = model.compress(x, quality)["strings"]
    return Container(model.model_id, width, height, grey, y, z).pack()


def decode(
    data: bytes,
    model: CMamba | None = None,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    max_memory: int | None = None,
) -> np.ndarray:
    """Decode a picture.

    Args:
        data: the bytes of a `.cmb` file.
        model: the model it was encoded with; `None` for the one that ships.
        max_pixels: refuse files that declare more; sides count as padded to multiples of 64.
        max_memory: as in `encode`.

    Returns:
        uint8 `[H, W, 3]`, or `[H, W]` where the encoded picture was grey.

    Raises:
        BitstreamError: damaged, truncated, of another model, or too large.
        MemoryLimitError: more memory is needed than there is or than is allowed.
    """
    container = Container.unpack(data)
    model = model or default_model()
    y_bar, quality = _decode_latent(container, model, max_pixels, max_memory)
    x_hat = model.reconstruct(y_bar, quality)[0, :, : container.height, : container.width]
    rgb = (x_hat.float() * 255).round().to("cpu", torch.uint8).permute(1, 2, 0).numpy()
    if container.grey:
        return np.rint(rgb.mean(axis=2)).astype(np.uint8)
    return np.ascontiguousarray(rgb)


def check_symbols(
    container: Container,
    model: CMamba,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    max_memory: int | None = None,
) -> None:
    """Decode a file as far as its symbols, which are compared with their check; no picture is made.

    Limits and errors are those of `decode`.
    """
    _decode_latent(container, model, max_pixels, max_memory)


def _decode_latent(
    container: Container, model: CMamba, max_pixels: int, max_memory: int | None
) -> tuple[Tensor, Tensor | None]:
    """y_bar and quality as `CMamba.decode_latent` returns them, after all that is refused."""
    if container.model_id != model.model_id:
        raise OtherModelError(
            f"the file was made by model {container.model_id.hex()}, this is "
            f"{model.config.name!r} {model.model_id.hex()}; decode with the model it was made by"
        )
    rows, columns = hyper_latent_shape(container.height, container.width)
    if rows * columns * MULTIPLE**2 > max_pixels:
        raise BitstreamError(
            f"the file declares {container.width}x{container.height} pixels, with sides padded to "
            f"multiples of {MULTIPLE} more than the limit of {max_pixels}; "
            "raise `max_pixels` if you trust it"
        )
    _check_memory(model, container.height, container.width, max_memory)
    return model.decode_latent([[container.y], [container.z]], (rows, columns))


def _check_memory(model: CMamba, height: int, width: int, max_memory: int | None) -> None:
    if next(model.parameters()).device.type == "cpu":
        memory.check(model.config, height, width, max_memory)

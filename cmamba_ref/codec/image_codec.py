"""The codec: image to `.cmb` bytes and back."""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Iterable
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor

from cmamba_ref.bundled import name_of, pretrained_names
from cmamba_ref.codec import memory
from cmamba_ref.codec.container import Container
from cmamba_ref.codec.metadata import NO_METADATA, Metadata
from cmamba_ref.codec.refinement import Progress, check_effort, refine
from cmamba_ref.entropy.latent_coder import MULTIPLE, hyper_latent_shape
from cmamba_ref.errors import (
    InvalidArgumentError,
    ModelMismatchError,
    UnsupportedFileError,
)
from cmamba_ref.model import CMamba

DEFAULT_MODEL = "tiny"
# Larger images are refused, when encoding and before anything is allocated when decoding.  What
# counts is the size after padding: a line of 1x100,000 pixels takes the memory of 64x100,032.
DEFAULT_MAX_PIXELS = 100_000_000

SHAPES = "uint8 [H, W, 3] or [H, W], or with alpha [H, W, 4] or [H, W, 2]"
_CHANNELS = ((), (2,), (3,), (4,))

_loading = threading.Lock()


def loaded_model(name: str | os.PathLike, device: str = "cpu") -> CMamba:
    """Return `CMamba.from_pretrained(name, device)`, which is loaded once and stays in memory."""
    if not isinstance(name, str) or (name not in pretrained_names() and os.path.isdir(name)):
        name = os.path.abspath(name)  # another one where another folder is current
    with _loading:  # a cache by itself lets threads load one each
        return _load(name, device)


@functools.cache
def _load(name: str, device: str) -> CMamba:
    return CMamba.from_pretrained(name, device)


def loaded_or_given(model: str | os.PathLike | CMamba | None, device: str = "cpu") -> CMamba:
    """Return a model as it was given; that of a name or folder, or for None the default, loaded.

    Raises:
        InvalidArgumentError: it is no model.
        WeightsError: nothing there, damaged, or not to be downloaded.
    """
    if model is None or isinstance(model, str | os.PathLike):
        return loaded_model(DEFAULT_MODEL if model is None else model, device)
    return checked_model(model)


def default_model() -> CMamba:
    """Return the bundled model that is used where none is named."""
    return loaded_model(DEFAULT_MODEL)


def model_for(model_id: bytes, given: Iterable[CMamba]) -> CMamba:
    """Return the model of that id, from those `given` or else from the bundled ones.

    A bundled one is put on the device of the last model that was given.

    Raises:
        ModelMismatchError: it is none of them.
    """
    device = "cpu"
    for model in given:
        if model.model_id == model_id:
            return model
        device = str(next(model.parameters()).device)
    name = name_of(model_id)
    if name is None:
        raise ModelMismatchError(
            f"the file needs model {model_id.hex()}, which is not available; "
            "docs/models.md lists the bundled models"
        )
    return loaded_model(name, device)


def encode(
    image: np.ndarray,
    model: CMamba | None = None,
    quality: float | None = None,
    *,
    effort: int = 0,
    progress: Progress | None = None,
    metadata: Metadata = NO_METADATA,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    max_memory: int | None = None,
) -> bytes:
    """Encode an image.

    The earlier order, `encode(model, image, ...)`, still works, with a DeprecationWarning.

    Args:
        image: uint8 `[H, W, 3]` in sRGB, or `[H, W]` grey; `[H, W, 4]` or `[H, W, 2]` with an alpha
            channel, not premultiplied; any size up to `max_pixels`.  Alpha is lossless; what it
            hides, where it is 0, is not kept.
        model: None for the bundled model "tiny".
        quality: 1 (small) to 8 (good), any number in between in steps of 0.01; None for the
            default of 4, and for a fixed-rate model.
        effort: 0 (fast) to 9: search for a better file, for longer and longer; see
            `cmamba_ref.codec.refinement`. Decoding stays the same.
        progress: with an effort above 0, called after each step of the search with the number of
            steps done and of all; if it returns True, the search ends with the best so far.
        metadata: stored as it is: use `Metadata.upright` where pixels were turned.  With an ICC
            profile, the pixels are in that profile in place of sRGB.
        max_pixels: refuse larger images; sides count as padded to multiples of 64.
        max_memory: refuse images that will take more bytes than this on the CPU; None for what is
            available there, as far as the system tells.

    Returns:
        The bytes of a `.cmb` file, see docs/format.md.

    Raises:
        InvalidArgumentError: wrong type, shape, size or quality.
        WeightsError: the model has no entropy tables.
        CMambaError: the weights hold NaN or infinity.
        MemoryLimitError: more memory is needed than there is or than is allowed.
    """
    if is_model(image) or (image is None and not (model is None or is_model(model))):
        warnings.warn(
            "encode(model, image, ...) is deprecated; write encode(image, model, ...)",
            DeprecationWarning,
            stacklevel=2,
        )
        image, model = model, image  # type: ignore[assignment]
    check_image(image)
    if not isinstance(metadata, Metadata):
        raise InvalidArgumentError(f"`metadata` must be a Metadata, got {_described(metadata)}")
    model = checked_model(model)
    steps = check_effort(effort, model)
    height, width = image.shape[:2]
    rows, columns = hyper_latent_shape(height, width)
    if not 0 < rows * columns * MULTIPLE**2 <= max_pixels:
        raise InvalidArgumentError(
            f"`image` must have 1 to {max_pixels} pixels when its sides are padded to multiples of "
            f"{MULTIPLE}, got {width}x{height}; raise `max_pixels` if there is the memory"
        )
    _check_memory(model, height, width, max_memory, refined=steps > 0)
    colours, alpha = visible_colours(image)
    packed_alpha = None
    if alpha is not None:
        from cmamba_ref.codec.alpha import pack_alpha

        packed_alpha = pack_alpha(alpha)
    x = as_input(colours)
    if steps:
        coded = refine(model, x, quality, steps, progress)
    else:
        coded = model.compress(x, quality)
    (y,), (z,) = coded["strings"]
    grey = is_grey(image)
    file = Container(model.model_id, width, height, grey, y, z, packed_alpha, metadata)
    return file.pack()


def decode(
    data: bytes | bytearray | memoryview,
    model: CMamba | None = None,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    max_memory: int | None = None,
) -> np.ndarray:
    """Decode an image.

    Args:
        data: the bytes of a `.cmb` file.
        model: the model it was encoded with; None for the bundled model that it names.
        max_pixels: refuse files that declare more; sides count as padded to multiples of 64.
        max_memory: as in `encode`.

    Returns:
        uint8 `[H, W]`, `[H, W, 2]`, `[H, W, 3]` or `[H, W, 4]`, the shape that was encoded.  Its
        metadata is in `Container.unpack(data).metadata`, of `cmamba_ref.codec.container`.

    Raises:
        InvalidArgumentError: `data` is not bytes, or `model` is no model.
        BitstreamError: damaged, truncated, of another model, or too large.
        MemoryLimitError: more memory is needed than there is or than is allowed.
    """
    container = Container.unpack(_as_bytes(data))
    return decode_container(container, model, max_pixels=max_pixels, max_memory=max_memory)


def decode_container(
    container: Container,
    model: CMamba | None = None,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    max_memory: int | None = None,
) -> np.ndarray:
    """Decode the image of a file that is unpacked already, for callers that need its metadata too.

    Arguments, result and errors are those of `decode`.
    """
    given = checked_model(model)
    model = model_for(container.model_id, [given]) if model is None else given
    y_bar, quality = _decode_latent(container, model, max_pixels, max_memory)
    alpha = _unpacked_alpha(container)
    x_hat = model.reconstruct(y_bar, quality)[0, :, : container.height, : container.width]
    rgb = (x_hat.float() * 255).round().to("cpu", torch.uint8).permute(1, 2, 0).numpy()
    colours = np.rint(rgb.mean(axis=2, keepdims=True)).astype(np.uint8) if container.grey else rgb
    if alpha is not None:
        colours = np.concatenate([colours, alpha[..., None]], axis=2)
    return np.ascontiguousarray(colours).reshape(container.header.shape)


def check_symbols(
    container: Container,
    model: CMamba,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    max_memory: int | None = None,
) -> None:
    """Decode a file's alpha channel and its symbols and check their CRC, without making an image.

    Limits and errors are those of `decode`.
    """
    _decode_latent(container, model, max_pixels, max_memory)
    _unpacked_alpha(container)


def is_grey(image: np.ndarray) -> bool:
    """Return whether an image of one of the forms that `encode` takes has no colours."""
    return image.shape[2:] in ((), (2,))


def has_alpha(image: np.ndarray) -> bool:
    """Return whether an image of one of the forms that `encode` takes has an alpha channel."""
    return image.shape[2:] in ((2,), (4,))


def is_image(array: np.ndarray) -> bool:
    """Return whether an array has one of the forms that `encode` takes, `SHAPES`."""
    return (
        isinstance(array, np.ndarray)
        and array.dtype == np.uint8
        and array.ndim in (2, 3)
        and array.shape[2:] in _CHANNELS
    )


def is_model(value: object) -> TypeGuard[CMamba]:
    """Return whether a value is a model, as it is or compiled."""
    # `torch.compile` wraps a model in a module that passes its methods through.
    return isinstance(getattr(value, "_orig_mod", value), CMamba)


def checked_model(model: CMamba | None) -> CMamba:
    """Return the model, the default one for None.

    Raises:
        InvalidArgumentError: it is no model.
    """
    if model is None:
        return default_model()
    if not is_model(model):
        raise InvalidArgumentError(
            f"`model` must be a CMamba or None, got {_described(model)}; "
            "load one with CMamba.from_pretrained"
        )
    return model


def check_image(image: np.ndarray) -> None:
    """Refuse what is no image of one of the forms that `encode` takes.

    Raises:
        InvalidArgumentError: another type or shape.
    """
    if not isinstance(image, np.ndarray):
        raise InvalidArgumentError(
            f"`image` must be a NumPy array, {SHAPES}, "
            f"got {_described(image)}; {_to_array_hint(image)}"
        )
    if not is_image(image):
        raise InvalidArgumentError(
            f"`image` must be {SHAPES}, got {image.dtype}{list(image.shape)}; "
            "convert it to 8 bits first"
        )


def visible_colours(image: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the colours that are coded, `[H, W, 3]` or `[H, W]`, and the alpha channel, if any."""
    if not has_alpha(image):
        return image, None
    from cmamba_ref.codec.alpha import fill_hidden

    colours, alpha = image[..., 0] if is_grey(image) else image[..., :3], image[..., -1]
    return fill_hidden(colours, alpha), alpha


def as_input(colours: np.ndarray) -> Tensor:
    """Return colours, uint8 `[H, W, 3]` or `[H, W]`, as a model takes them, `[1, 3, H, W]`."""
    rgb = np.stack([colours] * 3, axis=-1) if colours.ndim == 2 else np.array(colours)
    return torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 255


def _unpacked_alpha(container: Container) -> np.ndarray | None:
    if container.alpha is None:
        return None
    from cmamba_ref.codec.alpha import unpack_alpha

    return unpack_alpha(container.alpha, container.height, container.width)


def _to_array_hint(value: object) -> str:
    if isinstance(value, str | bytes | os.PathLike):
        return "read the file first, with cmamba_ref.codec.images.read_image"
    if isinstance(value, Tensor):
        return "convert it to 8 bits with the channels last, then call .numpy()"
    return "convert it first"


def _as_bytes(data: bytes | bytearray | memoryview) -> bytes:
    if isinstance(data, bytes):
        return data
    try:
        return bytes(memoryview(data))
    except TypeError as error:
        raise InvalidArgumentError(
            f"`data` must be the bytes of a .cmb file, got {_described(data)}; "
            "read the file first, for instance with pathlib.Path.read_bytes"
        ) from error


def _described(value: object) -> str:
    """The type of a wrong argument, with its value where that is short."""
    name = type(value).__name__
    if isinstance(value, Tensor):
        return f"{name} {value.dtype}{list(value.shape)}"
    if isinstance(value, str | os.PathLike | bool | int | float):
        return f"{name} {value!r}"
    return name


def _decode_latent(
    container: Container, model: CMamba, max_pixels: int, max_memory: int | None
) -> tuple[Tensor, Tensor | None]:
    """Return y_bar and quality as `CMamba.decode_latent` does, after all checks of the header."""
    if container.model_id != model.model_id:
        raise ModelMismatchError(
            f"the file was made by model {container.model_id.hex()}, this is "
            f"{model.config.name!r} {model.model_id.hex()}; decode with the model it was made by"
        )
    rows, columns = hyper_latent_shape(container.height, container.width)
    if rows * columns * MULTIPLE**2 > max_pixels:
        raise UnsupportedFileError(
            f"the file declares {container.width}x{container.height} pixels, with sides padded to "
            f"multiples of {MULTIPLE} more than the limit of {max_pixels}; "
            "raise `max_pixels` if you trust it"
        )
    _check_memory(model, container.height, container.width, max_memory)
    return model.decode_latent([[container.y], [container.z]], (rows, columns))


def _check_memory(
    model: CMamba, height: int, width: int, max_memory: int | None, *, refined: bool = False
) -> None:
    if next(model.parameters()).device.type == "cpu":
        memory.check(model.config, height, width, max_memory, refined=refined)

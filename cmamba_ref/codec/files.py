"""All that one file needs, from path to path: for programs, and for engines that map over files.

Arguments, results and errors can be pickled, and this module imports neither torch nor Pillow
before there is work, so that `concurrent.futures`, Dask, Ray and Spark can spread `encode_file`
and `decode_file` over processes; see docs/scale.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cmamba_ref.atomic_write import check_writable, write_atomically
from cmamba_ref.errors import (
    InvalidArgumentError,
    MemoryLimitError,
    explain,
    is_out_of_memory,
    one_line,
    printable,
)

if TYPE_CHECKING:
    import numpy as np

    from cmamba_ref.codec.metadata import Metadata
    from cmamba_ref.codec.refinement import Progress
    from cmamba_ref.model import CMamba


@dataclass(frozen=True)
class EncodeOptions:
    """How an image file is read and encoded, and what its output keeps.

    Attributes:
        quality: as in `cmamba_ref.encode`.
        target: in place of a quality, as `cmamba_ref.codec.targets.Target`.
        nearest, effort: as in `cmamba_ref.codec.targets.encode_to`.
        keep_metadata: keep EXIF, XMP and the ICC profile, with the pixels in its space.
        keep_time: give the output the input's time of change.
        background, strict_color, lenient, convert: as in `cmamba_ref.codec.images.read_image`.
        verify: decode the file that was written before it gets its name.
        max_pixels, max_memory: as in `cmamba_ref.encode`; None for the defaults.

    Raises:
        InvalidArgumentError: a quality beside a target, or `nearest` without one.
    """

    quality: float | None = None
    target: tuple[str, float] | None = None
    nearest: bool = False
    effort: int = 0
    keep_metadata: bool = False
    keep_time: bool = False
    background: tuple[int, int, int] | None = None
    strict_color: bool = False
    lenient: bool = False
    convert: bool = False
    verify: bool = False
    max_pixels: int | None = None
    max_memory: int | None = None

    def __post_init__(self) -> None:
        if self.quality is not None and self.target is not None:
            raise InvalidArgumentError(
                f"`quality` must be None with a target, got {self.quality}; leave one of them out"
            )
        if self.nearest and self.target is None:
            raise InvalidArgumentError("`nearest` must come with a target, got none; leave it out")


@dataclass(frozen=True)
class DecodeOptions:
    """How a `.cmb` file is decoded.

    Attributes:
        output_quality, max_side: as in `cmamba_ref.codec.output.image_bytes`.
        keep_time: give the output the input's time of change.
        max_pixels, max_memory: as in `cmamba_ref.decode`; None for the defaults.
    """

    output_quality: int | None = None
    max_side: int | None = None
    keep_time: bool = False
    max_pixels: int | None = None
    max_memory: int | None = None


@dataclass(frozen=True)
class FileResult:
    """Result for one file; it can be pickled.

    Attributes:
        source, output: the paths.
        bytes_in, bytes_out: sizes of both files.
        width, height: of the image, before `max_side` shrinks it; 0 where it was skipped or failed.
        quality: the quality that was found, where a target was given.
        dropped: names of the metadata that was not kept.
        skipped: the output existed already, and nothing was done.
        error: one line with the reason of a failure, if `on_error` is "return".
    """

    source: str
    output: str
    bytes_in: int = 0
    bytes_out: int = 0
    width: int = 0
    height: int = 0
    quality: float | None = None
    dropped: tuple[str, ...] = ()
    skipped: bool = False
    error: str | None = None


class Source(NamedTuple):
    """An image to encode, the metadata to store, names of what is dropped, and the file's size."""

    image: np.ndarray
    metadata: Metadata
    dropped: tuple[str, ...]
    size: int


def encode_file(
    source: str | os.PathLike,
    output: str | os.PathLike | None = None,
    model: str | os.PathLike | CMamba | None = None,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    on_error: str = "raise",
    **options: Any,
) -> FileResult:
    """Encode an image file to a `.cmb` file, which appears under its name when it is complete.

    A call with the same arguments can be repeated, as engines do after the loss of a worker: it
    does nothing where the output exists.

    Args:
        source: a file in any format that Pillow reads.
        output: the `.cmb` file; its folder is made where missing. None for beside the input.
        model: a name, folder or repository as in `CMamba.from_pretrained`, which is loaded once in
            each process; or a model; None for the bundled model "tiny".
        device: to load the model on, if `model` is not one.
        overwrite: replace an output that exists.
        on_error: "raise", or "return" a result with the `error` of a file that cannot be read,
            encoded or written. Mistakes in this package are raised in both cases.
        options: the fields of `EncodeOptions`.

    Raises:
        CMambaError: as `cmamba_ref.codec.images.read_image`, `cmamba_ref.encode`,
            `cmamba_ref.codec.targets.encode_to` and `CMamba.from_pretrained`.
        OSError: a file cannot be read or written.
    """
    settings = EncodeOptions(**options)

    def work(source: Path, output: Path) -> FileResult:
        from cmamba_ref.codec import loaded_or_given

        read = read_source(source.read_bytes(), str(source), settings)
        return write_encoded(source, output, read, loaded_or_given(model, device), settings)

    return _one_file(work, Path(source), output, ".cmb", overwrite, on_error)


def decode_file(
    source: str | os.PathLike,
    output: str | os.PathLike | None = None,
    model: str | os.PathLike | CMamba | None = None,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    on_error: str = "raise",
    **options: Any,
) -> FileResult:
    """Decode a `.cmb` file to a PNG, JPEG or WebP file, as the suffix of `output` says.

    Arguments are those of `encode_file`, except:

    Args:
        output: None for a PNG file beside the input.
        options: the fields of `DecodeOptions`.

    Raises:
        CMambaError: as `cmamba_ref.decode` and `CMamba.from_pretrained`; also where the format of
            the output cannot hold the image.
        OSError: a file cannot be read or written.
    """
    settings = DecodeOptions(**options)

    def work(source: Path, output: Path) -> FileResult:
        from cmamba_ref.codec import loaded_or_given

        return write_decoded(source, output, loaded_or_given(model, device), settings)

    return _one_file(work, Path(source), output, ".png", overwrite, on_error)


def _one_file(
    work: Callable[[Path, Path], FileResult],
    source: Path,
    output: str | os.PathLike | None,
    suffix: str,
    overwrite: bool,
    on_error: str,
) -> FileResult:
    if on_error not in ("raise", "return"):
        raise InvalidArgumentError(f'`on_error` must be "raise" or "return", got {on_error!r}')
    path = source.with_suffix(suffix) if output is None else Path(output)
    result = FileResult(str(source), str(path))
    try:
        check_output_path(path, source)
        if os.path.isfile(path) and not overwrite:
            return replace(result, skipped=True)
        check_writable(path)
        return work(source, path)
    except Exception as error:
        text = explain(error)
        if on_error == "raise" or text is None:
            raise
        return replace(result, error=naming(source, text))


def check_output_path(path: Path, source: Path) -> None:
    """Refuse an output that is no file: a pipe or a device would be replaced by one.

    Raises:
        InvalidArgumentError: also where it is the input.
    """
    is_other = os.path.exists(path) and not os.path.isfile(path)
    if is_other or os.path.realpath(path) == os.path.realpath(source):
        raise InvalidArgumentError(
            f"the output must be a file, and another one than the input, got {str(path)!r}"
        )


def naming(source: Path | str, text: str) -> str:
    """Return one line about a file, which begins with its name."""
    name, in_text = printable(source), one_line(source)
    told = (f"{name} ", f"{name}:", f"{in_text} ", f"{in_text}:")
    return text if text.startswith(told) else f"{name}: {text}"


# ---------------------------------------------------------------- the steps


def read_source(data: bytes, name: str, options: EncodeOptions) -> Source:
    """Read the image file in `data`, which errors call `name`.

    Raises:
        ImageError: as `cmamba_ref.codec.images.read_image`.
    """
    from cmamba_ref.codec.images import parse_image
    from cmamba_ref.codec.metadata import NO_METADATA

    image, metadata = parse_image(
        data,
        name,
        max_pixels=limits(options)["max_pixels"],
        background=options.background,
        strict_color=options.strict_color,
        lenient=options.lenient,
        convert=options.convert,
        keep_metadata=options.keep_metadata,
    )
    if options.keep_metadata:
        return Source(image, metadata, (), len(data))
    return Source(image, NO_METADATA, tuple(metadata.names()), len(data))


def check_model(model: CMamba, options: EncodeOptions) -> None:
    """Refuse a model that cannot encode as `options` ask for.

    Raises:
        InvalidArgumentError: it has not that quality, or takes no effort or no target.
    """
    from cmamba_ref.codec.refinement import check_effort
    from cmamba_ref.codec.targets import check_target

    model.check_quality(options.quality)
    check_effort(options.effort, model)
    if options.target is not None:
        check_target(options.target, model)


def encode_source(
    read: Source, model: CMamba, options: EncodeOptions, progress: Progress | None = None
) -> tuple[bytes, float | None]:
    """Encode an image as `options` ask for.

    Args:
        progress: as in `cmamba_ref.encode`.

    Returns:
        the file, and the quality that was found where a target was given.

    Raises:
        TargetError, CMambaError: as `cmamba_ref.codec.targets.encode_to` and `cmamba_ref.encode`.
    """
    from cmamba_ref.codec import encode

    settings = limits(options) | {
        "effort": options.effort,
        "progress": progress,
        "metadata": read.metadata,
    }
    if options.target is None:
        return encode(read.image, model, options.quality, **settings), None
    from cmamba_ref.codec.targets import encode_to

    found = encode_to(read.image, model, target=options.target, nearest=options.nearest, **settings)
    return found.data, found.quality


def write_encoded(
    source: Path, output: Path, read: Source, model: CMamba, options: EncodeOptions
) -> FileResult:
    """Encode the image that was read from `source`, and write it.

    Raises:
        CMambaError, OSError: as `encode_file`.
    """
    from cmamba_ref.codec.verify import verify_encoded

    data, quality = encode_source(read, model, options)
    decoded = None

    def check(written: Path) -> None:
        nonlocal decoded
        decoded = verify_encoded(written.read_bytes(), data, read.image, model, **limits(options))

    output.parent.mkdir(parents=True, exist_ok=True)
    time_from = source if options.keep_time else None
    write_atomically(output, data, check if options.verify else None, time_from=time_from)
    warn_of_graphics(read, model, options, quality, data, decoded)
    height, width = read.image.shape[:2]
    sizes = read.size, len(data), width, height
    return FileResult(str(source), str(output), *sizes, quality, read.dropped)


def warn_of_graphics(
    read: Source,
    model: CMamba,
    options: EncodeOptions,
    quality: float | None,
    data: bytes,
    decoded: np.ndarray | None,
) -> None:
    """Issue an `ImageWarning` if the image gains nothing from the quality of its file `data`.

    Where the memory to find out is missing, there is no warning: the file is written.

    Args:
        quality: the quality that was found where a target was given.
        decoded: the decoded image, if it is known. It is made where that takes little of the time
            of encoding: after a search.
    """
    from cmamba_ref.codec import decode
    from cmamba_ref.codec.ceiling import warn_if_nothing_is_gained

    used = options.quality if quality is None else quality
    try:
        if decoded is None and (options.effort or "psnr" in (options.target or ())):
            decoded = decode(data, model, **limits(options))
        warn_if_nothing_is_gained(read.image, model, used, decoded)
    except Exception as error:
        if not (isinstance(error, MemoryLimitError) or is_out_of_memory(error)):
            raise


def write_decoded(source: Path, output: Path, model: CMamba, options: DecodeOptions) -> FileResult:
    """Decode a file, with `model` or with the bundled model that made it, and write the image.

    Raises:
        CMambaError, OSError: as `decode_file`.
    """
    from cmamba_ref.codec import decode_container, model_for
    from cmamba_ref.codec.container import Container
    from cmamba_ref.codec.output import check_output, image_bytes

    check_output(output.suffix, options.output_quality)
    data = source.read_bytes()
    file = Container.unpack(data)
    model = model_for(file.model_id, [model])
    image = decode_container(file, model, **limits(options))
    decoded = image_bytes(
        image, output.suffix, file.metadata, options.output_quality, options.max_side
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, decoded, time_from=source if options.keep_time else None)
    height, width = image.shape[:2]
    return FileResult(str(source), str(output), len(data), len(decoded), width, height)


def limits(options: EncodeOptions | DecodeOptions) -> dict[str, Any]:
    """Return the limits as `cmamba_ref.encode` and `decode` take them."""
    from cmamba_ref.codec import DEFAULT_MAX_PIXELS

    max_pixels = DEFAULT_MAX_PIXELS if options.max_pixels is None else options.max_pixels
    return {"max_pixels": max_pixels, "max_memory": options.max_memory}

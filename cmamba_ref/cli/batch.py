"""Batch processing of files: which to read and write, the work on each, and the summary.

The parent process imports neither torch nor a model.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.cli import process_pool
from cmamba_ref.cli.warning_lines import no_native_output, warning_lines
from cmamba_ref.errors import (
    InvalidArgumentError,
    MemoryLimitError,
    ModelMismatchError,
    explain,
    is_out_of_memory,
)

if TYPE_CHECKING:
    import numpy as np

    from cmamba_ref.codec.metadata import Metadata
    from cmamba_ref.model import CMamba

# Of a folder, the files with these suffixes are taken; a file that is named is taken as it is.
SUFFIXES = {
    "encode": (
        *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm"),
        *(".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
    ),
    "decode": (".cmb",),
    "verify": (".cmb",),
    "describe": (".cmb",),
}
OUTPUT_SUFFIX = {"encode": ".cmb", "decode": ".png"}
PROCESS_DIED = "its process died, perhaps out of memory; try a smaller image"

_logger = logging.getLogger("cmamba_ref.cli.batch")


@dataclass(frozen=True)
class Task:
    """A file to read and the file to write, if one is to be written."""

    source: Path
    target: Path | None = None


@dataclass(frozen=True)
class Keep:
    """How `encode` reads files, and what the output keeps beside pixels.

    Attributes:
        metadata: for `encode`, keep EXIF, XMP and the ICC profile, with the pixels in its space.
        time: give the output the input's time of change.
        background: for `encode`, the colour to lay transparent images onto; None keeps alpha.
        strict_color, lenient, convert: for `encode`, as in `cmamba_ref.codec.images.read_image`.
    """

    metadata: bool = False
    time: bool = False
    background: tuple[int, int, int] | None = None
    strict_color: bool = False
    lenient: bool = False
    convert: bool = False


@dataclass(frozen=True)
class Job:
    """What to do with every file.

    Attributes:
        command: "encode", "decode" or "verify".
        load: callback that returns the model; called once in every process.
        quality: for `encode`, as in `cmamba_ref.encode`.
        max_pixels: as in `cmamba_ref.encode` and `decode`; None for the default.
        max_memory: as in `cmamba_ref.encode` and `decode`, for each process.
        check: for `encode`, decode the file that was written before it gets its name.
        keep: what the output takes over beside the pixels.
    """

    command: str
    load: Callable[[], CMamba]
    quality: float | None
    max_pixels: int | None
    max_memory: int | None
    check: bool = False
    keep: Keep = Keep()

    def pixel_limit(self) -> int:
        from cmamba_ref.codec import DEFAULT_MAX_PIXELS

        return self.max_pixels or DEFAULT_MAX_PIXELS


@dataclass(frozen=True)
class Outcome:
    """Result for one file: sizes in bytes and pixels, or one line with the reason of a failure.

    Attributes:
        detail: the description that `verify` gives of a good file; what `encode` has dropped.
        unchecked: the error is not the file's: its model is not available, or memory is short.
        warnings: one line each, with the file's name.
    """

    source: Path
    bytes_in: int = 0
    bytes_out: int = 0
    pixels: int = 0
    detail: str = ""
    error: str | None = None
    unchecked: bool = False
    warnings: tuple[str, ...] = ()


# ---------------------------------------------------------------- which files


def find_tasks(inputs: Sequence[Path], output: Path | None, command: str) -> list[Task]:
    """Return the files to read and where each goes.

    Folders are searched to the bottom, in sorted order; links to folders are not followed, and
    what begins with a dot is hidden. Below `output` stands the tree that stands below each folder
    in `inputs`.

    Args:
        output: a folder, which need not exist; None for each output beside its input.

    Raises:
        InvalidArgumentError: nothing to do, `output` is a file, or an output is needed twice or is
            itself an input.
        OSError: a folder cannot be read.
    """
    if output is not None and output.exists() and not output.is_dir():
        raise InvalidArgumentError(
            f"`-o` must be a folder for a folder or several files, got the file {str(output)!r}; "
            "choose another name"
        )
    by_target: dict[str, Task] = {}
    by_source: dict[str, Path] = {}
    for source, root in find(inputs, command):
        path = source if output is None else output / source.relative_to(root)
        target = path.with_suffix(OUTPUT_SUFFIX[command])
        first = by_target.setdefault(os.path.realpath(target), Task(source, target))
        if os.path.realpath(first.source) != os.path.realpath(source):
            raise InvalidArgumentError(
                f"`IN` must be files with an output each, got {str(first.source)!r} and "
                f"{str(source)!r}, both for {str(target)!r}; rename one of them"
            )
        by_source[os.path.realpath(source)] = source
    for path in sorted(by_target.keys() & by_source.keys()):
        raise InvalidArgumentError(
            f"`IN` must not be replaced, got {str(by_source[path])!r}, where the output for "
            f"{str(by_target[path].source)!r} would go; choose another folder with -o"
        )
    return list(by_target.values())


def find_files(inputs: Sequence[Path], command: str) -> list[Task]:
    """Return the files to read, each once and without an output; found as `find_tasks` finds them.

    Raises:
        InvalidArgumentError: there is nothing to do.
        OSError: a folder cannot be read.
    """
    by_source = {os.path.realpath(source): source for source, _ in find(inputs, command)}
    return [Task(source) for source in by_source.values()]


def find(inputs: Sequence[Path], command: str) -> list[tuple[Path, Path]]:
    """Return every file with the folder in `inputs` below which it was found.

    Raises:
        InvalidArgumentError: there is none.
        OSError: a folder cannot be read.
    """
    found = []
    for given in inputs:
        if given.is_dir():
            found += [(source, given) for source in _files_below(given, SUFFIXES[command])]
        else:
            found.append((given, given.parent))
    if not found:
        raise InvalidArgumentError(
            f"`IN` must hold files to {command}, got {', '.join(repr(str(p)) for p in inputs)}; "
            f"files in folders are found by their suffixes: {' '.join(SUFFIXES[command])}"
        )
    return found


def _files_below(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for path, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(suffixes):
                yield Path(path, name)


def to_do(tasks: Iterable[Task], force: bool) -> list[Task]:
    """Return the tasks whose output does not exist yet; all of them with `force`."""
    return [task for task in tasks if force or task.target is None or not task.target.is_file()]


# ---------------------------------------------------------------- the work


def core_count() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(tasks: Sequence[Task], job: Job, processes: int, report: Callable[[Outcome], None]) -> None:
    """Do all the work; a file that fails does not stop the others.

    Args:
        processes: 1 works in this process, with the threads torch has here; with more, each has
            its share of the cores. How many there are changes no decoded symbol, but the float32
            arithmetic of threads may move a pixel by one step, or a latent to another symbol.
        report: callback, called with the outcome of each file as it is done, in any order.

    Raises:
        CMambaError, OSError: no work is possible at all, for instance without the model.
    """
    if not tasks:
        return
    processes = min(processes, len(tasks))
    if processes == 1:
        model = _load(job)
        for task in tasks:
            report(_outcome(model, job, task))
        return
    threads = max(1, core_count() // processes)
    process_pool.spread(
        _work_here,
        tasks,
        processes,
        partial(_prepare_here, job, threads),
        lambda task, outcome: report(outcome or _died(task)),
    )


def _load(job: Job) -> CMamba:
    model = job.load()
    if job.command == "encode":
        model.check_quality(job.quality)  # once, not in the report on every file
    return model


# In a process of the pool: the job and its model, or the error that prevented loading it.
_here: tuple[Job, CMamba] | Exception | None = None


def _prepare_here(job: Job, threads: int) -> None:
    global _here
    warnings.simplefilter("ignore")  # of libraries as they load: the same in every process
    try:
        import torch

        torch.set_num_threads(min(threads, torch.get_num_threads()))
        _here = job, _load(job)
    except Exception as error:  # noqa: BLE001  raised again by the first task
        _here = error


def _work_here(task: Task) -> Outcome:
    if isinstance(_here, Exception):
        raise _here
    assert _here is not None  # for the type checker
    job, model = _here
    return _outcome(model, job, task)


def _outcome(model: CMamba, job: Job, task: Task) -> Outcome:
    lines: list[str] = []
    with warning_lines(str(task.source), lines.append):
        outcome = _work(model, job, task)
    return replace(outcome, warnings=tuple(lines))


def _work(model: CMamba, job: Job, task: Task) -> Outcome:
    try:
        if task.target is None:
            return _verify(model, job, task.source)
        if task.target.is_dir():
            raise InvalidArgumentError(
                f"the output must be a file, got the folder {str(task.target)!r}; move it away"
            )
        work = _encode if job.command == "encode" else _decode
        return work(model, job, task.source, task.target)
    except Exception as error:
        text = explain(error)
        if text is None:
            # Internal error: log the traceback, and go on with the other files.
            _logger.exception("%s", task.source)
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        cannot_check = isinstance(error, ModelMismatchError | MemoryLimitError)
        unchecked = cannot_check or is_out_of_memory(error)
        return Outcome(task.source, error=_naming(task, text), unchecked=unchecked)


def _encode(model: CMamba, job: Job, source: Path, target: Path) -> Outcome:
    from cmamba_ref.codec import encode
    from cmamba_ref.codec.verify import verify_encoded

    limits = {"max_pixels": job.pixel_limit(), "max_memory": job.max_memory}
    image, metadata, dropped = parse_source(
        source.read_bytes(), str(source), job.keep, job.pixel_limit()
    )
    data = encode(image, model, job.quality, metadata=metadata, **limits)

    def check(written: Path) -> None:
        verify_encoded(written.read_bytes(), data, image, model, **limits)

    target.parent.mkdir(parents=True, exist_ok=True)
    time_from = source if job.keep.time else None
    write_atomically(target, data, check if job.check else None, time_from=time_from)
    height, width = image.shape[:2]
    size = source.stat().st_size
    return Outcome(source, size, len(data), height * width, detail=", ".join(dropped))


def parse_source(
    data: bytes, name: str, keep: Keep, max_pixels: int
) -> tuple[np.ndarray, Metadata, list[str]]:
    """Parse an image to encode; return it, the metadata to store and the names of what is dropped.

    Raises:
        ImageError: as `cmamba_ref.codec.images.read_image`.
    """
    from cmamba_ref.codec.images import parse_image
    from cmamba_ref.codec.metadata import NO_METADATA

    with no_native_output():
        image, metadata = parse_image(
            data,
            name,
            max_pixels=max_pixels,
            background=keep.background,
            strict_color=keep.strict_color,
            lenient=keep.lenient,
            convert=keep.convert,
            keep_metadata=keep.metadata,
        )
    return (image, metadata, []) if keep.metadata else (image, NO_METADATA, metadata.names())


def _decode(model: CMamba, job: Job, source: Path, target: Path) -> Outcome:
    from cmamba_ref.codec import decode_container
    from cmamba_ref.codec.container import Container
    from cmamba_ref.codec.images import png_bytes

    data = source.read_bytes()
    file = Container.unpack(data)
    image = decode_container(file, model, max_pixels=job.pixel_limit(), max_memory=job.max_memory)
    target.parent.mkdir(parents=True, exist_ok=True)
    png = png_bytes(image, file.metadata)
    write_atomically(target, png, time_from=source if job.keep.time else None)
    height, width = image.shape[:2]
    return Outcome(source, len(data), target.stat().st_size, height * width)


def _verify(model: CMamba, job: Job, source: Path) -> Outcome:
    from cmamba_ref.codec.verify import verify_file

    limits = {"max_pixels": job.pixel_limit(), "max_memory": job.max_memory}
    try:
        return Outcome(source, detail=verify_file(source.read_bytes(), model, **limits))
    except ModelMismatchError as error:
        raise ModelMismatchError(f"{error}; name it with --model") from error


def _died(task: Task) -> Outcome:
    return Outcome(task.source, error=_naming(task, PROCESS_DIED), unchecked=True)


def _naming(task: Task, text: str) -> str:
    return text if str(task.source) in text else f"{task.source}: {text}"


# ---------------------------------------------------------------- the summary


class Summary:
    """Totals of the files encoded or decoded; its `str` is printed at the end."""

    def __init__(self, command: str, skipped: int) -> None:
        self.command = command
        self.skipped = skipped
        self.done: list[Outcome] = []
        self.failed: list[Outcome] = []
        self._start = time.perf_counter()

    def add(self, outcome: Outcome) -> None:
        """Count one file."""
        (self.failed if outcome.error else self.done).append(outcome)

    def __str__(self) -> str:
        seconds = time.perf_counter() - self._start
        lines = [f"{self.command}d {len(self.done)}"]
        skipped = f"skipped {self.skipped}"
        lines.append(
            f"{skipped} that exist already; --force replaces them" if self.skipped else skipped
        )
        lines.append(f"failed {len(self.failed)}")
        lines += [f"  {outcome.source}" for outcome in sorted(self.failed, key=_by_source)]
        dropped = sum(1 for outcome in self.done if outcome.detail)
        if dropped:
            lines.append(f"dropped the metadata of {dropped}; --keep-metadata keeps it")
        if self.done:
            bytes_in = sum(outcome.bytes_in for outcome in self.done)
            bytes_out = sum(outcome.bytes_out for outcome in self.done)
            pixels = sum(outcome.pixels for outcome in self.done)
            bpp = 8 * (bytes_out if self.command == "encode" else bytes_in) / pixels
            lines.append(f"{bytes_in} bytes in, {bytes_out} bytes out, {bpp:.3f} bpp")
            lines.append(
                f"{pixels / 1e6:.2f} megapixels in {seconds:.2f} s, "
                f"{pixels / 1e6 / seconds:.2f} megapixels/s"
            )
        return "\n".join(lines)


def _by_source(outcome: Outcome) -> Path:
    return outcome.source


def summarise_checks(outcomes: Sequence[Outcome]) -> str:
    """Return the line that `verify` prints at the end."""
    good = sum(1 for outcome in outcomes if not outcome.error)
    unchecked = sum(1 for outcome in outcomes if outcome.unchecked)
    return f"good {good}, bad {len(outcomes) - good - unchecked}, not checked {unchecked}"

"""Batch processing of files: which to read and write, the work on each, and the summary.

With several processes, the parent imports neither torch nor a model.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmamba_ref.atomic_write import check_writable
from cmamba_ref.cli import process_pool
from cmamba_ref.cli.warning_lines import no_native_output, warning_lines
from cmamba_ref.codec.files import (
    DecodeOptions,
    EncodeOptions,
    FileResult,
    check_output_path,
    limits,
    naming,
    read_source,
    write_decoded,
    write_encoded,
)
from cmamba_ref.errors import (
    InvalidArgumentError,
    MemoryLimitError,
    ModelMismatchError,
    UnsupportedFileError,
    UsageError,
    WeightsError,
    explain,
    is_out_of_memory,
    printable,
)

if TYPE_CHECKING:
    from cmamba_ref.model import CMamba

# Of the files that each command writes.
OUTPUT_SUFFIXES = {"encode": (".cmb",), "decode": (".png", ".jpg", ".jpeg", ".webp")}
# Errors that say nothing against a file.
CANNOT_CHECK = (ModelMismatchError, UnsupportedFileError, MemoryLimitError, WeightsError, OSError)
PROCESS_DIED = "its process died, perhaps out of memory; try a smaller image"

_logger = logging.getLogger("cmamba_ref.cli.batch")


@dataclass(frozen=True)
class Task:
    """A file to read and the file to write, if one is to be written."""

    source: Path
    target: Path | None = None


@dataclass(frozen=True)
class Job:
    """What to do with every file.

    Attributes:
        load: callback that checks the quality and returns the model; called once in every process.
        options: `EncodeOptions` to encode; `DecodeOptions` to decode, or to verify where a task has
            no output. `max_memory` holds for each process.
    """

    load: Callable[[], CMamba]
    options: EncodeOptions | DecodeOptions


@dataclass(frozen=True)
class Outcome:
    """Result for one file: sizes in bytes and pixels, or one line with the reason of a failure.

    Attributes:
        detail: the description that `verify` gives of a good file; what `encode` has dropped.
        unchecked: the error is not the file's: it cannot be read, its model or version is not
            available, or memory is short.
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


@dataclass
class Found:
    """What `find` found.

    Attributes:
        files: every file with the folder in the inputs below which it was found.
        failed: an outcome per folder that cannot be read.
        left_out: how many files in folders have another suffix, by suffix; also pipes and devices.
    """

    files: list[tuple[Path, Path]] = field(default_factory=list)
    failed: list[Outcome] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def left_out_line(self) -> str:
        """Return the line "left out: 37 (.heic 35, .mov 2)"; empty where nothing is."""
        if not self.left_out:
            return ""
        counts = self.left_out.most_common()
        kinds = ", ".join(f"{printable(suffix)} {count}" for suffix, count in counts)
        from cmamba_ref.codec.formats import HEIF_HINT, HEIF_SUFFIXES

        hint = f"; {HEIF_HINT}" if self.left_out.keys() & set(HEIF_SUFFIXES) else ""
        return f"left out: {self.left_out.total()} ({kinds}){hint}"


def find(inputs: Sequence[Path], command: str) -> Found:
    """Return the files in `inputs`, and those below its folders that have a suffix of `command`.

    Folders are searched to the bottom, in sorted order; links to folders are not followed, and
    what begins with a dot is hidden. A folder that cannot be read does not stop the others.

    Raises:
        InvalidArgumentError: there is none.
    """
    found = Found()
    for given in inputs:
        if os.path.isdir(given):
            _search(given, command, found)
        else:
            found.files.append((given, given.parent))
    if not found.files and not found.failed:
        raise InvalidArgumentError(
            f"`IN` must hold files to {command}, got {', '.join(repr(str(p)) for p in inputs)}; "
            + (found.left_out_line() or "there are none")
        )
    return found


def _search(folder: Path, command: str, found: Found) -> None:
    suffixes = (".cmb",)
    if command == "encode":
        from cmamba_ref.codec import formats

        suffixes = formats.suffixes()

    def fail(error: OSError) -> None:
        found.failed.append(Outcome(Path(error.filename), error=explain(error), unchecked=True))

    for path, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            suffix = Path(name).suffix.lower()
            if os.path.exists(file := Path(path, name)) and not os.path.isfile(file):
                found.left_out["no regular file"] += 1  # a pipe, which nobody may ever write to
            elif suffix in suffixes:
                found.files.append((file, folder))
            elif suffix not in OUTPUT_SUFFIXES.get(command, ()):  # what an earlier run has made
                found.left_out[suffix or "no suffix"] += 1


def with_targets(
    files: Iterable[tuple[Path, Path]], output: Path | None, suffix: str
) -> tuple[list[Task], list[Outcome]]:
    """Return where the output of each file goes, and an outcome per file without one of its own.

    Below `output` stands the tree that stands below each folder in the inputs. A file is refused
    whose output is that of another file too, or is itself an input.

    Args:
        files: as in `Found`.
        output: a folder, which need not exist; None for each output beside its input.
        suffix: of the outputs.

    Raises:
        UsageError: `output` is a file.
        OSError: no file can be written into `output`.
    """
    if output is not None:
        if output.exists() and not output.is_dir():
            raise UsageError(
                "`-o` must be a folder for a folder or several files, "
                f"got the file {str(output)!r}; choose another name"
            )
        check_writable(output)
    by_target: dict[str, dict[str, Task]] = {}
    for source, root in files:
        path = source if output is None else output / source.relative_to(root)
        target = path.with_suffix(suffix)
        sharing = by_target.setdefault(os.path.realpath(target), {})
        sharing.setdefault(os.path.realpath(source), Task(source, target))
    sources = {path: task for sharing in by_target.values() for path, task in sharing.items()}
    tasks, refused = [], []
    for target, sharing in by_target.items():
        for path, task in sharing.items():
            others = [repr(str(t.source)) for other, t in sharing.items() if other != path]
            if target in sources:
                reason = f"would replace the input {str(sources[target].source)!r}; use another -o"
            elif others:
                reason = f"is that of {', '.join(others)} too; rename one of them"
            else:
                tasks.append(task)
                continue
            error = f"{printable(task.source)}: its output {str(task.target)!r} {reason}"
            refused.append(Outcome(task.source, error=error))
    return tasks, refused


def without_targets(files: Iterable[tuple[Path, Path]]) -> list[Task]:
    """Return the files, as in `Found`, each once and without an output."""
    return [Task(path) for path in {os.path.realpath(path): path for path, _ in files}.values()]


def to_do(tasks: Iterable[Task], force: bool) -> list[Task]:
    """Return the tasks whose output does not exist yet; all of them with `force`."""
    return [t for t in tasks if force or t.target is None or not os.path.isfile(t.target)]


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
            its share of the cores. How many there are changes no decoded symbol, and in our tests
            no pixel and no file; float32 sums of more threads may round differently.
        report: callback, called with the outcome of each file as it is done, in any order.

    Raises:
        CMambaError, OSError: no work is possible at all, for instance without the model.
    """
    if not tasks:
        return
    processes = min(processes, len(tasks))
    if processes == 1:
        model = job.load()
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


# In a process of the pool: the job and its model, or the error that prevented loading it.
_here: tuple[Job, CMamba] | Exception | None = None


def _prepare_here(job: Job, threads: int) -> None:
    global _here
    warnings.simplefilter("ignore")  # of libraries as they load: the same in every process
    try:
        import torch

        torch.set_num_threads(min(threads, torch.get_num_threads()))
        _here = job, job.load()
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
            return _verify(model, task.source, limits(job.options))
        check_output_path(task.target, task.source)
        check_writable(task.target)
        if isinstance(job.options, EncodeOptions):
            return _done(_encode(model, task.source, task.target, job.options))
        return _done(write_decoded(task.source, task.target, model, job.options))
    except Exception as error:
        text = explain(error)
        if text is None:
            # Internal error: log the traceback, and go on with the other files.
            _logger.exception("%s", task.source)
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        unchecked = isinstance(error, CANNOT_CHECK) or is_out_of_memory(error)
        return Outcome(task.source, error=naming(task.source, text), unchecked=unchecked)


def _encode(model: CMamba, source: Path, target: Path, options: EncodeOptions) -> FileResult:
    with no_native_output():
        read = read_source(source.read_bytes(), str(source), options)
    return write_encoded(source, target, read, model, options)


def _done(result: FileResult) -> Outcome:
    return Outcome(
        Path(result.source),
        result.bytes_in,
        result.bytes_out,
        result.width * result.height,
        detail=", ".join(result.dropped),
    )


def _verify(model: CMamba, source: Path, limits: dict[str, Any]) -> Outcome:
    from cmamba_ref.codec.verify import verify_file

    try:
        detail = verify_file(source.read_bytes(), model, **limits)
        return Outcome(source, detail=detail)
    except ModelMismatchError as error:
        raise ModelMismatchError(f"{error}; name it with --model") from error


def _died(task: Task) -> Outcome:
    return Outcome(task.source, error=naming(task.source, PROCESS_DIED), unchecked=True)


# ---------------------------------------------------------------- the summary


class Summary:
    """Totals of the files encoded or decoded; its `str` is printed at the end."""

    def __init__(self, command: str, skipped: int, left_out: str) -> None:
        self.command = command
        self.skipped = skipped
        self.left_out = left_out
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
        lines += [
            f"  {printable(outcome.source)}" for outcome in sorted(self.failed, key=_by_source)
        ]
        if self.left_out:
            lines.append(self.left_out)
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
    """Return the line with the counts that `verify` prints at the end."""
    good = sum(1 for outcome in outcomes if not outcome.error)
    unchecked = sum(1 for outcome in outcomes if outcome.unchecked)
    return f"good {good}, bad {len(outcomes) - good - unchecked}, not checked {unchecked}"

"""Atomic file writes: a file appears under its name only when it is complete."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def check_writable(path: str | os.PathLike) -> None:
    """Try whether a file can be written at `path`, before the work that makes it.

    Folders that are missing are taken for made by then, and a folder for one to put files into.

    Raises:
        OSError: it cannot; the error names `path`.
    """
    try:
        with suppress(FileNotFoundError):
            os.lstat(path)
        folder = Path(os.path.realpath(path))
        if not folder.is_dir():
            folder = folder.parent
        while not os.path.lexists(folder):
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomically(
    path: str | os.PathLike,
    data: bytes,
    check: Callable[[Path], None] | None = None,
    *,
    time_from: Path | None = None,
) -> None:
    """Write `data` to `path`; a failure half-way leaves what was there before, and nothing else.

    The bytes go into a temporary file beside the target, since a rename is atomic only inside one
    file system. Its name, `.cmamba-*.tmp`, says whose it is where a process was killed and left it.

    Args:
        check: callback, called with the temporary file when it is complete; if it raises, the write
            has failed.
        time_from: a file whose time of change the new one gets.

    Raises:
        OSError: the directory is missing, not writable or full; the error names `path`.
    """
    # Resolved, so that a link stays a link and the file it points at is replaced.
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".cmamba-{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_bytes(data)
        if check is not None:
            check(temporary)
        if time_from is not None:
            times = time_from.stat()
            os.utime(temporary, ns=(times.st_atime_ns, times.st_mtime_ns))
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except OSError as error:
        is_of_another = error.filename is not None and Path(error.filename) != temporary
        if is_of_another or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)

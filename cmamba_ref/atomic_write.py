"""Atomic file writes: a file appears under its name only when it is complete."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path


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
        OSError: the directory is missing, not writable or full.
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
    finally:
        temporary.unlink(missing_ok=True)

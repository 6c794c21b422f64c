"""Whole files or none: what a command writes appears under its name only when it is complete."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Write `data` to `path`; a failure half-way leaves what was there before, and nothing else.

    The bytes go into a temporary file beside the target, since a rename is atomic only inside one
    file system.

    Raises:
        OSError: the directory is missing, not writable or full.
    """
    # Resolved, so that a link stays a link and the file it points at is replaced.
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)

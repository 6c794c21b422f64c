"""Memory of this process in RAM, and its peak over a stretch of code, as Linux counts it.

torch does not count what it allocates on the CPU, and NumPy and Pillow allocate too.  Linux keeps
the largest number of resident bytes of a process (VmHWM), exactly, however short the moment was,
and sets it back to the present number when asked to: no sampling, and nothing slows down while the
code runs.  `ru_maxrss` would not do: it cannot be set back, and a child starts with its parent's.

Elsewhere than on Linux every function here gives None.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def resident_bytes() -> int | None:
    """The bytes that are in RAM now."""
    return _status("VmRSS")


def peak_bytes() -> int | None:
    """The most that was in RAM since the start of the process or the last `restart_peak`."""
    return _status("VmHWM")


def _status(key: str) -> int | None:
    """A size in bytes out of the kernel's list about this process; None where there is none."""
    try:
        found = re.search(rf"^{key}:\s*(\d+) kB", STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None  # the kernel writes kB and means KiB


def restart_peak() -> bool:
    """Set the peak back to what is in RAM now; whether that could be done."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def trim_heap() -> None:
    """Give memory that was freed back to the system, where the C library can do that.

    A heap that keeps what was freed would serve the next call from it, and the call would seem to
    need nothing.  glibc trims the heap of the main thread whole, those of other threads in part,
    and once memory has run out the main thread uses one of those: then a small call counts too low.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_beyond(call: Callable[[], object]) -> int | None:
    """Bytes by which memory in RAM rose above what it was, at the most, while `call` ran.

    What the call returns counts, as it is alive when the call ends.  Memory comes in pages, of up
    to 2 MiB where the system uses huge ones, so small calls are measured coarsely.
    """
    trim_heap()
    before = resident_bytes()
    restarted = restart_peak()
    call()
    peak = peak_bytes()
    return peak - before if restarted and before is not None and peak is not None else None

"""How many threads a command uses: one, where other programs keep the cores busy.

Threads of OpenMP wait for each other by spinning. On a core that another program uses as well, they
spin while the one they wait for does not run: measured with two busy processes on two cores,
encoding a Kodak image takes 4.5 s in place of the 1.7 s of one thread. On idle cores two threads
need 0.7 s where one needs 1.1. Waiting without spinning lies between, in both cases.
"""

from __future__ import annotations

import os

try:
    import resource
except ImportError:  # Windows
    resource = None

# Involuntary context switches per second of CPU time, above which cores count as busy. Measured
# while torch is imported: 6 on idle cores, 155 beside two busy processes.
BUSY_SWITCHES_PER_S = 50


def cores_are_busy() -> bool:
    """Return whether this process had to share its core so far; False where nobody can tell."""
    if resource is None:
        return False
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_nivcsw > BUSY_SWITCHES_PER_S * (usage.ru_utime + usage.ru_stime)


def use_one_thread_if_busy() -> None:
    """Let torch use one thread here if the cores are busy and `OMP_NUM_THREADS` is not set."""
    if "OMP_NUM_THREADS" not in os.environ and cores_are_busy():
        import torch

        torch.set_num_threads(1)

"""Where the time of training goes: data, forward, backward, optimiser."""

from __future__ import annotations

import time

import torch

PARTS: tuple[str, ...] = ("data", "forward", "backward", "optimiser")


class Clock:
    """Seconds of training by part, from `start` to the last `lap` of each step.

    Work on a GPU is waited for at the end of each part, so that it counts where it belongs.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._device = device
        self._began = 0.0

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())

    def start(self) -> None:
        """Count from now on."""
        self._began = time.perf_counter()

    def lap(self, part: str) -> None:
        """Count the time since `start` or the last lap as that of `part`."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[part] += now - self._began
        self._began = now

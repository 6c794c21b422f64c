"""Time of training by part of a step: data, forward, backward, optimiser."""

from __future__ import annotations

import time
from collections import deque

import torch

PARTS: tuple[str, ...] = ("data", "forward", "backward", "optimiser")


class Clock:
    """Seconds of training, from `start` to the last `lap` of each step.

    On a GPU the parts are timed by events in its queue, which nothing waits for: the last steps
    count once the GPU has done them.  `total` and `cpu` are the host's.

    Attributes:
        seconds: of each part.
        total: of all parts, wall time.
        cpu: processor time of this process meanwhile, all its threads together.
    """

    def __init__(self, device: torch.device) -> None:
        self.total = self.cpu = 0.0
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._device = device
        self._began = (0.0, 0.0)
        self._last: torch.cuda.Event | None = None
        self._queued: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def seconds(self) -> dict[str, float]:
        while self._queued and self._queued[0][2].query():
            part, first, last = self._queued.popleft()
            self._seconds[part] += first.elapsed_time(last) / 1000
        return self._seconds

    def start(self) -> None:
        """Count from now on."""
        _ = self.seconds  # counts what the GPU has done meanwhile, so that few events are kept
        self._began = time.perf_counter(), time.process_time()
        self._last = self._event()

    def lap(self, part: str) -> None:
        """Count the time since `start` or the last lap as that of `part`."""
        now = time.perf_counter(), time.process_time()
        wall, cpu = (after - before for after, before in zip(now, self._began, strict=True))
        self._began = now
        self.total += wall
        self.cpu += cpu
        event = self._event()
        if event is None or self._last is None:
            self._seconds[part] += wall
        else:
            self._queued.append((part, self._last, event))
            self._last = event

    def _event(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

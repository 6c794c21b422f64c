"""Time and memory of the codec, stage by stage.

    data, timing = time_by_stage(model, lambda: cmamba_ref.encode(image, model))
    print(timing.stages)

The stages are modules of the model, seen through forward hooks, and the entropy coder, which
`cmamba_ref.stages` announces.  Work inside a stage that belongs to another counts for the inner one
alone (LRP is not also the slice loop's), so that the stages together take at most as long as the
whole.  A stage that is not called as a module of its own does not show by itself: its time is part
of what is around it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from resident import peak_bytes, restart_peak
from torch import nn

from cmamba_ref import CMamba
from cmamba_ref.stages import SCAN, watched_by

# Everything that is in no other stage: types and padding, scale indexes, CRC, gain, the container.
OTHER = "other"

ResultT = TypeVar("ResultT")


@dataclass
class Timing:
    """One run, in seconds and bytes.

    Attributes:
        total: from beginning to end, measured by itself.
        stages: of each stage that was entered, without the stages inside it.
        peaks: the most bytes of the process in RAM while a stage was the innermost one; empty
            unless asked for, or where the system does not count them.
        scans: in four-direction scans, for large maps with the projections that they compute on
            the way; on a GPU only their launches.  They are part of the stages, not one of them.
    """

    total: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    scans: float = 0.0


class _Clock:
    """Book time and memory to the stage at work."""

    def __init__(self, memory: bool, is_cuda: bool) -> None:
        self.timing = Timing()
        # What was launched on a GPU belongs to the stage that launched it.
        self._finish = torch.cuda.synchronize if is_cuda else lambda: None
        self._memory = memory and restart_peak()  # costs some microseconds per stage
        self._at_work = [OTHER]
        self._finish()
        self._start = self._since = time.perf_counter()

    def book(self) -> None:
        """Book the time since the last event to the stage at work."""
        self._finish()
        timing, stage = self.timing, self._at_work[-1]
        passed = time.perf_counter() - self._since
        timing.stages[stage] = timing.stages.get(stage, 0.0) + passed
        if self._memory:
            timing.peaks[stage] = max(timing.peaks.get(stage, 0), peak_bytes() or 0)
            restart_peak()
        self._since = time.perf_counter()
        timing.total = self._since - self._start

    def enter(self, stage: str) -> None:
        self.book()
        self._at_work.append(stage)

    def leave(self) -> None:
        self.book()
        self._at_work.pop()

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Watch what `cmamba_ref.stages` announces: scans, in whatever stage, or a stage."""
        if name == SCAN:
            start = time.perf_counter()
            yield
            self.timing.scans += time.perf_counter() - start
            return
        self.enter(name)
        yield
        self.leave()


def time_by_stage(
    model: CMamba, call: Callable[[], ResultT], memory: bool = False
) -> tuple[ResultT, Timing]:
    """Run a call that encodes or decodes with this model; return its result and its timing.

    Args:
        memory: also note the peak memory of each stage.
    """
    watched = stages_of(model)
    clock = _Clock(memory, next(model.parameters()).is_cuda)
    with contextlib.ExitStack() as hooks:
        for stage, module in watched:
            before = module.register_forward_pre_hook(lambda *_, stage=stage: clock.enter(stage))
            after = module.register_forward_hook(lambda *_: clock.leave())
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        hooks.enter_context(watched_by(clock.within))
        result = call()
        clock.book()
    return result, clock.timing


def transform_stages(name: str, transform: nn.Sequential, halvings: int) -> list[str]:
    """Return for each child of g_a or g_s the stage that it belongs to.

    Args:
        halvings: the map that enters lies at H / 2^halvings.
    """
    stages = []
    for child in transform:
        if isinstance(child, nn.Conv2d | nn.ConvTranspose2d | nn.PixelShuffle):
            stages.append(f"{name} convolutions")
            if getattr(child, "stride", None) == (2, 2):
                halvings += 1 if isinstance(child, nn.Conv2d) else -1
        else:
            stages.append(f"{name} blocks at H/{2**halvings}")
    return stages


def stages_of(model: CMamba) -> list[tuple[str, nn.Module]]:
    """Return every watched module with its stage, outer before inner, in the order of coding."""
    # Deriving the float64 copies here makes them the ones that the calls that follow use.
    coding = model.latent_coder.float64_modules()
    context = coding["context"]
    watched: list[tuple[str, nn.Module]] = [("g_a other", model.g_a)]
    watched += zip(transform_stages("g_a", model.g_a, 0), model.g_a, strict=True)
    watched += [("h_a", model.h_a), ("h_s (fp64)", coding["h_s"])]
    watched += [("slice loop", context)]
    watched += [("context CAE (fp64)", cae) for cae in context.cae]  # type: ignore[union-attr]
    watched += [("context LRP (fp64)", lrp) for lrp in context.lrp or ()]  # type: ignore[union-attr]
    watched += [("g_s other", model.g_s)]
    watched += zip(transform_stages("g_s", model.g_s, 4), model.g_s, strict=True)
    return watched

"""What changes in the course of a run: the learning rate, and the size of crops and batches.

A point of a run is its progress, from 0 to 1: the part of its steps, or of its minutes, that is
done.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from cmamba_ref.training.settings import Settings


class Phase(NamedTuple):
    """Crops of one size, and how many of them make a step (over all processes)."""

    crop: int
    batch: int


def phase_at(settings: Settings, progress: float) -> Phase:
    """The phase of the run at that point."""
    number = sum(progress >= end for end in settings.until)
    return Phase(settings.crop[number], settings.batch[number])


def learning_rate(settings: Settings, step: int, progress: float) -> float:
    """Linear warm-up over the first steps, then `lr`, then the fall to `final_lr`.

    `linear` and `cosine` fall over the last part, `decay`, of the run; `step` falls at each
    milestone, by the same factor, and is at `final_lr` from the last one on.
    """
    s = settings
    warm = min(1.0, (step + 1) / max(1, s.warmup))
    if s.schedule == "step":
        passed = sum(progress >= milestone for milestone in s.milestones)
        ratio = s.final_lr / s.lr
        return warm * s.lr * ratio ** (passed / max(1, len(s.milestones)))
    # 1 before the fall begins, 0 at the end of the run.
    left = min(1.0, max(0.0, 1 - progress) / s.decay) if s.decay > 0 else 1.0
    if s.schedule == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    return warm * (s.final_lr + (s.lr - s.final_lr) * left)

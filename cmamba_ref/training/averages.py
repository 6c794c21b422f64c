"""Averages of many tensors at once: a few launches on a GPU, where a loop would take hundreds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def move(averages: Sequence[Tensor], new: Sequence[Tensor], part: Tensor) -> None:
    """Move each average by a part of its distance to what is new, in place.

    Args:
        part: 0...1, a scalar on the device of the others, where nobody waits for it.
    """
    change = torch.ops.aten._foreach_sub.List(new, averages)
    torch.ops.aten._foreach_mul_.Tensor(change, part)
    torch.ops.aten._foreach_add_.List(averages, change)

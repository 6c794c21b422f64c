"""Keeping the entropy path at one precision.

A decoder recomputes the scale of every symbol, and one scale index that differs from the encoder's
destroys the rest of the stream.  So the weights from which scales are computed must be the same
numbers on both sides, whatever precision the rest of the model was cast to, and the computation
runs in float64, where different machines, thread counts and memory layouts agree far below the
margin that the encoder keeps (see docs/format.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class StoredPrecision(nn.Module):
    """A module whose parameters follow `.to(device)` but never change their dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredPrecision:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


def float64_copy(module: ModuleT, device: torch.device) -> ModuleT:
    """A frozen copy of `module` in float64 on `device`, for coding."""
    twin = copy.deepcopy(module).requires_grad_(False).eval()

    def widen(tensor: Tensor) -> Tensor:
        return tensor.to(device, torch.float64 if tensor.is_floating_point() else tensor.dtype)

    # The children of a StoredPrecision are plain modules; only its own override must be passed by.
    nn.Module._apply(twin, widen)
    return twin

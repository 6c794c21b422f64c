"""Switching autocast off around code that has a precision of its own."""

import contextlib
from contextlib import AbstractContextManager

import torch


def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


# A compiler asks once: the one of torch 2.11 cannot trace into the call.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast off on devices that have it; the meta device has none to switch off."""
    if _has_autocast(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()

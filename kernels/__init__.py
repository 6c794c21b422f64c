"""The Triton backend, imported as `cmamba_ref.kernels`; the kernels need only torch and triton.

The directory lies at the top of the repository and is installed inside the package; no top-level
module `kernels` is ever installed. Importing this package does not import triton; its module
`backend` does, which holds the scans. Modules in here import each other relatively.
"""

import functools
import importlib.util
import os
from typing import NamedTuple

import torch

from .tiling import MAX_RANK, MAX_STATES

__all__ = ["Support", "is_supported", "size_reason", "unavailable_reason"]


class Support(NamedTuple):
    """Whether a scan can run; true or false as a condition. `reason` says why not."""

    supported: bool
    reason: str

    def __bool__(self) -> bool:
        return self.supported


def _interpreted() -> bool:
    """Whether triton's interpreter is on; it must be before a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def unavailable_reason(device_type: str) -> str | None:
    """Why no kernel can run on this kind of device, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "the module 'triton' is not installed; in a clone: pip install '.[kernels]'"
    if _interpreted():
        return None
    if device_type != "cuda":
        return (
            f"Triton has no compiler for device type {device_type!r}; "
            "it takes CUDA and ROCm tensors, or any with TRITON_INTERPRET=1 (slow, for tests)"
        )
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return _gpu_failure()


@functools.cache
def _gpu_failure() -> str | None:
    """Why no kernel can run on the GPUs that torch finds, or None when they can.

    Asked once in a process: scans ask before each launch. Triton's driver compiles a helper in C
    when it is first used.
    """
    for index in range(torch.cuda.device_count() if torch.version.hip is None else 0):
        capability = torch.cuda.get_device_capability(index)
        if capability < (8, 0):
            return (
                "the kernels need GPUs of compute capability 8.0 or later, "
                f"cuda:{index} has {capability[0]}.{capability[1]}; "
                "CUDA_VISIBLE_DEVICES can leave it out"
            )
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # noqa: BLE001 - of many types, from the compiler to the disk
        what = str(error).strip().partition("\n")[0]
        return f"Triton cannot start: {what or type(error).__name__}"
    return None


def size_reason(n: int, rank: int = 0) -> str | None:
    """Why no kernel takes N states and a dt_weight of R columns, or None when they do."""
    if n > MAX_STATES:
        return f"the kernels hold N <= {MAX_STATES} states per channel in registers, got {n}"
    if rank > MAX_RANK:
        return f"the kernels hold R <= {MAX_RANK} columns of `dt_weight` in registers, got {rank}"
    return None


def is_supported(device_type: str, n: int = 1, rank: int = 0) -> Support:
    """Whether the kernels can scan tensors on this kind of device.

    Args:
        device_type: `cuda` (also for ROCm), `cpu`, ...
        n: states N per channel.
        rank: R, columns of `dt_weight`; 0 for the 1-D scan.
    """
    reason = unavailable_reason(device_type) or size_reason(n, rank)
    return Support(reason is None, reason or "")

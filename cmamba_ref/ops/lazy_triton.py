"""The backend `triton`, registered without its imports: the kernels are loaded at the first use."""

import importlib

from torch import Tensor

from cmamba_ref.ops.validation import Scan2dInputs, ScanInputs


def _import_failure() -> str | None:
    """Why the package of the Triton kernels cannot be imported, or None when it can."""
    try:
        importlib.import_module("cmamba_ref.kernels")
    except ModuleNotFoundError as error:
        if error.name == "cmamba_ref.kernels":
            return "this installation of cmamba_ref lacks its kernels; install it again"
        return f"the Triton kernels need the module {error.name!r}, which is not installed"
    except ImportError as error:
        return f"the Triton kernels cannot be imported ({error})"
    return None


def _unavailable_reason(device_type: str) -> str | None:
    failure = _import_failure()
    return failure or importlib.import_module("cmamba_ref.kernels").unavailable_reason(device_type)


# What torch.compiler.assume_constant_result does: a compiler asks once and does not trace into it.
# That decorator would import torch._dynamo, and with it triton, at `import cmamba_ref`.
_unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refusal(device_type: str, n: int, rank: int) -> str | None:
    """Why the kernels cannot run a scan of these sizes here, or None when they can."""
    reason = _unavailable_reason(device_type)
    if reason is not None:
        return reason
    from cmamba_ref.kernels import size_reason  # pyright: ignore[reportMissingImports]

    return size_reason(n, rank)


# Imported inside: this imports triton. A compiler can follow it, unlike import_module.


def selective_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Output `[B, D, L]` in u's type and last state `[B, D, N]` in the compute type."""
    from cmamba_ref.kernels import backend  # pyright: ignore[reportMissingImports]

    return backend.selective_scan(*inputs)


def selective_scan_2d(inputs: Scan2dInputs) -> Tensor:
    """Sum of the four directions `[B, H, W, D]` in x's type."""
    from cmamba_ref.kernels import backend  # pyright: ignore[reportMissingImports]

    return backend.selective_scan_2d(*inputs)

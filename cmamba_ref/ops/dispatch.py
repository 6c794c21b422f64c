"""Which backend runs a scan: argument, `with` block, default, environment, `auto`, in order."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Iterator

import torch

from cmamba_ref.errors import BackendUnavailableError, InvalidArgumentError

BACKENDS = ("reference", "chunked", "triton")
ENVIRONMENT_VARIABLE = "CMAMBA_SCAN_BACKEND"

_logger = logging.getLogger("cmamba_ref.ops")
_logged_reasons: set[str] = set()

# Plain globals: a ContextVar would break torch.compile(fullgraph=True). None: not set.
_default_backend: str | None = None
# Of all `with` blocks that are open, in any thread: the last one entered counts where a thread has
# none of its own. Blocks of several threads need not close in the order in which they opened.
_open_blocks: list[_Block] = []


class _Block:
    """One `with scan_backend(name)`; equal to itself only."""

    def __init__(self, name: str) -> None:
        self.name = name


class _OfThread(threading.local):
    """The backend of the innermost `with` block of a thread.

    A compiler does not look here, since it cannot guard on what differs from thread to thread.
    """

    name: str | None = None


_of_thread = _OfThread()


def _check_name(name: str, argument: str) -> str:
    if name not in (*BACKENDS, "auto"):
        valid = ", ".join(repr(known) for known in ("auto", *BACKENDS))
        raise InvalidArgumentError(
            f"`{argument}` must be one of {valid}, got {name!r}; correct the name"
        )
    return name


def get_default_backend() -> str:
    """The backend of calls that name none: `scan_backend`, else `set_default_backend`, else
    CMAMBA_SCAN_BACKEND, else `auto`.

    Raises:
        InvalidArgumentError: the environment variable holds an unknown name.
    """
    if not torch.compiler.is_compiling() and _of_thread.name is not None:
        return _of_thread.name
    if _open_blocks:
        return _open_blocks[-1].name
    if _default_backend is not None:
        return _default_backend
    return _check_name(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


def set_default_backend(name: str | None) -> None:
    """Sets the backend of calls that name none, in all threads; None goes back to the environment.

    Raises:
        InvalidArgumentError: unknown name.
    """
    global _default_backend
    _default_backend = None if name is None else _check_name(name, "name")


@contextlib.contextmanager
def scan_backend(name: str) -> Iterator[None]:
    """Within the `with` block, calls that name no backend use this one.

    That holds for all threads but those that are in such a block themselves.

    Raises:
        InvalidArgumentError: unknown name.
    """
    block = _Block(_check_name(name, "name"))
    outer = _of_thread.name
    _open_blocks.append(block)
    _of_thread.name = name
    try:
        yield
    finally:
        _of_thread.name = outer
        _open_blocks.remove(block)


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


def triton_unavailable_reason(device_type: str) -> str | None:
    """Why the Triton kernels cannot run on this kind of device, or None when they can."""
    failure = _import_failure()
    return failure or importlib.import_module("cmamba_ref.kernels").unavailable_reason(device_type)


# What torch.compiler.assume_constant_result does: a compiler asks once and does not trace into it.
# That decorator would import torch._dynamo, and with it triton, at `import cmamba_ref`.
triton_unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _triton_refusal(device_type: str, n: int, rank: int) -> str | None:
    """Why the Triton kernels cannot run a scan of these sizes here, or None when they can."""
    reason = triton_unavailable_reason(device_type)
    if reason is not None:
        return reason
    from cmamba_ref.kernels import size_reason  # pyright: ignore[reportMissingImports]

    return size_reason(n, rank)


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    missing = () if triton_unavailable_reason(device_type) is None else ("triton",)
    return tuple(name for name in BACKENDS if name not in missing)


def _log_once(reason: str) -> None:
    """Log why CUDA tensors get `chunked`: a warning where only an installation is missing."""
    if reason not in _logged_reasons and not torch.compiler.is_compiling():
        _logged_reasons.add(reason)
        is_missing = _import_failure() or importlib.util.find_spec("triton") is None
        level = logging.WARNING if is_missing else logging.INFO
        _logger.log(level, "scans on CUDA tensors use the slower backend 'chunked': %s", reason)


def choose(backend: str, device_type: str, n: int = 1, rank: int = 0) -> str:
    """The backend that runs a scan of N states and R columns of dt_weight (1-D: 0).

    Returns:
        `reference`, `chunked` or `triton`.

    Raises:
        InvalidArgumentError: unknown name.
        BackendUnavailableError: `triton` was asked for by name and cannot run on this device.
    """
    name = _check_name(backend, "backend")
    if name == "auto":
        name = get_default_backend()
    reason = None
    if name == "triton":
        reason = _triton_refusal(device_type, n, rank)
    if reason is not None:
        raise BackendUnavailableError(
            f"`backend` must be one that runs this scan on {device_type}, got {name!r}: "
            f"{reason}; use backend='auto' or 'chunked'"
        )
    if name == "auto":
        if device_type != "cuda":
            return "chunked"
        reason = _triton_refusal(device_type, n, rank)
        if reason is None:
            return "triton"
        _log_once(reason)
        return "chunked"
    return name

"""The registry of backends, and which of them runs a scan.

In this order: the argument `backend`, `scan_backend` or `set_default_backend`, whichever came
last, the environment variable CMAMBA_SCAN_BACKEND, `auto`.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cmamba_ref.errors import BackendUnavailableError, InvalidArgumentError
from cmamba_ref.ops.validation import Scan2dInputs, ScanInputs

ENVIRONMENT_VARIABLE = "CMAMBA_SCAN_BACKEND"

_logger = logging.getLogger("cmamba_ref.ops")
_logged_reasons: set[str] = set()

# A plain global: a ContextVar would break torch.compile(fullgraph=True). None: not set.
_default_backend: str | None = None


def _runs_everywhere(device_type: str, n: int, rank: int) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """An implementation of both scans, see `register_backend`.

    Attributes:
        name: what calls ask for.
        scan: a `ScanInputs` to the output `[B, D, L]` in u's type and the last state `[B, D, N]` in
            A's type.
        scan_2d: a `Scan2dInputs` to the sum of the four directions `[B, H, W, D]` in x's type.
        refusal: `refusal(device_type, n, rank)`: why it cannot scan N states and R columns of
            dt_weight (0 for the 1-D scan) on this kind of device (`cpu`, `cuda`, ...), or None when
            it can. Default: it runs everywhere.

    Raises:
        InvalidArgumentError: the name is no name of its own, or one of the others is no function.
    """

    name: str
    scan: Callable[[ScanInputs], tuple[Tensor, Tensor]]
    scan_2d: Callable[[Scan2dInputs], Tensor]
    refusal: Callable[[str, int, int], str | None] = _runs_everywhere

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip() or self.name == "auto":
            raise InvalidArgumentError(
                f"`name` must be a word other than 'auto', got {self.name!r}; choose another name"
            )
        for field in ("scan", "scan_2d", "refusal"):
            value = getattr(self, field)
            if not callable(value):
                raise InvalidArgumentError(
                    f"`{field}` must be a function, got {value!r}; see cmamba_ref.ops.Backend"
                )


# By name, in the order in which they were registered.
BACKENDS: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Add a backend, which every scan may then ask for by its name.

    `auto` never chooses it.

    Raises:
        InvalidArgumentError: it is no `Backend`, or there is one of that name.
    """
    if not isinstance(backend, Backend):
        raise InvalidArgumentError(
            f"`backend` must be a Backend, got {type(backend).__name__}; see cmamba_ref.ops.Backend"
        )
    if backend.name in BACKENDS:
        raise InvalidArgumentError(
            f"`backend` must have a name of its own, got {backend.name!r}; choose another name"
        )
    BACKENDS[backend.name] = backend


def _check_name(name: str, argument: str) -> str:
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS):
        valid = ", ".join(repr(known) for known in ("auto", *BACKENDS))
        raise InvalidArgumentError(
            f"`{argument}` must be one of {valid}, got {name!r}; correct the name"
        )
    return name


def get_default_backend() -> str:
    """Return the backend of calls that name none.

    Raises:
        InvalidArgumentError: the environment variable holds an unknown name.
    """
    if _default_backend is not None:
        return _default_backend
    return _check_name(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


def set_default_backend(name: str | None) -> None:
    """Set the backend of calls that name none, in all threads; None goes back to the environment.

    Raises:
        InvalidArgumentError: unknown name.
    """
    global _default_backend
    _default_backend = None if name is None else _check_name(name, "name")


@contextlib.contextmanager
def scan_backend(name: str) -> Iterator[None]:
    """Within the `with` block, calls that name no backend use this one.

    It is process-wide: it sets the default backend of all threads, and restores on leaving what was
    set before. Blocks of several threads that overlap would restore each other's backend, and may
    leave it set; such threads pass `backend` to the scans instead.

    Raises:
        InvalidArgumentError: unknown name.
    """
    global _default_backend
    before = _default_backend
    set_default_backend(name)
    try:
        yield
    finally:
        _default_backend = before


def available_backends() -> tuple[str, ...]:
    """Return the names of the backends that can run on this machine."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    return tuple(
        name for name, backend in BACKENDS.items() if backend.refusal(device_type, 1, 0) is None
    )


def _log_once(reason: str, device_type: str) -> None:
    """Log why CUDA tensors get `chunked`: a warning unless only this scan's sizes are too large."""
    if reason not in _logged_reasons and not torch.compiler.is_compiling():
        _logged_reasons.add(reason)
        refused = BACKENDS["triton"].refusal(device_type, 1, 0)
        level = logging.WARNING if refused else logging.INFO
        _logger.log(level, "scans on CUDA tensors use the slower backend 'chunked': %s", reason)


def choose(backend: str, device_type: str, n: int = 1, rank: int = 0) -> str:
    """Return the backend that runs a scan of N states and R columns of dt_weight (1-D: 0).

    `auto` is `triton` for CUDA tensors where it can run, and `chunked` for all others.

    Raises:
        InvalidArgumentError: unknown name.
        BackendUnavailableError: a backend was asked for by name and cannot run this scan.
    """
    name = _check_name(backend, "backend")
    if name == "auto":
        name = get_default_backend()
    if name == "auto":
        if device_type != "cuda":
            return "chunked"
        reason = BACKENDS["triton"].refusal(device_type, n, rank)
        if reason is None:
            return "triton"
        _log_once(reason, device_type)
        return "chunked"
    reason = BACKENDS[name].refusal(device_type, n, rank)
    if reason is not None:
        raise BackendUnavailableError(
            f"`backend` must be one that runs this scan on {device_type}, got {name!r}: "
            f"{reason}; use backend='auto' or 'chunked'"
        )
    return name

"""The arguments of the scans as every backend takes them, and the rules that hold for them."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cmamba_ref.errors import InvalidArgumentError

IO_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ScanInputs(NamedTuple):
    """The arguments of `selective_scan`, which has their shapes and types."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    initial_state: Tensor | None
    seq_idx: Tensor | None = None


class Scan2dInputs(NamedTuple):
    """The arguments of `selective_scan_2d`, which has their shapes and types."""

    x: Tensor
    proj: Tensor
    A: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    D: Tensor | None


def sequence_begins(seq_idx: Tensor) -> Tensor:
    """Where another sequence than the one before begins, bool `[B, L]`; not at the first place."""
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))


def _fail(name: str, rule: str, value: object, fix: str) -> None:
    raise InvalidArgumentError(f"`{name}` must be {rule}, got {value}; {fix}")


def _check_tensor(name: str, x: object, device: torch.device | None = None) -> None:
    if not isinstance(x, Tensor):
        _fail(name, "a tensor", type(x).__name__, "convert it with torch.as_tensor")
    elif device is not None and x.device != device:
        _fail(name, f"on {device} like the input", x.device, f"move it with .to('{device}')")


def _check_io_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in IO_DTYPES:
        _fail(name, "fp16, bf16, fp32 or fp64", x.dtype, "convert it with .float()")


def _check_dtype(name: str, x: Tensor, dtype: torch.dtype, reason: str) -> None:
    if x.is_complex():
        _fail(name, "real", x.dtype, "complex state matrices are not supported, use a real one")
    if x.dtype != dtype:
        _fail(name, f"{dtype} {reason}", x.dtype, f"convert it with .to({dtype})")


def _check_shape(name: str, x: Tensor, form: str, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        _fail(name, f"{form} = {list(shape)}", list(x.shape), "pass the shape that fits the others")


def _check_rank(name: str, x: Tensor, form: str, rank: int, first_positive: int) -> None:
    """x has `rank` axes, and those from `first_positive` on are not empty."""
    if x.dim() != rank:
        _fail(name, f"{form}, {rank} axes", list(x.shape), "add or remove axes")
    for size in x.shape[first_positive:]:
        if size == 0:
            _fail(name, f"{form} without empty axes", list(x.shape), "only B may be 0")


def _parameter_dtype(io_dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if io_dtype == torch.float64 else torch.float32


def _check_projection(name: str, x: Tensor, u: Tensor, A: Tensor) -> None:
    """B or C of the 1-D scan."""
    batch, channels, length = u.shape
    n = A.shape[1]
    if x.dim() == 2:
        _check_dtype(name, x, A.dtype, "like `A`, as it is constant")
        _check_shape(name, x, "[D, N]", (channels, n))
    elif x.dim() == 3:
        _check_dtype(name, x, u.dtype, "like `u`")
        _check_shape(name, x, "[B, N, L]", (batch, n, length))
    elif x.dim() == 4:
        _check_dtype(name, x, u.dtype, "like `u`")
        groups = x.shape[1]
        if groups == 0 or channels % groups != 0:
            _fail(
                name,
                f"[B, G, N, L] with D = {channels} divisible by G",
                list(x.shape),
                "choose another number of groups",
            )
        _check_shape(name, x, "[B, G, N, L]", (batch, groups, n, length))
    else:
        _fail(name, "[D, N], [B, N, L] or [B, G, N, L]", list(x.shape), "add or remove axes")


def check_scan(inputs: ScanInputs) -> None:
    """Raise InvalidArgumentError unless these are arguments of `selective_scan`."""
    u, delta, A, B, C, D, z, delta_bias, _, initial_state, seq_idx = inputs
    _check_tensor("u", u)
    _check_io_dtype("u", u)
    _check_rank("u", u, "[B, D, L]", 3, first_positive=1)
    optional = {
        "D": D,
        "z": z,
        "delta_bias": delta_bias,
        "initial_state": initial_state,
        "seq_idx": seq_idx,
    }
    given = {name: x for name, x in optional.items() if x is not None}
    for name, x in {"delta": delta, "A": A, "B": B, "C": C, **given}.items():
        _check_tensor(name, x, u.device)

    parameter_dtype = _parameter_dtype(u.dtype)
    _check_dtype("A", A, parameter_dtype, "for this type of `u`")
    _check_rank("A", A, "[D, N]", 2, first_positive=0)
    batch, channels, _ = u.shape
    _check_shape("A", A, "[D, N]", (channels, A.shape[1]))
    for name, x in (("delta", delta), ("z", z)):
        if x is not None:
            _check_dtype(name, x, u.dtype, "like `u`")
            _check_shape(name, x, "[B, D, L]", tuple(u.shape))
    _check_projection("B", B, u, A)
    _check_projection("C", C, u, A)
    if B.dim() == 4 and C.dim() == 4 and B.shape[1] != C.shape[1]:
        _fail("C", f"of {B.shape[1]} groups like `B`", list(C.shape), "use one number of groups")
    for name, x in (("D", D), ("delta_bias", delta_bias)):
        if x is not None:
            _check_dtype(name, x, parameter_dtype, "like `A`")
            _check_shape(name, x, "[D]", (channels,))
    if initial_state is not None:
        _check_dtype("initial_state", initial_state, parameter_dtype, "like `A`")
        _check_shape("initial_state", initial_state, "[B, D, N]", (batch, channels, A.shape[1]))
    if seq_idx is not None:
        if seq_idx.is_floating_point() or seq_idx.is_complex():
            _fail("seq_idx", "integers", seq_idx.dtype, "convert it with .int()")
        _check_shape("seq_idx", seq_idx, "[B, L]", (batch, u.shape[2]))


def check_scan_2d(inputs: Scan2dInputs) -> None:
    """Raise InvalidArgumentError unless these are arguments of `selective_scan_2d`."""
    x, proj, A, dt_weight, dt_bias, D = inputs
    _check_tensor("x", x)
    _check_io_dtype("x", x)
    _check_rank("x", x, "[B, H, W, D]", 4, first_positive=1)
    parameters = {"A": A, "dt_weight": dt_weight, "dt_bias": dt_bias}
    if D is not None:
        parameters["D"] = D
    for name, value in {"proj": proj, **parameters}.items():
        _check_tensor(name, value, x.device)
    for name, value in parameters.items():
        _check_dtype(name, value, _parameter_dtype(x.dtype), "for this type of `x`")
    _check_dtype("proj", proj, x.dtype, "like `x`")

    channels = x.shape[3]
    _check_rank("A", A, "[4, D, N]", 3, first_positive=0)
    _check_shape("A", A, "[4, D, N]", (4, channels, A.shape[2]))
    _check_rank("dt_weight", dt_weight, "[4, D, R]", 3, first_positive=0)
    _check_shape("dt_weight", dt_weight, "[4, D, R]", (4, channels, dt_weight.shape[2]))
    _check_shape("dt_bias", dt_bias, "[4, D]", (4, channels))
    if D is not None:
        _check_shape("D", D, "[4, D]", (4, channels))
    columns = dt_weight.shape[2] + 2 * A.shape[2]
    _check_shape("proj", proj, "[B, H, W, 4, R + 2N]", (*x.shape[:3], 4, columns))

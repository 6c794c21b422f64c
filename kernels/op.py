"""The operator `cmamba::triton_scan`: registration with torch.library, autograd, fake tensors.

A compiler or an exporter sees a scan as one opaque operator; eager code calls the same as an
`autograd.Function`. Besides its arguments a scan keeps for the backward only the state before each
chunk.
"""

import contextlib
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cmamba_ref.ops.function import as_function

from .launch import Scan, backward, forward
from .tiling import plan


def _prepared(x: Tensor) -> Tensor:
    """Contiguous and at a multiple of 16 bytes, for which the kernels are compiled."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _scan(*tensors: Tensor | None, softplus: bool, groups: int) -> Scan:
    """The tensors of the operator from x to begins, without `first`, as the kernels take them."""
    x, dt, B, C, *others = (None if t is None else _prepared(t) for t in tensors)
    fields: Any = (x, dt, dt if B is None else B, dt if C is None else C, *others)
    return Scan(*fields, softplus=softplus, groups=groups)


def _device_of(x: Tensor) -> AbstractContextManager:
    """Within it Triton launches on the device of x, which need not be the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _states(of_sequence: Tensor | None, A: Tensor, images: int) -> Tensor:
    """States `[B, K, N, D]` of their own, zero where none are given."""
    if of_sequence is None:
        return A.new_zeros(images, *A.shape)
    return of_sequence.unsqueeze(1).clone(memory_format=torch.contiguous_format)


def scan_forward(
    x: Tensor,
    dt: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    z: Tensor | None,
    A: Tensor,
    dt_weight: Tensor | None,
    dt_bias: Tensor,
    skip: Tensor,
    first: Tensor | None,
    begins: Tensor | None,
    softplus: bool,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """A scan of a map in four directions, or of a sequence in one; `launch.Scan` has the shapes.

    B and C are None where they lie in the projections. Only for a sequence: `first`, the state
    before the first position `[B, N, D]`, and `begins`, which tells where another sequence begins,
    int8 `[B, L]`.

    Returns:
        y `[B, H, W, D]`; last state `[B, N, D]`, of a map zero; state before each chunk
        `[B, K * chunks * N, D]`, in one dimension, so that an exporter does not take the case of
        one chunk for a fixed size.
    """
    if len(x) == 0:
        return _results(x, A, dt_weight, groups)
    tensors = (x, dt, B, C, z, A, dt_weight, dt_bias, skip, begins)
    scan = _scan(*tensors, softplus=softplus, groups=groups)
    with _device_of(x):
        y, last, starts = forward(scan, _states(first, A, len(x)))
    return y, last, starts.flatten(1, 3)


def scan_backward(
    grad_y: Tensor,
    grad_last: Tensor | None,
    x: Tensor,
    dt: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    z: Tensor | None,
    A: Tensor,
    dt_weight: Tensor | None,
    dt_bias: Tensor,
    skip: Tensor,
    begins: Tensor | None,
    starts: Tensor,
    softplus: bool,
    groups: int,
) -> list[Tensor]:
    """Gradients of the tensors from x to skip that are given, in this order, and of `first`."""
    tensors = (x, dt, B, C, z, A, dt_weight, dt_bias, skip)
    if len(x) == 0:
        return [torch.zeros_like(like) for like in _gradients(*tensors)]
    scan = _scan(*tensors, begins, softplus=softplus, groups=groups)
    # Autocast would run the products around the kernels in 16 bits.
    with torch.autocast(x.device.type, enabled=False), _device_of(x):
        gradients = backward(scan, starts, _prepared(grad_y), _states(grad_last, A, len(x)))
    return [grad for grad in gradients if grad is not None]


triton_scan = torch.library.custom_op("cmamba::triton_scan", scan_forward, mutates_args=())
triton_scan_backward = torch.library.custom_op(
    "cmamba::triton_scan_backward", scan_backward, mutates_args=()
)


def _results(
    x: Tensor, A: Tensor, dt_weight: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors like the results of `triton_scan`; the sizes of x may be symbolic."""
    images, height, width, channels = x.shape
    directions, n, _ = A.shape
    rank = 0 if dt_weight is None else dt_weight.shape[1]
    chunks = plan(images, height * width, channels, groups, n, rank, A.dtype).chunks
    return (
        x.new_empty(x.shape),
        A.new_empty(images, n, channels),
        A.new_empty(images, directions * chunks * n, channels),
    )


def _gradients(x: Tensor, *others: Tensor | None) -> list[Tensor]:
    """Tensors like the results of `triton_scan_backward` for the arguments from x to skip."""
    likes = [like.new_empty(like.shape) for like in (x, *others) if like is not None]
    A = others[4]
    assert A is not None
    return [*likes, A.new_empty(x.shape[0], *A.shape[1:])]


@triton_scan.register_fake
def _(x, dt, B, C, z, A, dt_weight, dt_bias, skip, first, begins, softplus, groups):
    return _results(x, A, dt_weight, groups)


@triton_scan_backward.register_fake
def _(grad_y, grad_last, x, dt, B, C, z, A, dt_weight, dt_bias, skip, *others):
    return _gradients(x, dt, B, C, z, A, dt_weight, dt_bias, skip)


def _save(ctx, inputs, output):
    *tensors, first, begins, softplus, groups = inputs
    ctx.softplus, ctx.groups = softplus, groups
    ctx.has_first = first is not None
    _, last, starts = output
    # The last state of a map depends on nothing.
    of_map = tensors[5].shape[0] > 1  # directions of A
    ctx.mark_non_differentiable(*((last, starts) if of_map else (starts,)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, begins, starts)


def _differentiate(run_backward, ctx, grad_y, grad_last, _):
    *tensors, begins, starts = ctx.saved_tensors
    if grad_y is None and grad_last is None:
        return (None,) * (len(tensors) + 4)
    if grad_y is None:
        grad_y = torch.zeros_like(tensors[0])
    others = (begins, starts, ctx.softplus, ctx.groups)
    gradients = iter(run_backward(grad_y, grad_last, *tensors, *others))
    of_arguments = [None if x is None else next(gradients) for x in tensors]
    of_first = next(gradients) if ctx.has_first else None
    return *of_arguments, of_first, None, None, None


def _refuse_second_derivative(ctx, *grads):
    raise NotImplementedError(
        "the Triton scan has no second derivative; use backend='reference' for double backward"
    )


triton_scan.register_autograd(partial(_differentiate, triton_scan_backward), setup_context=_save)
triton_scan_backward.register_autograd(_refuse_second_derivative)

eager_scan_backward = as_function("TritonScanBackward", scan_backward, _refuse_second_derivative)
eager_scan = as_function(
    "TritonScan", scan_forward, partial(_differentiate, eager_scan_backward), _save
)

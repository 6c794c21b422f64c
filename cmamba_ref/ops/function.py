"""Operators of torch.library as an `autograd.Function`, for eager code.

A call of a registered operator takes the host 0.2 ms; the first one imports torch._dynamo, which
takes longer than to encode an image; and torch.func does not differentiate it, but for forward
mode, which gives zeros.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cmamba_ref.ops.autocast import without_autocast


def is_plain(x: Tensor) -> bool:
    """Whether a call with x is eager: no compiler, no exporter, no fake or meta tensor."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and x.device.type != "meta"
    )


def _save_nothing(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    pass


def as_function(
    name: str, forward: Callable, backward: Callable, setup_context: Callable = _save_nothing
) -> Callable[..., Any]:
    """Make an `autograd.Function` of what an operator was registered with; returns its `apply`.

    `torch.func.vmap` calls it once per element.  Forward-mode derivatives are refused.

    Args:
        name: of the function, as errors and graphs show it.
        forward, backward, setup_context: as in `autograd.Function`; `forward` returns several
            tensors, runs without autocast, and its first argument tells the device.
    """

    def run(first: Tensor, *others: Any) -> tuple[Tensor, ...]:
        with without_autocast(first.device):
            return tuple(forward(first, *others))

    def vmap(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple:
        results = [
            apply(
                *(
                    argument if dim is None else argument.select(dim, i)
                    for argument, dim in zip(arguments, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        stacked = tuple(map(torch.stack, zip(*results, strict=True)))
        return stacked, (0,) * len(stacked)

    def jvp(*_: Any) -> None:
        raise NotImplementedError(f"{name} has no forward-mode derivative; use backend='reference'")

    methods = {
        "forward": run,
        "setup_context": setup_context,
        "backward": backward,
        "vmap": vmap,
        "jvp": jvp,
    }
    members = {key: staticmethod(method) for key, method in methods.items()}
    apply = type(name, (torch.autograd.Function,), members).apply
    return apply

"""Forward and backward of a training step as one CUDA graph.

A small model keeps a GPU waiting for its host, which takes some microseconds for each of hundreds
of operators.  A graph is recorded once, and then launched as a whole.  It reads its inputs and
leaves its results at fixed addresses; the host can read no value in it, and change none but the
inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cmamba_ref.training.data import Batch

# So often everything runs before it is recorded: kernels are compiled, and libraries choose theirs.
WARM_UP = 3

logger = logging.getLogger(__name__)

Lap = Callable[[str], None]


def record(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record what `run` launches; returns how to launch it again, and what `run` returned."""
    # On another stream: autograd remembers the one on which it first met a parameter.
    here, warm = torch.cuda.current_stream(), torch.cuda.Stream()
    warm.wait_stream(here)
    with torch.cuda.stream(warm):
        for _ in range(WARM_UP):
            run()
    here.wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = run()
    finally:
        torch.cuda.set_stream(here)  # where it fails, torch.cuda.graph leaves its own
    return graph.replay, result


class StepGraph:
    """Computes gradients by a graph, recorded anew where the shape of the batch changes.

    Where nothing can be recorded, a warning says why, and operators are launched one by one.

    Args:
        compute: adds the gradient of a batch to those of `parameters`, and returns measures of it;
            it names each part of the step to its second argument once that is done.
        parameters: those that have gradients afterwards.
        device: a GPU.

    Attributes:
        is_used: whether the last step was launched as a graph.
    """

    def __init__(
        self,
        compute: Callable[[Batch, Lap], Tensor],
        parameters: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        self.is_used = False
        self._compute, self._parameters, self._device = compute, parameters, device
        self._inputs: Batch | None = None
        self._replay: Callable[[], None] | None = None
        self._results: tuple[list[Tensor | None], Tensor] = ([], torch.empty(0))
        self._failed = False

    def __call__(self, batch: Batch, lap: Lap) -> Tensor:
        """Set the gradients, and return what `compute` does; both hold until the next call.

        Args:
            batch: on the host.
            lap: as for `compute`; a graph does not tell the forward from the backward.
        """
        if self._inputs is None or self._inputs.x.shape != batch.x.shape:
            self._record(batch)
        self.is_used = self._replay is not None
        if self._inputs is None or self._replay is None:
            return self._compute(batch, lap)
        self._inputs.copy_(batch)
        self._replay()
        gradients, measures = self._results
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        lap("backward")
        return measures

    def _record(self, batch: Batch) -> None:
        self._inputs = self._replay = None  # first, so that its memory is free
        self._results = ([], torch.empty(0))
        if self._failed:
            return
        inputs = batch.to(self._device)

        def run() -> Tensor:
            self._clear()
            return self._compute(inputs, lambda part: None)

        try:
            self._replay, measures = record(run)
        except RuntimeError as error:  # of whatever is refused, torch raises this one
            self._failed = True
            logger.warning("no CUDA graph; operators are launched one by one: %s", _first(error))
        else:
            self._inputs = inputs
            self._results = [parameter.grad for parameter in self._parameters], measures
        self._clear()

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def _first(error: BaseException) -> BaseException:
    """What went wrong first: ending a graph that has failed fails again, and does not say why."""
    while error.__context__ is not None:
        error = error.__context__
    return error

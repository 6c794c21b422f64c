"""Forward and backward of a training step as one CUDA graph.

A small model keeps a GPU waiting for its host, which takes some microseconds for each of hundreds
of operators.  A graph is recorded once, and then launched as a whole.  It reads its inputs and
leaves its results at fixed addresses; the host can read no value in it, and change none but the
inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

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


class _Recorded(NamedTuple):
    """A graph, and where it reads and writes."""

    replay: Callable[[], None]
    inputs: Batch
    gradients: list[Tensor | None]
    measures: Tensor


class StepGraph:
    """Computes gradients by a graph, recorded anew where the shape of the batch changes.

    Where nothing can be recorded, a warning says why, and operators are launched one by one.

    Args:
        compute: adds the gradient of a batch to those of `parameters`, and returns measures of it;
            it names each part of the step to its second argument once that is done.
        parameters: those that have gradients afterwards.
        device: a GPU.
    """

    def __init__(
        self,
        compute: Callable[[Batch, Lap], Tensor],
        parameters: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        self._compute, self._parameters, self._device = compute, parameters, device
        self._recorded: _Recorded | None = None
        self._failed = False

    @property
    def is_used(self) -> bool:
        """Whether the last step was launched as a graph."""
        return self._recorded is not None

    def __call__(self, batch: Batch, lap: Lap) -> Tensor:
        """Set the gradients, and return what `compute` does; both hold until the next call.

        Args:
            batch: on the host.
            lap: as for `compute`; a graph does not tell the forward from the backward.
        """
        fits = self._recorded is not None and self._recorded.inputs.x.shape == batch.x.shape
        if not fits and not self._failed:
            self._recorded = None  # first, so that its memory is free
            self._recorded = self._record(batch)
        if self._recorded is None:
            return self._compute(batch, lap)
        self._recorded.inputs.copy_(batch)
        self._recorded.replay()
        for parameter, gradient in zip(self._parameters, self._recorded.gradients, strict=True):
            parameter.grad = gradient
        lap("backward")
        return self._recorded.measures

    def _record(self, batch: Batch) -> _Recorded | None:
        inputs = batch.to(self._device)

        def run() -> Tensor:
            self._clear()
            return self._compute(inputs, lambda part: None)

        try:
            replay, measures = record(run)
        except RuntimeError as error:  # of whatever is refused, torch raises this one
            self._failed = True
            logger.warning("no CUDA graph; operators are launched one by one: %s", _first(error))
            return None
        else:
            gradients = [parameter.grad for parameter in self._parameters]
            return _Recorded(replay, inputs, gradients, measures)
        finally:
            self._clear()

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def _first(error: BaseException) -> BaseException:
    """What went wrong first: ending a graph that has failed fails again, and does not say why."""
    while error.__context__ is not None:
        error = error.__context__
    return error

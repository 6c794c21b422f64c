"""Which parts of the model the time of a training step goes to, by torch.profiler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent

from cmamba_ref.model import CMamba

# Steps that are not profiled: in the first ones memory is laid out and kernels are chosen.
WARM_UP = 3

ENTROPY = "entropy model"
PARTS: tuple[str, ...] = (ENTROPY, "scan", "convolution", "rest")


class Profiler:
    """Profiles some steps of a run, after a few to warm up.

    Args:
        model: the model that is trained, not compiled.
        steps: how many; 0: none.
    """

    def __init__(self, model: CMamba, steps: int) -> None:
        self._model, self._steps = model, steps
        self._seen = 0
        self._running = contextlib.ExitStack()
        self._profile: torch.profiler.profile | None = None

    def before_step(self) -> None:
        """Begin to profile, if this is the first step to be."""
        if self._steps and self._seen == WARM_UP:
            self._running.enter_context(_marked(self._model))
            self._profile = self._running.enter_context(torch.profiler.profile())

    def after_step(self) -> dict[str, float] | None:
        """After the last step that is profiled, the share of each part of the model; else None."""
        self._seen += 1
        if self._profile is None or self._seen < WARM_UP + self._steps:
            return None
        profile, self._profile = self._profile, None
        self._running.close()
        return shares(profile.events() or [])


def shares(events: Iterable[FunctionEvent]) -> dict[str, float]:
    """Share of each part in the time of all operators, forward and backward.

    `entropy model` is h_s, CAE, LRP and the likelihoods with all that is in them; `scan` and
    `convolution` are those of the other transforms; optimiser and loss are in `rest`.
    """
    events = list(events)
    in_entropy = {
        event.sequence_nr
        for event in events
        if event.sequence_nr >= 0 and ENTROPY in _above(event)[0]
    }
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in events:
        # On a GPU an operator's time is that of its kernels; waiting for them is none.
        spent = event.self_device_time_total or event.self_cpu_time_total
        seconds[_part(event, in_entropy)] += spent
    total = sum(seconds.values()) or 1.0
    return {part: round(value / total, 4) for part, value in seconds.items()}


def _above(event: FunctionEvent) -> tuple[list[str], FunctionEvent]:
    """Names of the event and of all that it is a part of, and the outermost of these."""
    names = [event.name]
    while event.cpu_parent is not None:
        event = event.cpu_parent
        names.append(event.name)
    return names, event


def _part(event: FunctionEvent, in_entropy: set[int]) -> str:
    names, root = _above(event)
    # A node of the backward carries the number of the forward operator that it belongs to.
    is_backward = root.name.startswith("autograd::engine")
    if ENTROPY in names or (is_backward and root.sequence_nr in in_entropy):
        return ENTROPY
    # The operators `cmamba::...`, and the functions that eager code calls in their place.
    if any("cmamba" in name or "Scan" in name for name in names):
        return "scan"
    if any("convolution" in name or "Convolution" in name for name in names):
        return "convolution"
    return "rest"


@contextlib.contextmanager
def _marked(model: CMamba) -> Iterator[None]:
    """Mark what belongs to the entropy model, for the profiler."""
    ranges: list[torch.profiler.record_function] = []

    def enter(*_: object) -> None:
        ranges.append(torch.profiler.record_function(ENTROPY))
        ranges[-1].__enter__()

    def leave(*_: object) -> None:
        ranges.pop().__exit__(None, None, None)

    priors: list[nn.Module] = [model.entropy_bottleneck, model.gaussian_conditional]
    with contextlib.ExitStack() as stack:
        for module in (model.h_s, model.context):
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        for prior in priors:
            marked = torch.profiler.record_function(ENTROPY)(prior.likelihood)
            prior.likelihood = marked  # type: ignore[assignment]
            stack.callback(delattr, prior, "likelihood")
        yield

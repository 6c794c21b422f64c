"""Several processes that train one model together, or one process alone.

`torchrun` starts the processes and tells each its place.  Every process has all weights and does
its part of each batch; gradients are averaged by DistributedDataParallel, so the weights stay the
same everywhere, and process 0 alone writes files.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmamba_ref.errors import InvalidArgumentError, TrainingError

# Processes wait for each other, at most so long: for the slowest while it writes or compiles.
TIMEOUT = datetime.timedelta(hours=1)


@dataclass(frozen=True)
class Group:
    """This process among those that train together.

    Attributes:
        device: where its part of the work is done.
        rank: its number.
        size: how many there are.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes, on each of them."""
        if self.size > 1:
            values = values.to(self.device, copy=True)
            dist.all_reduce(values)
        return values

    def check_same(self, value: int, what: str) -> None:
        """Refuse to go on where processes have different values.

        Raises:
            TrainingError: they have; `what` says what must be.
        """
        mine = torch.zeros(self.size, dtype=torch.int64)
        mine[self.rank] = value
        values = self.sum(mine).tolist()
        if len(set(values)) > 1:
            raise TrainingError(f"{what}, got {values} from processes 0 to {self.size - 1}")

    def share(self, model: nn.Module) -> nn.Module:
        """The model to call in training: its backward averages gradients over all processes.

        Parameters that do not require a gradient now are left alone.
        """
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)


@contextlib.contextmanager
def joined(device: str) -> Iterator[Group]:
    """The group that `torchrun` made, or a group of one.

    Args:
        device: `"cpu"`, `"cuda"`, or `"auto"` for cuda where there is one. Each process of a
            machine takes the GPU of its local number.

    Raises:
        InvalidArgumentError: a device that is not there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InvalidArgumentError(f"`device` must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError("`device` must be one that is here, got 'cuda'; use cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    place = torch.device(device, local) if device == "cuda" else torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        yield Group(place)
        return
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Group(place, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()

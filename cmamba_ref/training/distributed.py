"""Several processes that train one model together, or one process alone.

Every process has all weights and computes its part of each batch.  DistributedDataParallel averages
the gradients, so the weights stay the same everywhere; process 0 alone writes files.  On a CPU
`tools/train.py` starts the processes itself (`started`); on several GPUs or machines `torchrun`
does.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmamba_ref.errors import InvalidArgumentError, TrainingError

# Processes wait for each other, at most so long: for the slowest while it writes or compiles.
TIMEOUT = datetime.timedelta(hours=1)
# At most so long for all to end, and for process 0 to notice by itself that another has failed.
END_TIMEOUT_S, GRACE_S = 300, 15

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """This process among those that train together.

    Attributes:
        device: where its part of the work is done.
        rank: its number.
        size: how many there are.
        size_here: how many of them are on this machine.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    size_here: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all processes, on the device that they are on."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def exchange(self, parts: Sequence[Sequence[Tensor]]) -> None:
        """Give every process the tensors in `parts[rank]` of each rank, in place."""
        if self.size == 1:
            return
        for rank, tensors in enumerate(parts):
            if not tensors:
                continue
            joined = torch.cat([tensor.detach().flatten() for tensor in tensors])
            dist.broadcast(joined, rank)
            if rank != self.rank:
                pieces = joined.split([tensor.numel() for tensor in tensors])
                for tensor, piece in zip(tensors, pieces, strict=True):
                    tensor.detach().copy_(piece.view(tensor.shape))

    def collect(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of all processes, by name, to process 0; to others their own."""
        if self.size == 1:
            return tensors
        everyone: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object({name: t.cpu() for name, t in tensors.items()}, everyone)
        if everyone is None:
            return tensors
        return {name: tensor for part in everyone for name, tensor in part.items()}

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
        """Return the model to call in training: its backward averages gradients over all processes.

        Parameters that do not require a gradient now are left alone.
        """
        if self.size == 1:
            return model
        # Without `device_ids`, which would move all inputs, also those that the host looks at.
        shared = nn.parallel.DistributedDataParallel(model)
        # Set here, because the name of the argument depends on the version of torch.
        shared.broadcast_buffers = False
        return shared


def processes_for(device: str, batches: Sequence[int], accumulate: int, wanted: int = 0) -> int:
    """Return how many processes to start: on a CPU one per core, on a GPU one.

    Fewer where a batch cannot be divided among so many.

    Args:
        wanted: the number that was asked for; 0: none was.

    Raises:
        InvalidArgumentError: that number cannot be.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    on_gpu = _resolve(device) == "cuda"
    if on_gpu and wanted > 1:
        raise InvalidArgumentError(
            f"`processes` must be 0 or 1 on a GPU, got {wanted}; start several with torchrun"
        )
    fitting = [
        n
        for n in range(1, (wanted or cores or 1) + 1)
        if all(batch % (n * accumulate) == 0 for batch in batches)
    ]
    if wanted and wanted not in fitting:
        raise InvalidArgumentError(
            f"`batch` must be a multiple of `processes` x `accumulate` = {wanted * accumulate}, "
            f"got {tuple(batches)}; change one of them"
        )
    return 1 if on_gpu else max(fitting, default=1)


@contextlib.contextmanager
def started(command: Sequence[str], processes: int) -> Iterator[None]:
    """Make this process number 0 of `processes` on this machine, and start the others.

    Args:
        command: what the others run; it finds its place in the environment, as under `torchrun`.
    """
    if processes == 1:
        yield
        return
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        "127.0.0.1", 0, processes, True, TIMEOUT, wait_for_workers=False
    )
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        # The store is here already: nobody is to open another.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    before = dict(os.environ)
    others: list[subprocess.Popen] = []
    ended = threading.Event()
    try:
        for rank in range(processes):
            own = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            if rank == 0:
                os.environ.update(own)
                continue
            own["OMP_NUM_THREADS"] = "1"
            # Ctrl-C is for this process, which tells the others.
            others.append(subprocess.Popen(command, env=before | own, start_new_session=True))
        threading.Thread(target=_watch, args=(others, ended), daemon=True).start()
        yield
        ended.set()
        for other in others:
            with contextlib.suppress(subprocess.TimeoutExpired):
                other.wait(END_TIMEOUT_S)
    finally:
        ended.set()
        for other in others:
            other.kill()  # where this process failed; one that has ended is left alone
            other.wait()
        for name in (*place, "RANK", "LOCAL_RANK"):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


def _watch(others: Sequence[subprocess.Popen], ended: threading.Event) -> None:
    """End this process where another has failed and it still waits for that one.

    It waits in C++, where no exception and no signal handler reaches it. Nothing is lost: files are
    written under other names and renamed.
    """
    while not ended.wait(0.5):
        failed = [other for other in others if other.poll()]
        if failed and not ended.wait(GRACE_S):
            logger.error("a training process ended with status %s", failed[0].returncode)
            for other in others:
                other.kill()
            os._exit(1)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many threads; 0: as many as it does."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def joined(device: str) -> Iterator[Group]:
    """The group that `started` or `torchrun` made, or a group of one.

    Args:
        device: `"cpu"`, `"cuda"`, or `"auto"` for cuda where there is one. Each process of a
            machine takes the GPU of its local number.

    Raises:
        InvalidArgumentError: a device that is not there.
    """
    kind = _resolve(device)
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    place = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        yield Group(place)
        return
    # What the hosts tell each other does not wait for GPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        yield Group(place, dist.get_rank(), dist.get_world_size(), here)
    finally:
        dist.destroy_process_group()


def _resolve(device: str) -> str:
    if device not in ("auto", "cpu", "cuda"):
        raise InvalidArgumentError(f"`device` must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError("`device` must be one that is here, got 'cuda'; use cpu")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device

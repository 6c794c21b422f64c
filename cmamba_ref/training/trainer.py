"""One training run: its model, optimisers and position; one step after the other."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cmamba_ref.config import CMambaConfig
from cmamba_ref.errors import InvalidArgumentError, TrainingError
from cmamba_ref.model import CMamba
from cmamba_ref.training.checkpoints import Checkpoint
from cmamba_ref.training.clock import PARTS, Clock
from cmamba_ref.training.data import Batch, CropCache, Loader, Photographs
from cmamba_ref.training.distributed import Group
from cmamba_ref.training.objective import objective
from cmamba_ref.training.schedule import learning_rate, phase_at
from cmamba_ref.training.settings import Settings, conflicts

# The quantiles of the prior have a loss and an optimiser of their own (Ballé et al. 2018).
QUANTILES = "entropy_bottleneck.quantiles"
# Batches that are requested before they are needed.
AHEAD = 3
# The average follows faster in the first steps: its decay is at most (1 + n) / (10 + n).
EMA_START = 10

FORMAT = 1


class Trainer:
    """Everything that changes in the course of a run, and the step that changes it.

    Args:
        settings: of the run.
        photographs: to train on.
        group: the processes that train together.

    Raises:
        InvalidArgumentError: a batch cannot be divided among processes and their parts.
        WeightsError: the weights to start from cannot be read.
    """

    def __init__(self, settings: Settings, photographs: Photographs, group: Group) -> None:
        parts = group.size * settings.accumulate
        if any(batch % parts for batch in settings.batch):
            raise InvalidArgumentError(
                f"`batch` must be a multiple of processes x `accumulate` = {parts}, got "
                f"{settings.batch}; change one of them"
            )
        self.settings, self.photographs, self.group = settings, photographs, group
        torch.manual_seed(settings.seed)
        if settings.init:
            self.model = CMamba.from_pretrained(settings.init)
        else:
            self.model = CMamba(settings.model_config())
        self.model.train().requires_grad_(True).to(group.device)
        if settings.channels_last:
            self.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

        self.names: dict[Tensor, str] = {
            parameter: name for name, parameter in self.model.named_parameters()
        }
        self.average = {
            name: parameter.detach().clone()
            for parameter, name in self.names.items()
            if settings.ema
        }
        quantiles = self.model.entropy_bottleneck.quantiles
        self.parameters = [p for p in self.names if p is not quantiles]
        self.optimiser = _optimiser(settings, self.model, self.parameters)
        self.aux_optimiser = torch.optim.Adam([quantiles], lr=settings.aux_lr)

        # Every process computes the gradient of the quantiles from the weights alone.
        quantiles.requires_grad_(False)
        network = torch.compile(self.model) if settings.compile else self.model
        self.network: nn.Module = group.share(network)  # type: ignore[arg-type]
        quantiles.requires_grad_(True)

        self.step = 0
        self.samples = 0  # crops that were trained on, by all processes
        self.seconds = 0.0  # in training, by the clock of the first process
        self.skipped = 0
        self.stopping = False
        self.best: dict[str, Any] = {}  # step and loss of the best validation
        self.window = Window()
        self.clock = Clock(group.device)
        self._seconds_before = 0.0  # before this process began to count
        self._loader: Loader | None = None
        self._requested = (0, 0)  # steps and samples up to which batches were requested

    # ---------------------------------------------------------------- where the run is

    def progress_at(self, step: int) -> float:
        """Part of the run that is done before a step, 0...1."""
        if self.settings.steps:
            return step / self.settings.steps
        return self.seconds / (60 * self.settings.minutes)

    @property
    def progress(self) -> float:
        """Part of the run that is done, 0...1."""
        return self.progress_at(self.step)

    @property
    def finished(self) -> bool:
        """Whether the run has its full length."""
        return self.progress >= 1

    # ---------------------------------------------------------------- training

    def train_step(self, *, stop: bool = False) -> dict[str, float]:
        """One optimiser step, on the same batch whatever the number of processes.

        Args:
            stop: this process was told to stop; all processes learn of it, in `stopping`.

        Returns:
            means over the batch: `loss` (weighted), `bpp`, `distortion`; the `aux` loss; the norm
            of the gradient before it is clipped, `grad_norm`.
        """
        self.clock.start()
        batch = self._next_batch()
        self.clock.lap("data")
        # Nothing draws from torch's generator today; if something does, then the same when resumed.
        torch.manual_seed(self.settings.seed + self.step)

        rate = learning_rate(self.settings, self.step, self.progress)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad()
        sums = self._gradients(batch)

        # One exchange for all that the processes must know of each other.
        seconds = self._seconds_before + self.clock.total if self.group.is_first else 0.0
        mine = torch.cat([sums, sums.new_tensor([len(batch.x), float(stop), seconds])])
        loss, bpp, distortion, count, stops, self.seconds = self.group.sum(mine).tolist()
        self.stopping = stops > 0
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.settings.clip or math.inf))
        if math.isfinite(norm) and math.isfinite(loss):
            self.optimiser.step()
            self._update_average()
        else:
            self.skipped += 1
        aux = self._train_quantiles()
        self.clock.lap("optimiser")

        self.step += 1
        self.samples += int(count)
        record = {
            "loss": loss / count,
            "bpp": bpp / count,
            "distortion": distortion / count,
            "aux": aux,
            "grad_norm": norm,
        }
        self.window.add(record, int(count))
        return record

    def _next_batch(self) -> Batch:
        s = self.settings
        if self._loader is None:
            crops = CropCache(self.photographs.train, s.seed, s.scale, s.cache_gib * 2**30)
            self._loader = Loader(
                crops,
                s.seed,
                len(self.model.config.lmbdas),
                self.model.latent_shapes,
                rank=self.group.rank,
                size=self.group.size,
                workers=s.workers,
            )
            self._requested = (self.step, self.samples)
        while len(self._loader) < AHEAD:
            step, sample = self._requested
            phase = phase_at(s, min(1.0, self.progress_at(step)))
            self._loader.request(step, sample, phase)
            self._requested = (step + 1, sample + phase.batch)
        return self._loader.take()

    def _gradients(self, batch: Batch) -> Tensor:
        """Add up the gradient of the mean loss; returns sums of loss, bpp and distortion `[3]`."""
        s, device = self.settings, self.group.device
        size = len(batch.x) // s.accumulate
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for start in range(0, len(batch.x), size):
            part = slice(start, start + size)
            x = batch.x[part].to(device, non_blocking=True).float() / 255
            quality = None if batch.quality is None else batch.quality[part].to(device)
            noise = {name: values[part].to(device) for name, values in batch.noise.items()}
            # Gradients are exchanged once, with those of the last part.
            last = start + size == len(batch.x)
            with contextlib.nullcontext() if last else self._alone():
                with torch.autocast(device.type, torch.bfloat16, enabled=s.precision == "bf16"):
                    output = self.network(x, quality, noise)
                losses = objective(self.model, output, x, quality, s)
                self.clock.lap("forward")
                (losses["loss"].sum() / len(batch.x)).backward()
            self.clock.lap("backward")
            names = ("loss", "bpp", "distortion")
            sums += torch.stack([losses[name].detach().double().sum() for name in names])
        return sums

    def _alone(self) -> contextlib.AbstractContextManager:
        network = self.network
        if isinstance(network, nn.parallel.DistributedDataParallel):
            return network.no_sync()
        return contextlib.nullcontext()

    def _train_quantiles(self) -> float:
        self.aux_optimiser.zero_grad()
        aux_loss = self.model.aux_loss()
        aux_loss.backward()
        self.aux_optimiser.step()
        return float(aux_loss.detach())

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average:
            done = self.step - self.skipped
            decay = min(self.settings.ema, (1 + done) / (EMA_START + done))
            weights: list[Tensor] = list(self.names)
            for average, weight in zip(self.average.values(), weights, strict=True):
                average.lerp_(weight, 1 - decay)

    # ---------------------------------------------------------------- what comes out

    def position(self) -> dict[str, Any]:
        """Where the run is, as every record of the log says it."""
        return {"step": self.step, "minutes": round(self.seconds / 60, 3)}

    def throughput(self) -> dict[str, Any]:
        """Images per second of training since the last report, and the share of each part."""
        spent = {part: self.clock.seconds[part] - self.window.clock[part] for part in PARTS}
        total = max(sum(spent.values()), 1e-9)
        return {
            "images_per_second": round(self.window.images / total, 3),
            "share": {part: round(seconds / total, 4) for part, seconds in spent.items()},
        }

    def report(self) -> dict[str, Any]:
        """Means since the last report, and where the time went; then a new window begins."""
        phase = phase_at(self.settings, min(1.0, self.progress_at(self.step - 1)))
        record = {
            "lr": self.optimiser.param_groups[0]["lr"],
            "crop": phase.crop,
            "batch": phase.batch,
            "skipped": self.skipped,
            **self.window.means(),
            **self.throughput(),
        }
        self.window = Window(clock=dict(self.clock.seconds))
        return record

    def is_best(self, loss: float) -> bool:
        """Whether a validation with this loss is the best so far; it is noted if it is."""
        if not loss < self.best.get("loss", math.inf):
            return False
        self.best = {"step": self.step, "loss": loss}
        return True

    @torch.no_grad()
    def finished_model(self, *, round_transforms: bool = False) -> CMamba:
        """The model as it is exported: averaged weights, entropy tables, eval mode.

        Args:
            round_transforms: round g_a, g_s and h_a to float16: these decide what the picture
                looks like, and not how a decoder reads its symbols.
        """
        model = copy.deepcopy(self.model).eval()
        for name, parameter in model.named_parameters():
            if name in self.average:
                parameter.copy_(self.average[name])
        if round_transforms:
            for parameter in itertools.chain(
                model.g_a.parameters(), model.g_s.parameters(), model.h_a.parameters()
            ):
                parameter.copy_(parameter.half())
        model.update(force=True)
        return model

    def close(self) -> None:
        """Stop reading ahead."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    # ---------------------------------------------------------------- saving and going on

    def checkpoint(self) -> Checkpoint:
        """All that a run needs to go on.

        Random draws are functions of the seed and of step and sample, see
        `cmamba_ref.training.draws`, so these two are also the position in the data and the state of
        the generators; the learning rate is a function of the step, or of the seconds.
        """
        state = {
            "format": FORMAT,
            "settings": self.settings.to_dict(),
            "model": json.loads(self.model.config.to_json()),
            "photographs": self.photographs.fingerprint,
            "step": self.step,
            "samples": self.samples,
            "seconds": self._seconds_before + self.clock.total,
            "skipped": self.skipped,
            "best": self.best,
            "window": {"sums": self.window.sums, "steps": self.window.steps},
        }
        return Checkpoint(dict(self._tensors()), state)

    def restore(self, checkpoint: Checkpoint, *, extend: bool = False) -> None:
        """Go on from a checkpoint.

        Args:
            extend: whether the run may be made longer.

        Raises:
            TrainingError: the checkpoint is of another model, of other settings or photographs.
        """
        state, tensors = checkpoint.state, checkpoint.tensors
        if state.get("format") != FORMAT:
            raise TrainingError(
                f"the checkpoint must be of format {FORMAT}, got {state.get('format')}; "
                "go on with the version that wrote it"
            )
        differing = conflicts(state["settings"], self.settings, extend=extend)
        if CMambaConfig.from_json(json.dumps(state["model"])) != self.model.config:
            differing.append("the model's configuration is another")
        if state["photographs"] != self.photographs.fingerprint:
            differing.append("the photographs are not the ones it began with")
        if differing:
            raise TrainingError(
                f"the run must go on as it began, but {'; '.join(differing)}. Give the settings it "
                "began with, or another `out`; to start from its weights, use `init`"
            )
        _restore_tensors(self, tensors)
        self.step, self.samples = state["step"], state["samples"]
        self.seconds = self._seconds_before = state["seconds"]
        self.skipped, self.best = state["skipped"], state["best"]
        self.window = Window(**state["window"])

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.model.state_dict().items():
            yield f"model.{name}", tensor
        for name, tensor in self.average.items():
            yield f"average.{name}", tensor
        for optimiser in (self.optimiser, self.aux_optimiser):
            for parameter, slots in optimiser.state.items():
                for slot, value in slots.items():
                    yield f"{slot}.{self.names[parameter]}", value


def _restore_tensors(trainer: Trainer, tensors: dict[str, Tensor]) -> None:
    prefix = "model."
    trainer.model.load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )
    for name, average in trainer.average.items():
        average.copy_(tensors[f"average.{name}"])
    slots = {name.partition(".")[0] for name in tensors} - {"model", "average"}
    for optimiser in (trainer.optimiser, trainer.aux_optimiser):
        for group in optimiser.param_groups:
            for parameter in group["params"]:
                name = trainer.names[parameter]
                saved = {slot: tensors.get(f"{slot}.{name}") for slot in slots}
                optimiser.state[parameter] = {
                    # Adam counts steps on the CPU; its means lie in memory as their weights do.
                    slot: value if value.ndim == 0 else torch.empty_like(parameter).copy_(value)
                    for slot, value in saved.items()
                    if value is not None
                }


def _optimiser(
    settings: Settings, model: CMamba, parameters: list[Tensor]
) -> torch.optim.Optimizer:
    """Adam or AdamW; only weights of convolutions and linear layers decay."""
    if settings.optimiser == "adam":
        return torch.optim.Adam(parameters, lr=settings.lr)
    decaying = {
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
    }
    groups = [
        {
            "params": [p for p in parameters if p in decaying],
            "weight_decay": settings.weight_decay,
        },
        {"params": [p for p in parameters if p not in decaying], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr)


@dataclass
class Window:
    """What was measured since the last record of the log.

    Attributes:
        sums: of each measure over steps that were not skipped.
        steps: how many of these there were.
        images: trained on, since this process began the window.
        clock: what the clock showed then.
    """

    sums: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    images: int = 0
    clock: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def add(self, record: dict[str, float], images: int) -> None:
        """A step that was skipped counts for the throughput alone."""
        self.images += images
        if all(math.isfinite(value) for value in record.values()):
            self.steps += 1
            for name, value in record.items():
                self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Mean of each measure."""
        return {name: value / self.steps for name, value in self.sums.items()}

"""One training run: its model, optimisers and position; one step after the other."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from cmamba_ref.config import CMambaConfig
from cmamba_ref.errors import InvalidArgumentError, TrainingError
from cmamba_ref.model import CMamba
from cmamba_ref.training.averages import move
from cmamba_ref.training.checkpoints import Checkpoint
from cmamba_ref.training.clock import PARTS, Clock
from cmamba_ref.training.data import Batch, CropCache, Loader, TrainingImages, moved, pinned
from cmamba_ref.training.distributed import Group
from cmamba_ref.training.objective import minimised, objective
from cmamba_ref.training.schedule import learning_rate, phase_at
from cmamba_ref.training.settings import Settings, conflicts
from cmamba_ref.training.soap import SOAP, work
from cmamba_ref.training.step_graph import Lap, StepGraph

# Batches that are requested before they are needed.
AHEAD = 3
# The average follows faster in the first steps: its decay is at most (1 + n) / (10 + n).
EMA_START = 10
# Steps that a run without the optimiser's state repeats to gather its statistics: twice as many as
# the averages of SOAP remember.
GATHERED_STEPS = 40
# What a step measures.
MEASURES = ("loss", "bpp", "distortion", "aux", "grad_norm")

FORMAT = 2
RECORD_FORMAT = 1

logger = logging.getLogger(__name__)


class Trainer:
    """Everything that changes in the course of a run, and the step that changes it.

    Args:
        settings: of the run.
        images: to train on.
        group: the processes that train together.

    Raises:
        InvalidArgumentError: a batch cannot be divided among processes and their parts.
        WeightsError: the weights to start from cannot be read.
    """

    def __init__(self, settings: Settings, images: TrainingImages, group: Group) -> None:
        parts = group.size * settings.accumulate
        if any(batch % parts for batch in settings.batch):
            raise InvalidArgumentError(
                f"`batch` must be a multiple of processes x `accumulate` = {parts}, got "
                f"{settings.batch}; change one of them"
            )
        self.settings, self.images, self.group = settings, images, group
        torch.manual_seed(settings.seed)
        if settings.init:
            self.model = CMamba.from_pretrained(settings.init)
        else:
            self.model = CMamba(settings.model_config())
        metric = "ms-ssim" if settings.ms_ssim else "mse"
        self.model.config = dataclasses.replace(self.model.config, metric=metric)
        self.model.train().requires_grad_(True).to(group.device)
        group.check_same(int(self.bf16), "all processes must have the same precision")
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
        # Several processes divide the work of SOAP: each updates its own part of the weights.
        self.parts = _divided(self.parameters, group.size if settings.optimiser == "soap" else 1)
        self.optimiser = _optimiser(
            settings, self.model, self.parts[group.rank] if len(self.parts) > 1 else self.parameters
        )
        self.aux_optimiser = torch.optim.Adam([quantiles], lr=settings.aux_lr, fused=True)

        # Every process computes the gradient of the quantiles from the weights alone.
        quantiles.requires_grad_(False)
        network = torch.compile(self.model) if settings.compile else self.model
        self.network: nn.Module = group.share(network)  # type: ignore[arg-type]
        quantiles.requires_grad_(True)
        self.graph = self._step_graph() if settings.cuda_graph else None

        self.step = 0
        self.samples = 0  # crops that were trained on, by all processes
        self.pixels = 0  # in these
        self.seconds = 0.0  # in training, by the clock of the first process
        self.cpu_seconds = 0.0  # in training, of all processes
        self._skipped = torch.zeros((), dtype=torch.float64, device=group.device)
        self.stopping = False
        self.best: dict[str, Any] = {}  # step and loss of the best validation
        self.window = Window(group.device)
        self.clock = Clock(group.device)
        self._seconds_before = 0.0  # before this process began to count
        self._cpu_seconds_before = 0.0
        self._loader: Loader | None = None
        self._requested = (0, 0)  # steps and samples up to which batches were requested

    # ---------------------------------------------------------------- where the run is

    def progress_at(self, step: int) -> float:
        """Part of the run that is done before a step, 0...1."""
        if self.settings.steps:
            return step / self.settings.steps
        if self.settings.core_hours:
            return self.cpu_seconds / (3600 * self.settings.core_hours)
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

    def train_step(self, batch: Batch | None = None, *, stop: bool = False) -> dict[str, Tensor]:
        """One optimiser step, on the same batch whatever the number of processes.

        The host waits for no value that a GPU computes, so what is returned lies on the device.

        Args:
            batch: what to train on; None for `next_batch`.
            stop: this process was told to stop; all processes learn of it, in `stopping`.

        Returns:
            means over the batch: `loss` (weighted), `bpp`, `distortion`; the `aux` loss; the norm
            of the gradient before it is clipped, `grad_norm`.  All are float64 scalars.
        """
        self.clock.start()
        batch = self.next_batch() if batch is None else batch
        self.clock.lap("data")
        # Nothing draws from torch's generator today; if something does, then the same when resumed.
        torch.manual_seed(self.settings.seed + self.step)

        rate = learning_rate(self.settings, self.step, self.progress)
        count = self.group.size * len(batch.x)
        measured, finite = self._take_step(batch, rate)
        self._update_average(finite)
        aux = self._train_quantiles()
        self.clock.lap("optimiser")

        # What the hosts must know of each other.
        seconds = self._seconds_before + self.clock.total if self.group.is_first else 0.0
        cpu = self.clock.cpu + (self._cpu_seconds_before if self.group.is_first else 0.0)
        told = torch.tensor([float(stop), seconds, cpu], dtype=torch.float64)
        stops, self.seconds, self.cpu_seconds = self.group.sum(told).tolist()
        self.stopping = stops > 0

        self.step += 1
        self.samples += count
        self.pixels += count * batch.x.shape[-1] * batch.x.shape[-2]
        self._skipped += ~finite
        record = {**measured, "aux": aux}
        self.window.add(torch.stack([record[name] for name in MEASURES]), finite, count)
        return record

    def _take_step(self, batch: Batch, rate: float) -> tuple[dict[str, Tensor], Tensor]:
        """Change the weights, unless loss or gradient is not finite; return measures and whether.

        With a rate of 0 the optimiser gathers statistics and changes nothing.
        """
        self.model.zero_grad()  # not the optimiser's, which knows only the part of this process
        sums = self.group.sum(self._gradients(batch))
        loss, bpp, distortion = sums / (self.group.size * len(batch.x))
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip or math.inf)
        finite = norm.isfinite() & loss.isfinite()
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        if isinstance(self.optimiser, SOAP):
            self.optimiser.step(finite)
            self.group.exchange(self.parts)
        else:
            # With this the fused Adam leaves everything as it is, and nobody waits for the value.
            for name, value in (("grad_scale", None), ("found_inf", (~finite).float())):
                setattr(self.optimiser, name, value)
            self.optimiser.step()
        measured = {"loss": loss, "bpp": bpp, "distortion": distortion, "grad_norm": norm.double()}
        return measured, finite

    def next_batch(self) -> Batch:
        """Return the batch of the step that comes next."""
        s = self.settings
        if self._loader is None:
            self._loader = self._new_loader()
            self._requested = (self.step, self.samples)
        while len(self._loader) < AHEAD:
            step, sample = self._requested
            phase = phase_at(s, min(1.0, self.progress_at(step)))
            self._loader.request(step, sample, phase)
            self._requested = (step + 1, sample + phase.batch)
        return self._loader.take()

    def _new_loader(self) -> Loader:
        s, here = self.settings, self.group.size_here
        crops = CropCache(self.images.train, s.seed, s.scale, s.cache_gib * 2**30 / here)
        return Loader(
            crops,
            s.seed,
            len(self.model.config.lmbdas),
            self.model.latent_shapes,
            rank=self.group.rank,
            size=self.group.size,
            workers=max(1, s.workers // here),
            graphics=s.graphics,
        )

    def _step_graph(self) -> StepGraph | None:
        """Records forward and backward where there is one GPU; elsewhere None, and a warning."""
        if self.group.device.type == "cuda" and self.group.size == 1:
            return StepGraph(self._add_gradients, self.parameters, self.group.device)
        logger.warning(
            "no CUDA graph; it needs one process on a GPU, and here are %d on %s",
            *(self.group.size, self.group.device.type),
        )
        return None

    def _gradients(self, batch: Batch) -> Tensor:
        """Set the gradient of the mean loss; returns sums of loss, bpp and distortion `[3]`."""
        compute = self.graph or self._add_gradients
        return compute(batch, self.clock.lap)

    def _add_gradients(self, batch: Batch, lap: Lap) -> Tensor:
        """Add up the gradient of the mean loss; returns sums of loss, bpp and distortion `[3]`.

        Args:
            lap: called with the name of each part of the step that is done.
        """
        s, device = self.settings, self.group.device
        size = len(batch.x) // s.accumulate
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for start in range(0, len(batch.x), size):
            part = batch.part(slice(start, start + size))
            x = moved(part.x, device).float() / 255
            # Qualities stay where they are: on the host, their range is checked.
            quality = part.quality
            if quality is not None and device.type == "cuda":
                quality = pinned(quality)
            noise = {name: moved(values, device) for name, values in part.noise.items()}
            # Gradients are exchanged once, with those of the last part.
            last = start + size == len(batch.x)
            network, wait = self.network, contextlib.nullcontext()
            if isinstance(network, nn.parallel.DistributedDataParallel) and not last:
                wait = network.no_sync()
            with wait:
                with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                    output = network(x, quality, noise)
                losses = objective(self.model, output, x, quality, s)
                lap("forward")
                (minimised(losses["loss"], s).sum() / len(batch.x)).backward()
            lap("backward")
            names = ("loss", "bpp", "distortion")
            sums += torch.stack([losses[name].detach().double().sum() for name in names])
        return sums

    def _train_quantiles(self) -> Tensor:
        self.aux_optimiser.zero_grad()
        aux_loss = self.model.aux_loss()
        aux_loss.backward()
        self.aux_optimiser.step()
        return aux_loss.detach().double()

    @torch.no_grad()
    def _update_average(self, finite: Tensor) -> None:
        if self.average:
            decay = min(self.settings.ema, (1 + self.step) / (EMA_START + self.step))
            part = torch.where(finite, 1 - decay, 0.0)
            move(list(self.average.values()), list(self.names), part)

    # ---------------------------------------------------------------- what comes out

    def position(self) -> dict[str, Any]:
        """Where the run is, as every record of the log says it."""
        return {
            "step": self.step,
            "minutes": round(self.seconds / 60, 3),
            "core_hours": round(self.cpu_seconds / 3600, 4),
            "megapixels": round(self.pixels / 1e6, 3),
        }

    @property
    def skipped(self) -> int:
        """Steps that were not taken, because loss or gradient was not finite."""
        return int(self._skipped)

    @property
    def bf16(self) -> bool:
        """Whether the transforms run under autocast to bfloat16."""
        precision = self.settings.precision
        return precision == "bf16" or (precision == "auto" and has_bf16(self.group.device))

    def throughput(self) -> dict[str, Any]:
        """Images per second of training since the last report, and the share of each part."""
        seconds = self.clock.seconds
        spent = {part: seconds[part] - self.window.clock[part] for part in PARTS}
        total = max(sum(spent.values()), 1e-9)
        return {
            "images_per_second": round(self.window.images / total, 3),
            "share": {part: round(seconds / total, 4) for part, seconds in spent.items()},
        }

    def report(self) -> dict[str, Any]:
        """Means since the last report, and where the time went; then a new window begins."""
        phase = phase_at(self.settings, min(1.0, self.progress_at(self.step - 1)))
        self.clock.start()
        means = self.window.means()  # a GPU finishes its queue here
        self.clock.lap("optimiser")
        record = {
            "lr": self.optimiser.param_groups[0]["lr"],
            "crop": phase.crop,
            "batch": phase.batch,
            "skipped": self.skipped,
            **means,
            **({"cuda_graph": self.graph.is_used} if self.graph else {}),
            **self.throughput(),
        }
        self.window = Window(self.group.device, clock=dict(self.clock.seconds))
        return record

    def is_best(self, loss: float) -> bool:
        """Whether a validation with this loss is the best so far; it is noted if it is."""
        if not loss < self.best.get("loss", math.inf):
            return False
        self.best = {"step": self.step, "loss": loss}
        return True

    @torch.no_grad()
    def finished_model(self, *, round_weights: bool = False) -> CMamba:
        """The model as it is exported: averaged weights, entropy tables, eval mode.

        Args:
            round_weights: round all weights to float16, before the tables are made of them.
        """
        model = copy.deepcopy(self.model).eval()
        for name, parameter in model.named_parameters():
            if name in self.average:
                parameter.copy_(self.average[name])
            if round_weights:
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
        """All that a run needs to go on; every process must ask, that of process 0 is complete.

        Random draws are functions of the seed and of step and sample, see
        `cmamba_ref.training.draws`, so these two are also the position in the data and the state of
        the generators; the learning rate is a function of the step, or of the seconds.
        """
        state = {
            "format": FORMAT,
            "settings": self.settings.to_dict(),
            "model": json.loads(self.model.config.to_json()),
            "photographs": self.images.fingerprint,
            "step": self.step,
            "samples": self.samples,
            "pixels": self.pixels,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "skipped": self.skipped,
            "best": self.best,
            "window": self.window.state(),
        }
        return Checkpoint(self._tensors(), state)

    def record(self, model: CMamba) -> dict[str, Any]:
        """The position of the run, for one that continues from the exported `model`."""
        progress = min(1.0, self.progress)
        return {
            "format": RECORD_FORMAT,
            "step": self.step,
            "samples": self.samples,
            "pixels": self.pixels,
            "seconds": self.seconds,
            "core_hours": self.cpu_seconds / 3600,
            "progress": progress,
            "phase": phase_at(self.settings, progress)._asdict(),
            "lr": learning_rate(self.settings, self.step, progress),
            "best": self.best,
            "model_id": model.model_id.hex(),
            "settings": self.settings.to_dict(),
        }

    def continue_from(self, record: dict[str, Any]) -> None:
        """Go on where `record` says, with the weights of `init` and no state of an optimiser.

        The optimiser first gathers its statistics on the last batches before that point.

        Raises:
            TrainingError: it is no record of a run.
        """
        if record.get("format") != RECORD_FORMAT:
            raise TrainingError(
                f"`continue_from` must be the record of a run, of format {RECORD_FORMAT}, got "
                f"{record.get('format')!r}; exported models have it as run.json"
            )
        if record.get("model_id") != self.model.model_id.hex():
            raise TrainingError(
                f"`continue_from` must belong to the weights of `init`, got the record of model "
                f"{record.get('model_id')} and model {self.model.model_id.hex()}; "
                "take run.json from the same folder"
            )
        try:
            self.step, self.samples, self.pixels = (
                int(record[name]) for name in ("step", "samples", "pixels")
            )
            self.seconds = self._seconds_before = float(record["seconds"])
            self.cpu_seconds = self._cpu_seconds_before = 3600 * float(record["core_hours"])
            self.best = dict(record["best"])
        except (KeyError, TypeError, ValueError) as error:
            raise TrainingError(f"`continue_from` must be a record of a run: {error!r}") from error
        # All batches of the phase that is to go on, also where an earlier one has just ended.
        phase = phase_at(self.settings, min(1.0, self.progress))
        repeated = min(GATHERED_STEPS, self.step, self.samples // phase.batch)
        loader = self._new_loader()
        for back in range(repeated, 0, -1):
            loader.request(self.step - back, self.samples - back * phase.batch, phase)
            self._take_step(loader.take(), 0.0)
        loader.close()
        self.clock = Clock(self.group.device)  # as with validation, this time does not count

    def restore(self, checkpoint: Checkpoint, *, extend: bool = False) -> None:
        """Go on from a checkpoint.

        Args:
            extend: whether the run may be made longer.

        Raises:
            TrainingError: the checkpoint is of another model, of other settings or images.
        """
        state, tensors = checkpoint.state, checkpoint.tensors
        if state.get("format") != FORMAT:
            raise TrainingError(
                f"the checkpoint must be of format {FORMAT}, got {state.get('format')}; go on with "
                "the version that wrote it, or start from its exported weights with `init`"
            )
        differing = conflicts(state["settings"], self.settings, extend=extend)
        if CMambaConfig.from_json(json.dumps(state["model"])) != self.model.config:
            differing.append("the model's configuration is another")
        if state["photographs"] != self.images.fingerprint:
            differing.append("the images are not the ones it began with")
        if differing:
            raise TrainingError(
                f"the run must go on as it began, but {'; '.join(differing)}. Give the settings it "
                "began with, or another `out`; to start from its weights, use `init`"
            )
        _restore_tensors(self, tensors)
        self.step, self.samples, self.pixels = state["step"], state["samples"], state["pixels"]
        self.seconds = self._seconds_before = state["seconds"]
        self.cpu_seconds = self._cpu_seconds_before = state["cpu_seconds"]
        self._skipped.fill_(state["skipped"])
        self.best = state["best"]
        self.window.restore(state["window"])

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        tensors |= self._slots(self.aux_optimiser)
        slots = self._slots(self.optimiser)
        return tensors | (self.group.collect(slots) if len(self.parts) > 1 else slots)

    def _slots(self, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
        return {
            f"{slot}.{self.names[parameter]}": value
            for parameter, slots in optimiser.state.items()
            for slot, value in slots.items()
        }


def has_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Not in every version of torch that this package takes: without it the answer is no.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))


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
                    slot: _slot(value, parameter)
                    for slot, value in saved.items()
                    if value is not None
                }


def _slot(value: Tensor, parameter: Tensor) -> Tensor:
    """A slot of an optimiser's state as it was: on the device and laid out in memory."""
    if value.dtype == torch.int64:
        return value  # counted by the host
    if value.shape == parameter.shape:
        return torch.empty_like(parameter).copy_(value)
    return value.to(parameter.device)


def _divided(parameters: list[Tensor], processes: int) -> list[list[Tensor]]:
    """The weights in parts of about equal work for SOAP, one part for each process."""
    parts: list[list[Tensor]] = [[] for _ in range(processes)]
    loads = [0.0] * processes
    for parameter in sorted(parameters, key=lambda p: -work(p.shape)):
        lightest = loads.index(min(loads))
        parts[lightest].append(parameter)
        loads[lightest] += work(parameter.shape)
    return parts


def _optimiser(
    settings: Settings, model: CMamba, parameters: list[Tensor]
) -> torch.optim.Optimizer:
    """Adam, AdamW or SOAP; with AdamW weights of convolutions and linear layers decay."""
    if settings.optimiser == "adam":
        return torch.optim.Adam(parameters, lr=settings.lr, fused=True)
    if settings.optimiser == "soap":
        return SOAP([{"params": parameters}], lr=settings.lr)  # type: ignore[list-item]
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
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True)


class Window:
    """What was measured since the last record of the log; sums are kept on the device.

    Args:
        clock: what the clock showed when the window began.
    """

    def __init__(self, device: torch.device, clock: dict[str, float] | None = None) -> None:
        self.sums = torch.zeros(len(MEASURES), dtype=torch.float64, device=device)
        self.steps = torch.zeros((), dtype=torch.float64, device=device)
        self.images = 0  # trained on, since this process began the window
        self.clock = clock or dict.fromkeys(PARTS, 0.0)

    def add(self, measures: Tensor, finite: Tensor, images: int) -> None:
        """A step that was skipped counts for the throughput alone."""
        self.images += images
        self.sums += torch.where(finite, measures, 0.0)
        self.steps += finite

    def means(self) -> dict[str, float]:
        """Mean of each measure; none where every step was skipped."""
        if not self.steps:
            return {}
        return dict(zip(MEASURES, (self.sums / self.steps).tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        return {"sums": self.sums.tolist(), "steps": float(self.steps)}

    def restore(self, state: dict[str, Any]) -> None:
        self.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self.steps.fill_(state["steps"])

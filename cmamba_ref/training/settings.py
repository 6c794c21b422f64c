"""What a training run is: one frozen dataclass, from defaults, a TOML file and the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cmamba_ref.config import CONFIGS, CMambaConfig
from cmamba_ref.errors import InvalidArgumentError
from cmamba_ref.metrics import MS_SSIM_MIN_SIDE
from cmamba_ref.model import MULTIPLE

DECAYS = ("linear", "cosine", "step")
OPTIMISERS = ("adam", "adamw", "soap")
PRECISIONS = ("fp32", "bf16", "auto")
# Settings of earlier versions, and the value that they had where they did nothing.
REMOVED = {"distortion": "mse"}
# One of them says how long to train.
LENGTHS = {"steps", "minutes", "core_hours"}
CODED = ("never", "end", "always")


def _setting(
    default: Any,
    help: str,
    low: float | None = None,
    high: float = math.inf,
    *,
    may_change: bool = False,
    choices: tuple = (),
) -> Any:
    """A field with what the command line says about it.

    Args:
        low, high: bounds of a number, or of each entry of several; `low` has their type.
        may_change: whether a run may go on with another value: it says how, where or how often
            something is done, and not what is learned beyond rounding.
    """
    metadata = {
        "help": help,
        "kind": type(default) if low is None else type(low),
        "bounds": None if low is None else (low, high),
        "may_change": may_change,
        "choices": choices,
    }
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Every choice of a training run; the command line and TOML files use these names.

    Raises:
        InvalidArgumentError: a value out of its range, or values that do not fit together.
    """

    data: str = _setting("", "folder of images, searched recursively", may_change=True)
    out: str = _setting("", "folder for checkpoints, log and model", may_change=True)
    # The model itself is compared when a run goes on, so how it was named may change.
    config: str = _setting(
        "", f"which model: {', '.join(CONFIGS)}, or a config.json (tiny)", may_change=True
    )
    init: str = _setting("", "weights to start from, instead: a directory", may_change=True)
    continue_from: str = _setting(
        "", "with init: the run.json beside these weights, to go on where it says", may_change=True
    )
    model: Mapping[str, Any] = _setting(
        {},
        "sizes that differ from those of config, as KEY=VALUE in TOML's notation",
        may_change=True,
    )

    steps: int = _setting(0, "length of training in optimiser steps", 0)
    minutes: float = _setting(0.0, "length in minutes of training, validation not counted", 0.0)
    core_hours: float = _setting(0.0, "length in hours of processor time, of all processes", 0.0)
    crop: tuple[int, ...] = _setting((128,), "side of the crops, one for each phase", MULTIPLE)
    batch: tuple[int, ...] = _setting((8,), "crops per step over all processes, for each phase", 1)
    until: tuple[float, ...] = _setting(
        (), "part of the run at which each phase but the last ends", 1e-6, 1
    )
    accumulate: int = _setting(
        1, "parts of a batch that a process does in turn", 1, may_change=True
    )
    scale: float = _setting(2.0, "maximum random downscale factor of a crop", 1.0, 64)
    graphics: float = _setting(
        0.0, "share of crops that are drawn: text, shapes, screenshots", 0.0, 1
    )

    ms_ssim: float = _setting(
        0.0, "part of 1 - MS-SSIM, times 1280 / 255^2, in the distortion; the rest is MSE", 0.0, 1
    )
    lmbda: float = _setting(0.013, "trade-off of a fixed-rate model", 1e-12, 1e12)
    balance: float = _setting(0.5, "variable rate: the loss is divided by lambda^BALANCE", -8.0, 8)
    log_loss: bool = _setting(False, "minimise log(1 + loss) of each crop")

    optimiser: str = _setting("adam", "of the weights", choices=OPTIMISERS)
    lr: float = _setting(1e-4, "learning rate after warm-up", 1e-12, 1e3)
    final_lr: float = _setting(1e-5, "learning rate at the end", 0.0, 1e3)
    warmup: int = _setting(200, "steps of linear warm-up", 0)
    schedule: str = _setting("linear", "shape of the fall from lr to final_lr", choices=DECAYS)
    decay: float = _setting(
        0.3, "final part of the run in which a linear or cosine rate falls", 0.0, 1
    )
    milestones: tuple[float, ...] = _setting(
        (0.8, 0.9, 0.95),
        "parts of the run at which a rate of schedule step falls, evenly in log",
        0.0,
        1,
    )
    aux_lr: float = _setting(1e-3, "learning rate of the prior's quantiles", 0.0, 1e3)
    weight_decay: float = _setting(
        0.0, "of adamw, on weights of convolutions and linear layers", 0.0, 1e3
    )
    clip: float = _setting(1.0, "bound of the gradient norm; 0: none", 0.0)
    ema: float = _setting(
        0.999, "decay of the averaged weights that are exported; 0: no average", 0.0, 1 - 1e-9
    )
    precision: str = _setting(
        "fp32",
        "bf16: autocast of the transforms, not of scans and entropy model; auto: bf16 where the "
        "device has it, so a run that moves to another machine may change",
        choices=PRECISIONS,
    )
    seed: int = _setting(0, "of everything random", 0, 2**32)

    validation: int = _setting(8, "images held out", 1)
    validation_crop: int = _setting(256, "side of their centre crops", MULTIPLE, may_change=True)
    validate_every: int = _setting(
        1000, "steps between validations; 0: only at the end", 0, may_change=True
    )
    coded: str = _setting(
        "end", "when held-out crops are coded to files", may_change=True, choices=CODED
    )
    samples: int = _setting(2, "held-out crops that are written as PNG", 0, may_change=True)

    save_every: float = _setting(5.0, "minutes between checkpoints", 0.0, may_change=True)
    keep: int = _setting(3, "newest checkpoints that are kept, beside the best", 1, may_change=True)
    log_every: int = _setting(50, "steps between records in the log", 1, may_change=True)
    tensorboard: bool = _setting(False, "also log for TensorBoard (extra: train)", may_change=True)
    profile: int = _setting(0, "steps to profile at the start of this command", 0, may_change=True)

    device: str = _setting("auto", "cpu, cuda, or auto: cuda where there is one", may_change=True)
    processes: int = _setting(
        0, "processes on this machine's CPU; 0: one per core, as batches allow", 0, may_change=True
    )
    threads: int = _setting(
        0, "torch threads of a process; 0: 1 of several, torch's choice of one", 0, may_change=True
    )
    workers: int = _setting(4, "threads that read images, per machine", 1, may_change=True)
    cache_gib: float = _setting(
        2.0, "memory for crops cut in advance, per machine, in GiB", 0.0, 2.0**20, may_change=True
    )
    channels_last: bool = _setting(True, "keep channels last in memory", may_change=True)
    compile: bool = _setting(False, "compile the model by torch.compile", may_change=True)
    cuda_graph: bool = _setting(
        False, "on one GPU, launch forward and backward as one CUDA graph", may_change=True
    )
    round_weights: bool = _setting(
        False, "export weights rounded to float16, in half the room", may_change=True
    )

    fit_tables: int = _setting(
        0, "training images whose symbols make the entropy tables at the end", 0, may_change=True
    )
    export: str = _setting(
        "", "folder for log, best and current model, in float16, all the time", may_change=True
    )
    export_every: float = _setting(60.0, "seconds between these exports", 0.0, may_change=True)
    export_keep: int = _setting(
        8, "files in that folder at most: 3 current, log, 3 best", 3, may_change=True
    )

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            value = _checked(setting, getattr(self, setting.name))
            object.__setattr__(self, setting.name, value)
        for name in ("crop", "validation_crop"):
            if np.mod(getattr(self, name), MULTIPLE).any():
                raise InvalidArgumentError(
                    f"`{name}` must be a multiple of {MULTIPLE}, got {getattr(self, name)}"
                )
        if len(self.batch) != len(self.crop) or len(self.until) != len(self.crop) - 1:
            raise InvalidArgumentError(
                "`crop` must have as many entries as `batch` and one more than `until`, got "
                f"{self.crop}, {self.batch} and {self.until}"
            )
        if list(self.until) != sorted(set(self.until)):
            raise InvalidArgumentError(f"`until` must rise, got {self.until}")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise InvalidArgumentError(f"`milestones` must rise, got {self.milestones}")
        if sum(map(bool, (self.steps, self.minutes, self.core_hours))) != 1:
            raise InvalidArgumentError(
                "one of `steps`, `minutes` and `core_hours` must be above 0, got "
                f"{self.steps}, {self.minutes} and {self.core_hours}; say how long to train"
            )
        if self.continue_from and not self.init:
            raise InvalidArgumentError(
                f"`continue_from` must stand with `init`, got {self.continue_from!r} alone; "
                "name the folder of the weights as well"
            )
        if self.init and (self.config or self.model):
            raise InvalidArgumentError(
                f"`init` must stand without `config` and `model`, got {self.init!r} and "
                f"{self.config or dict(self.model)!r}; the weights bring their configuration"
            )
        if self.profile and (self.compile or self.cuda_graph):
            raise InvalidArgumentError(
                f"`profile` must be 0 with `compile` and `cuda_graph`, got {self.profile}; the "
                "parts of a model cannot be told apart there"
            )
        if self.cuda_graph and self.ms_ssim:
            raise InvalidArgumentError(
                f"`cuda_graph` must be off with `ms_ssim`, got {self.ms_ssim}; pytorch-msssim "
                "copies constants from the host, which no graph can hold"
            )
        if self.ms_ssim and min(self.crop) < MS_SSIM_MIN_SIDE:
            raise InvalidArgumentError(
                f"`crop` must be at least {MS_SSIM_MIN_SIDE} in each phase for MS-SSIM, got "
                f"{self.crop}; train on larger crops"
            )

    def model_config(self) -> CMambaConfig:
        """The sizes of the model: those of `config`, with what `model` changes.

        Raises:
            InvalidArgumentError: no such configuration, or sizes that do not fit together.
        """
        name = self.config or "tiny"
        if name in CONFIGS:
            base = CONFIGS[name]
        elif Path(name).is_file():
            base = CMambaConfig.from_json(Path(name).read_text())
        else:
            raise InvalidArgumentError(
                f"`config` must be one of {sorted(CONFIGS)} or a config.json, got {name!r}"
            )
        known = {f.name for f in dataclasses.fields(CMambaConfig)}
        if unknown := sorted(set(self.model) - known):
            raise InvalidArgumentError(
                f"`model` must hold sizes of CMambaConfig, got {unknown}; see cmamba_ref/config.py"
            )
        return dataclasses.replace(base, **self.model)

    def to_dict(self) -> dict[str, Any]:
        """All settings as they stand in JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def _checked(setting: dataclasses.Field, value: Any) -> Any:
    """The value of a setting, in its own type and range."""
    name, kind, bounds = setting.name, setting.metadata["kind"], setting.metadata["bounds"]
    choices, several = setting.metadata["choices"], isinstance(setting.default, tuple)
    # TOML and JSON have no tuples, and one number is a sequence of one.
    entries = tuple(value) if several and isinstance(value, list | tuple) else (value,)
    if kind is float:
        entries = tuple(float(entry) if type(entry) is int else entry for entry in entries)
    for entry in entries:
        if type(entry) is not kind:
            wanted = "a table" if kind is dict else f"of type {kind.__name__}"
            raise InvalidArgumentError(f"`{name}` must be {wanted}, got {entry!r}")
        if bounds and not bounds[0] <= entry <= bounds[1]:  # also for NaN
            low, high = bounds
            wanted = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise InvalidArgumentError(f"`{name}` must be {wanted}, got {entry!r}")
        if choices and entry not in choices:
            raise InvalidArgumentError(
                f"`{name}` must be one of {', '.join(choices)}, got {entry!r}"
            )
    return entries if several else entries[0]


def read_toml(path: str | os.PathLike) -> dict[str, Any]:
    """The settings in a TOML file; sizes of the model stand in its table `[model]`.

    Raises:
        InvalidArgumentError: no such file, no TOML, or a name that is no setting.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"cannot read the settings in {str(path)!r}: {error}") from error
    known = {f.name for f in dataclasses.fields(Settings)}
    if unknown := sorted(set(values) - known):
        raise InvalidArgumentError(
            f"{str(path)!r} must hold settings of the trainer, got {unknown}; "
            "see cmamba_ref/training/settings.py"
        )
    return values


def resolve(file: Mapping[str, Any], overrides: Mapping[str, Any]) -> Settings:
    """Settings of a file with overrides on top.

    Where an override excludes what the file says (`minutes` and `steps`, `init` and `config`),
    the override counts; sizes in `model` are taken one by one.
    """
    values = dict(file)
    for winner, losers in (
        *((length, LENGTHS - {length}) for length in LENGTHS),
        ("init", ("config", "model", "continue_from")),
        ("config", ("init", "continue_from")),
    ):
        if winner in overrides:
            for loser in losers:
                values.pop(loser, None)
    tables = [given["model"] for given in (values, overrides) if "model" in given]
    if len(tables) == 2 and all(isinstance(table, Mapping) for table in tables):
        overrides = {**overrides, "model": {**tables[0], **tables[1]}}
    return Settings(**{**values, **overrides})


def conflicts(saved: Mapping[str, Any], now: Settings, *, extend: bool) -> list[str]:
    """What keeps a run with the settings `saved` from going on with the settings `now`.

    Args:
        saved: what `to_dict` gave when the run was saved.
        extend: whether `now` may be longer.

    Returns:
        one line for each setting that differs and may not.
    """
    wanted, found = now.to_dict(), []
    for name, harmless in REMOVED.items():
        if saved.get(name, harmless) != harmless:
            found.append(f"{name} was {saved[name]}, which is no setting any more")
    for f in dataclasses.fields(Settings):
        if f.metadata["may_change"]:
            continue
        # A setting that is newer than the run was at its default.
        default = list(f.default) if isinstance(f.default, tuple) else f.default
        before, after = saved.get(f.name, default), wanted[f.name]
        if before == after:
            continue
        is_longer = f.name in LENGTHS and before and after > before
        if not (is_longer and extend):
            hint = ", unless you say --extend" if is_longer else ""
            found.append(f"{f.name} was {before} and is now {after}{hint}")
    return found

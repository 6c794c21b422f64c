"""Train a CMamba model on a folder of images.

    python tools/train.py --data photos --out runs/mine --config tiny --minutes 600
    python tools/train.py tools/recipes/small.toml --data photos --out runs/small
    torchrun --nproc-per-node 8 tools/train.py tools/recipes/base.toml --data photos --out runs/base

On a CPU it starts one process of one thread per core by itself (--processes), which train as one.
Settings come from a TOML file, if one is given, and from the command line, which counts more; the
names are the same.  Into `out` go:

    log.jsonl      a line per record: settings, losses, throughput, validations
    checkpoints/   the newest and the best; each is checked before it is used
    samples/       held-out crops, and what the model makes of them
    model/         at the end: config.json and model.safetensors, for `cmamba encode --model`, and
                   run.json, which says where the run was
    best/          the same of the validation with the lowest loss

The same command again goes on from the newest whole checkpoint; so it does after a kill.  SIGTERM
and Ctrl-C save first, and end with the exit code 128 + the signal's number.  A run goes on with the
settings it began with; `--extend` allows a greater length.  Where no checkpoint is left,
`--init runs/mine/best --continue-from runs/mine/best/run.json` goes on from exported weights.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import os
import signal
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cmamba_ref import CMamba, CMambaError
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.errors import TrainingError
from cmamba_ref.training import checkpoints, data, distributed, fitting, profiling, validation
from cmamba_ref.training.distributed import Group, joined
from cmamba_ref.training.exporter import Exporter
from cmamba_ref.training.log import Log
from cmamba_ref.training.settings import Settings, read_toml, resolve
from cmamba_ref.training.trainer import Trainer


def parse_args(argv: list[str] | None) -> tuple[Settings, bool]:
    """The settings of the run, and whether a run may become longer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", type=Path, help="TOML file of settings")
    parser.add_argument("--extend", action="store_true", help="let a run become longer")
    for field in dataclasses.fields(Settings):
        _add_option(parser, field)
    given = vars(parser.parse_args(argv))
    recipe, extend = given.pop("recipe"), given.pop("extend")
    if "model" in given:
        given["model"] = {name: value for size in given["model"] for name, value in size.items()}
    try:
        settings = resolve(read_toml(recipe) if recipe else {}, given)
    except CMambaError as error:
        parser.error(str(error))
    for name in ("data", "out"):
        if not getattr(settings, name):
            parser.error(f"`{name}` must be a folder, got none; give --{name}")
    return settings, extend


def _add_option(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    """An option of the command line for a setting; it has no value unless it is given."""
    default, text, kind = field.default, field.metadata["help"], field.metadata["kind"]
    options: dict[str, Any] = {"type": kind, "choices": field.metadata["choices"] or None}
    if kind is bool:
        options = {"action": argparse.BooleanOptionalAction}
    elif kind is dict:
        options |= {"type": _size, "nargs": "+", "action": "extend", "metavar": "KEY=VALUE"}
    elif isinstance(default, tuple):
        options |= {"nargs": "*", "metavar": "X"}
        text += f" (default: {' '.join(map(str, default)) or 'none'})"
    elif default:
        text += f" (default: {default})"
    name = "--" + field.name.replace("_", "-")
    parser.add_argument(name, help=text.replace("%", "%%"), default=argparse.SUPPRESS, **options)


def _size(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE as in TOML, got {text!r}") from error


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    settings, extend = parse_args(argv)
    # Only the first of several processes speaks, but all of them may fail.
    is_first = int(os.environ.get("RANK", 0)) == 0
    logging.basicConfig(level=logging.INFO if is_first else logging.ERROR, format="%(message)s")
    try:
        processes = 1  # what torchrun starts, it has started already
        if "WORLD_SIZE" not in os.environ:
            processes = distributed.processes_for(
                settings.device, settings.batch, settings.accumulate, settings.processes
            )
        with (
            told_to_stop() as signals,
            distributed.started([sys.executable, str(Path(__file__).resolve()), *argv], processes),
            joined(settings.device) as group,
            distributed.threads(settings.threads or (0 if group.size == 1 else 1)),
            contextlib.closing(Run(settings, group, extend=extend)) as run,
        ):
            run.train(signals)
    except CMambaError as error:
        raise SystemExit(f"train.py: {error}") from error
    return 128 + signals[0] if signals else 0


@contextlib.contextmanager
def told_to_stop() -> Iterator[list[int]]:
    """The signals that asked this process to end, in a list that fills when they arrive."""
    signals: list[int] = []
    before = {
        number: signal.signal(number, lambda received, _: signals.append(received))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Side of what is counted of an image, so that it fits where training fits.
FITTED_CROP = 512


class Run:
    """A run in its folder: the trainer, and what is written while it trains.

    Args:
        extend: whether a run that is found in the folder may become longer.
    """

    def __init__(self, settings: Settings, group: Group, *, extend: bool) -> None:
        self.settings, self.group, self.out = settings, group, Path(settings.out)
        images = self.images = data.find_images(
            settings.data, max(settings.crop), settings.validation, settings.workers
        )
        size, count = settings.validation_crop, len(images.held_out)
        self.held_out = data.centre_crops(images.held_out, size, count)
        # As many images of those that are trained on, to show how far the model overfits.
        spread = images.train[:: max(1, len(images.train) // count)]
        self.trained_on = data.centre_crops([*spread, *images.train], size, count)
        self.trainer = Trainer(settings, images, group)
        found = checkpoints.newest(self.out / "checkpoints")
        step = -1 if found is None else found.state["step"]
        group.check_same(step, "`out` must be one folder for all processes")
        if found is not None:
            self.trainer.restore(found, extend=extend)
        elif settings.continue_from:
            self.trainer.continue_from(read_record(settings.continue_from))
        self.saved_at = self.trainer.seconds
        self.exporter = (
            Exporter(Path(settings.export), settings.export_every, settings.export_keep)
            if settings.export and group.is_first
            else None
        )
        self.log = (
            Log(self.out, self.trainer.step, settings.tensorboard) if group.is_first else None
        )
        config = json.loads(self.trainer.model.config.to_json())
        self.write(
            "start" if found is None else "resume",
            settings=settings.to_dict(),
            bf16=self.trainer.bf16,
            model=config,
        )

    def train(self, signals: list[int]) -> None:
        """Train to the end, or until a signal comes; either way what was done is saved."""
        settings, trainer = self.settings, self.trainer
        if not trainer.finished:  # a model too large for it is refused now and not after hours
            self.export_current()
        profiler = profiling.Profiler(trainer.model, settings.profile)
        # A bar of the part of the run that is done, in steps, minutes or core-hours.
        form = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        done, hidden = min(trainer.progress, 1.0), not self.group.is_first
        with tqdm(total=1.0, initial=done, bar_format=form, mininterval=1, disable=hidden) as bar:
            while not (trainer.finished or trainer.stopping):
                profiler.before_step()
                trainer.train_step(stop=bool(signals))
                shares = profiler.after_step()
                bar.update(min(trainer.progress, 1.0) - bar.n)
                if shares is not None:
                    self.write("profile", share_of_operators=shares, **trainer.throughput())
                if trainer.step % settings.log_every == 0:
                    report = trainer.report()
                    self.write(**report)
                    loss = report.get("loss", math.nan)
                    bar.set_postfix_str(f"step {trainer.step} loss {loss:.4f}", refresh=False)
                if trainer.finished:
                    break
                if self.exporter is not None and self.exporter.is_due:
                    self.export_current()
                if settings.validate_every and trainer.step % settings.validate_every == 0:
                    self.validate("validation")
                    self.save()
                elif trainer.seconds - self.saved_at >= 60 * settings.save_every:
                    self.save()
        self.save()
        if trainer.finished:
            model = self.validate("end")
            self.save()  # again, with what is the best
            self.export(model, "model")
            self.export_log()
        else:
            self.export_current()

    def close(self) -> None:
        self.trainer.close()
        if self.log is not None:
            self.log.close()

    def write(self, event: str = "", **values: Any) -> None:
        """A record into the log."""
        if self.log is not None:
            named = {"event": event} if event else {}
            self.log.write({**named, **self.trainer.position(), **values})

    def save(self) -> None:
        """A checkpoint; older ones make room."""
        self.saved_at = self.trainer.seconds
        checkpoint = self.trainer.checkpoint()
        if self.group.is_first:
            folder, step = self.out / "checkpoints", self.trainer.step
            checkpoints.write(folder, step, checkpoint)
            best = [self.trainer.best["step"]] if self.trainer.best else []
            checkpoints.prune(folder, step, self.settings.keep, also=best)

    def validate(self, event: str) -> CMamba:
        """Measure the model as it would be exported now, keep it if it is the best, return it."""
        settings, trainer = self.settings, self.trainer
        model = self.finished_model()
        if trainer.finished and settings.fit_tables:
            self.fit_tables(model)
        samples = self.out / "samples" / f"{trainer.step:09d}" if settings.samples else None
        qualities = validation.validate(
            model,
            self.held_out,
            settings,
            self.group,
            coded=settings.coded in ("always", event),
            samples=samples,
        )
        held_out = validation.mean_loss(qualities)
        trained_on = validation.mean_loss(
            validation.validate(model, self.trained_on, settings, self.group)
        )
        self.write(
            event,
            qualities=qualities,
            mean_loss={
                "held_out": held_out,
                "trained_on": trained_on,
                "gap": held_out - trained_on,
            },
        )
        if trainer.is_best(held_out):
            self.export(model, "best")
        return model

    def finished_model(self) -> CMamba:
        """The model as it is exported now, with the tables of Gaussians."""
        # What is carried away has to be small.
        is_rounded = self.settings.round_weights or bool(self.settings.export)
        return self.trainer.finished_model(round_weights=is_rounded)

    def fit_tables(self, model: CMamba) -> None:
        """Give the model entropy tables of the symbols of training images; processes share them.

        Of each image the centre is counted, at its own scale.
        """
        images, count = self.images.train, self.settings.fit_tables
        spread = images[:: max(1, len(images) // count)][:count]
        chosen = spread[self.group.rank :: self.group.size]
        crops = data.centre_crops(chosen, FITTED_CROP, len(chosen))
        counts = fitting.count_symbols(model, crops, validation.qualities_of(model))
        model.gaussian_conditional.fit(self.group.sum(torch.from_numpy(counts)).numpy())

    def export(self, model: CMamba, name: str) -> None:
        """Write a model, and beside it where the run is, into the folder `name`."""
        if self.group.is_first:
            record = self.trainer.record(model)
            model.save_pretrained(self.out / name)
            text = json.dumps(record, indent=1) + "\n"
            write_atomically(self.out / name / "run.json", text.encode())
            if self.exporter is not None:
                self.exporter.write(name, model, record)

    def export_current(self) -> None:
        """Write log and model as they are now into the folder `export`, if there is one."""
        if self.exporter is not None:
            model = self.finished_model()
            self.exporter.write("model", model, self.trainer.record(model))
            self.export_log()

    def export_log(self) -> None:
        """Write the log into the folder `export`, if there is one."""
        if self.exporter is not None:
            self.exporter.write_log(self.out / "log.jsonl")


def read_record(path: str) -> dict[str, Any]:
    """What `Run.export` wrote.

    Raises:
        TrainingError: no such file, or no JSON object.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"cannot read `continue_from` {path!r}: {error}") from error
    if not isinstance(record, dict):
        raise TrainingError(f"`continue_from` must hold a JSON object, got {path!r}")
    return record


if __name__ == "__main__":
    sys.exit(main())

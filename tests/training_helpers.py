"""A miniature model, a folder of images, and runs of the trainer on them."""

import functools
import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import cmamba_ref
from cmamba_ref.config import CMambaConfig
from cmamba_ref.training.data import find_images
from cmamba_ref.training.distributed import Group
from cmamba_ref.training.settings import Settings, resolve
from cmamba_ref.training.trainer import Trainer
from tests.codec_helpers import SMALL

IMAGE = Path(cmamba_ref.__file__).parent / "data" / "coffee.png"
LOSSES = ("loss", "bpp", "distortion", "aux", "grad_norm")


@functools.cache
def parts_of_an_image() -> list[bytes]:
    """Six PNG files of 200x200 pixels."""
    files = []
    with Image.open(IMAGE) as image:
        for number in range(6):
            left, top = 200 * (number % 3), 200 * (number // 3)
            buffer = io.BytesIO()
            image.crop((left, top, left + 200, top + 200)).save(buffer, "PNG")
            files.append(buffer.getvalue())
    return files


def make_images(folder: Path) -> Path:
    """Make a folder of six images, some in a folder below, and return it."""
    (folder / "more").mkdir(parents=True)
    for number, file in enumerate(parts_of_an_image()):
        (folder / ("more" if number % 2 else ".") / f"{number}.png").write_bytes(file)
    return folder


def make_run_folder(folder: Path) -> Path:
    """A folder with images and the configuration of the miniature model, for `settings`."""
    make_images(folder / "photos")
    write_config(folder / "config.json")
    return folder


def write_config(path: Path, config: CMambaConfig = SMALL) -> Path:
    """The configuration of a model as a file, as the option `--config` takes it."""
    path.write_text(config.to_json())
    return path


def defaults(folder: Path) -> dict[str, Any]:
    """Settings that make a step take a fraction of a second."""
    return {
        "data": str(folder / "photos"),
        "out": str(folder / "run"),
        "config": str(folder / "config.json"),
        "crop": [64],
        "batch": [2],
        "validation": 1,
        "validation_crop": 64,
        "validate_every": 0,
        "warmup": 2,
        "log_every": 1,
        "samples": 0,
        "coded": "never",
        "processes": 1,
        "threads": 1,
        "workers": 2,
        "device": "cpu",
    }


def settings(folder: Path, **changes: Any) -> Settings:
    """Settings of a run of the miniature model in a folder made by `make_run_folder`."""
    return resolve(defaults(folder), {"steps": 6, **changes})


def make_trainer(folder: Path, **changes: Any) -> Trainer:
    """A trainer of one process with these settings."""
    images = find_images(folder / "photos", 64, held_out=1)
    chosen = settings(folder, **changes)
    return Trainer(chosen, images, Group(torch.device(chosen.device)))


def arguments(folder: Path, **changes: Any) -> list[str]:
    """The same as a command line."""
    command = []
    for name, value in {**defaults(folder), "steps": 6, **changes}.items():
        if value is None:
            continue
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            command.append(option if value else option.replace("--", "--no-", 1))
        else:
            entries = value if isinstance(value, list | tuple) else [value]
            command += [option, *map(str, entries)]
    return command


def records(out: Path) -> list[dict[str, Any]]:
    """The log of a run."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> dict[int, tuple[float, ...]]:
    """The measures of each step, from a log with a record per step."""
    steps = [record for record in records(out) if "event" not in record]
    assert len({record["step"] for record in steps}) == len(steps), "a step stands there twice"
    return {record["step"]: tuple(record[name] for name in LOSSES) for record in steps}

"""One image through one codec at one setting, as a real file: rate, distortion, times, memory.

Functions here run in the processes of tools/eval_rd.py, so what goes in and out can be pickled.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from classical_codecs import CODECS
from resident import peak_bytes, restart_peak
from stage_clock import OTHER, Timing, time_by_stage

import cmamba_ref
from cmamba_ref import CMamba, CMambaError
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.codec import formats
from cmamba_ref.codec.images import read_opaque_image
from cmamba_ref.codec.output import write_png
from cmamba_ref.errors import explain
from cmamba_ref.metrics import bits_per_pixel, ms_ssim, psnr

# What the stages of tools/stage_clock.py are summed up to.
GROUPS = ("transform", "entropy_parameters", "coder", "other")
# Of every codec, and of ours besides.
MEASURES = ("bpp", "psnr-rgb", "ms-ssim-rgb", "encoding_time", "decoding_time")
OUR_MEASURES = tuple(
    f"{direction}_{measure}"
    for direction in ("encoding", "decoding")
    for measure in (*(f"time_{group}" for group in GROUPS), "peak_bytes")
)

Row = dict[str, float]
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Point:
    """One point of a curve: a codec at one setting.

    Attributes:
        codec: the key of the curve; for a classical codec one of `CODECS`.
        setting: our quality, or a classical codec's setting; None for a model of one rate.
        model: name or directory of our model; None for a classical codec.
        model_id, name: its id in hexadecimal, and that of its configuration; "" for others.
        effort: of our encoder.
    """

    codec: str
    setting: float | None
    model: str | None = None
    model_id: str = ""
    name: str = ""
    effort: int = 0

    @property
    def label(self) -> str:
        """The point's name within its curve, fit for a folder."""
        setting = "" if self.setting is None else f"{self.setting:g}"
        return "-".join(part for part in (self.model_id, setting) if part)


@dataclass(frozen=True)
class Task:
    """One measurement.

    Attributes:
        image: the file.
        keep: folder for the coded and the decoded image; None to keep neither.
        brief: only bpp and PSNR.
    """

    point: Point
    image: Path
    keep: Path | None = None
    brief: bool = False


def image_paths(folder: Path, limit: int | None) -> list[Path]:
    """Return the files of a folder that may be images by their names, sorted, but no hidden ones.

    Args:
        limit: only the first so many; None for all.

    Raises:
        CMambaError: there is no folder, or nothing in it.
        OSError: the folder cannot be read.
    """
    if not folder.is_dir():
        raise CMambaError(f"{folder} is no folder")
    names = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    paths = [path for path in names if path.suffix.lower() in formats.suffixes()][:limit]
    if not paths:
        raise CMambaError(f"no images in {folder}")
    return paths


def read_rgb(path: Path) -> np.ndarray:
    """Return an image as uint8 `[H, W, 3]`; a grey one as three equal planes, for every codec."""
    image = read_opaque_image(path)
    return image if image.ndim == 3 else np.stack([image] * 3, axis=-1)


@functools.lru_cache(maxsize=1)
def load_model(source: str) -> CMamba:
    """Return a model, ready: what a first call sets up is not the time of an image."""
    model = CMamba.from_pretrained(source)
    cmamba_ref.decode(cmamba_ref.encode(np.zeros((64, 64, 3), np.uint8), model), model)
    return model


def measure(task: Task) -> Row | str:
    """Return the measures of one image at one point, or one line that says why there are none.

    Times are those of the codec between images and bytes in memory, in seconds; peaks are the
    most bytes of this process in RAM meanwhile, with torch and the model, where the system counts.
    """
    try:
        return _measure(task)
    except Exception as error:
        if (text := explain(error)) is None:
            raise
        return text


def _measure(task: Task) -> Row:
    original, point = read_rgb(task.image), task.point
    if point.model is None:
        codec, suffix, watched = CODECS[point.codec], CODECS[point.codec].suffix, _timed
        encode = functools.partial(codec.encode, original, point.setting or 0.0)
        decode = codec.decode
    else:
        model = load_model(point.model)
        suffix, watched = ".cmb", functools.partial(_watched, model)
        encode = functools.partial(
            cmamba_ref.encode, original, model, point.setting, effort=point.effort
        )
        decode = functools.partial(cmamba_ref.decode, model=model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if task.keep is not None:
            folder = task.keep / point.codec / point.label
            folder.mkdir(parents=True, exist_ok=True)
        file = folder / (task.image.name + suffix)
        data, encoding = watched(encode)
        write_atomically(file, data)
        stored = file.read_bytes()
        decoded, decoding = watched(functools.partial(decode, stored))
        if task.keep is not None:
            write_png(folder / f"{task.image.name}.decoded.png", decoded)
    height, width = original.shape[:2]
    row = {"bpp": bits_per_pixel(len(stored), width, height), "psnr-rgb": psnr(original, decoded)}
    if not task.brief:
        row["ms-ssim-rgb"] = ms_ssim(original, decoded)
        row |= {f"encoding_{key}": value for key, value in encoding.items()}
        row |= {f"decoding_{key}": value for key, value in decoding.items()}
    return row


def _timed(call: Callable[[], ResultT]) -> tuple[ResultT, Row]:
    start = time.perf_counter()
    result = call()
    return result, {"time": time.perf_counter() - start}


def _watched(model: CMamba, call: Callable[[], ResultT]) -> tuple[ResultT, Row]:
    """Return the result of a call, its time by group of stages, and the peak of memory."""
    counted = restart_peak()
    result, timing = time_by_stage(model, call)
    costs = {"time": timing.total} | by_group(timing)
    if counted and (peak := peak_bytes()) is not None:
        costs["peak_bytes"] = peak
    return result, costs


def by_group(timing: Timing) -> Row:
    """Return the seconds of each group; together they are the total: `other` takes what is left."""
    seconds = dict.fromkeys(GROUPS, 0.0)
    for stage, passed in timing.stages.items():
        if stage.startswith(("g_a", "g_s")):
            seconds["transform"] += passed
        elif stage == "entropy coder":
            seconds["coder"] += passed
        elif stage != OTHER:
            seconds["entropy_parameters"] += passed
    seconds["other"] = timing.total - sum(seconds.values())
    return {f"time_{group}": value for group, value in seconds.items()}

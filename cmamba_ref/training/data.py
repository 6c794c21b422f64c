"""Photographs on disk to batches of random crops, prepared on threads while the model works.

Threads and not processes: Pillow and NumPy let go of the interpreter while they decode, resize and
draw, and what a thread has made need not be sent anywhere.
"""

from __future__ import annotations

import hashlib
import logging
import struct
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cmamba_ref.errors import TrainingError
from cmamba_ref.training import draws
from cmamba_ref.training.schedule import Phase

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
# Crops that one decoding of a photograph is used for, at most.
MAX_CROPS_AHEAD = 16

# What Pillow raises on files that are damaged or no pictures.
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)

logger = logging.getLogger(__name__)

Shapes = Callable[[int, int], Mapping[str, tuple[int, int, int]]]


@dataclass(frozen=True)
class Photographs:
    """The photographs of a run.

    Attributes:
        train: those that are trained on.
        held_out: those that are not.
        fingerprint: of the names and sizes of all: a run goes on with the ones it began with.
    """

    train: list[Path]
    held_out: list[Path]
    fingerprint: str


def find_photographs(
    folder: str | Path, smallest_side: int, held_out: int, workers: int = 4
) -> Photographs:
    """All photographs below `folder`, of which every n-th, by path, is held out.

    Files that are no pictures, or have a side below `smallest_side` pixels, are left out.

    Raises:
        TrainingError: nothing would be left to train on.
    """
    root = Path(folder)
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    with ThreadPoolExecutor(workers) as pool:
        sizes = list(pool.map(_size, paths))
    kept = {
        path: size
        for path, size in zip(paths, sizes, strict=True)
        if size is not None and min(size) >= smallest_side
    }
    if len(kept) < len(paths):
        logger.warning(
            "%d of %d files below %s are left out: no pictures, or smaller than the crop of %d",
            len(paths) - len(kept),
            len(paths),
            folder,
            smallest_side,
        )
    if len(kept) <= held_out:
        raise TrainingError(
            f"`data` must have more photographs of at least {smallest_side} pixels a side than the "
            f"{held_out} of `validation`, got {len(kept)} below {str(folder)!r}: "
            "nothing is left to train on"
        )
    described = [f"{p.relative_to(root).as_posix()} {size}\n" for p, size in kept.items()]
    fingerprint = hashlib.sha256("".join(described).encode()).hexdigest()[:16]
    names = list(kept)
    apart = names[:: len(names) // held_out][:held_out]
    train = [path for path in names if path not in set(apart)]
    return Photographs(train, apart, fingerprint)


def _size(path: Path) -> tuple[int, int] | None:
    try:
        with Image.open(path) as image:
            return image.size
    except UNREADABLE:
        return None


def read_photograph(path: Path) -> np.ndarray:
    """A picture as uint8 `[H, W, 3]`, as it is stored: not turned, its profile not applied."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def random_crop(
    photo: np.ndarray, size: int, rng: np.random.Generator, scale: float = 2.0
) -> np.ndarray:
    """A random crop `[size, size, 3]`, reduced at random by a factor up to `scale`, or mirrored.

    Reducing shows the model several scales, and hides the traces of JPEG.
    """
    largest = min(scale, min(photo.shape[:2]) / size)
    side = size if largest <= 1 else int(size * rng.uniform(1, largest))
    top = rng.integers(photo.shape[0] - side + 1)
    left = rng.integers(photo.shape[1] - side + 1)
    crop = photo[top : top + side, left : left + side]
    if side != size:
        resized = Image.fromarray(crop).resize((size, size), Image.Resampling.LANCZOS)
        crop = np.asarray(resized)
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def centre_crop(photo: np.ndarray, size: int) -> np.ndarray:
    """The middle `[size, size, 3]` of a photograph, or as much of it as there is."""
    top = max(0, photo.shape[0] - size) // 2
    left = max(0, photo.shape[1] - size) // 2
    return np.ascontiguousarray(photo[top : top + size, left : left + size])


class CropCache:
    """Crops of photographs, several from each decoding.

    To decode a photograph takes far longer than to cut a crop from it.  Where a crop falls depends
    on the photograph and the visit alone, so those of later visits are cut at the same time and
    kept until they are asked for; they are the same that would be cut then.

    Args:
        paths: photographs; one that cannot be decoded is replaced by the next.
        scale: as in `random_crop`.
        memory: bytes that kept crops may take.
    """

    def __init__(self, paths: list[Path], seed: int, scale: float, memory: float) -> None:
        self.paths, self.seed, self.scale, self.memory = paths, seed, scale, memory
        self.decoded = 0
        # Of each photograph: crops by visit and size.
        self._kept: dict[int, dict[tuple[int, int], np.ndarray]] = {}
        self._lock = threading.Lock()

    def crops_ahead(self, size: int) -> int:
        """Crops of that size that one decoding gives, at least 1."""
        fit = int(self.memory / (len(self.paths) * 3 * size * size))
        return min(max(1, fit), MAX_CROPS_AHEAD)

    def crop(self, number: int, visit: int, size: int) -> np.ndarray:
        """The crop `[size, size, 3]` of that visit to photograph `number`."""
        with self._lock:
            kept = self._kept.get(number, {}).pop((visit, size), None)
        if kept is not None:
            return kept
        photo = self._decode(number)
        visits = range(visit, visit + self.crops_ahead(size))
        crops = {
            (v, size): np.ascontiguousarray(
                random_crop(photo, size, draws.for_crop(self.seed, number, v), self.scale)
            )
            for v in visits
        }
        first = crops.pop((visit, size))
        with self._lock:
            self._kept[number] = crops  # what other processes used up goes with the old ones
            self.decoded += 1
        return first

    def _decode(self, number: int) -> np.ndarray:
        for offset in range(len(self.paths)):
            path = self.paths[(number + offset) % len(self.paths)]
            try:
                return read_photograph(path)
            except UNREADABLE as error:
                logger.warning("%s is damaged (%s); the next photograph stands in", path, error)
        raise TrainingError("`data` must hold photographs that can be decoded, got none")


@dataclass(frozen=True)
class Batch:
    """What one process does of one step.

    Attributes:
        x: crops, uint8 `[B, 3, S, S]`.
        quality: one per crop `[B]`, None for a model of one rate.
        noise: of each latent, `[B, C, h, w]`.
    """

    x: Tensor
    quality: Tensor | None
    noise: dict[str, Tensor]


class Loader:
    """Batches in the order in which they are requested, made ahead on threads.

    Args:
        crops: where crops come from.
        seed: of qualities and noise.
        top: the highest quality; 0 for a model of one rate.
        shapes: of the latents of a picture of some height and width.
        rank, size: this process makes part `rank` of `size` equal parts of each batch.
        workers: threads.
    """

    def __init__(
        self,
        crops: CropCache,
        seed: int,
        top: int,
        shapes: Shapes,
        *,
        rank: int = 0,
        size: int = 1,
        workers: int = 4,
    ) -> None:
        self.crops, self.seed, self.top, self.shapes = crops, seed, top, shapes
        self.rank, self.size = rank, size
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="crops")
        self._requested: deque[tuple[np.ndarray | None, list[Future]]] = deque()

    def __len__(self) -> int:
        """Batches that are requested and not taken."""
        return len(self._requested)

    def request(self, step: int, sample: int, phase: Phase) -> None:
        """Have the batch of a step made, whose first crop is sample number `sample` of the run."""
        part = phase.batch // self.size
        mine = slice(self.rank * part, (self.rank + 1) * part)
        quality = None
        if self.top:
            quality = draws.qualities(self.seed, step, phase.batch, self.top)[mine]
        made = [
            self._pool.submit(self._make, sample + i, phase.crop) for i in range(phase.batch)[mine]
        ]
        self._requested.append((quality, made))

    def take(self) -> Batch:
        """The oldest batch that was requested."""
        quality, made = self._requested.popleft()
        crops, noises = zip(*(future.result() for future in made), strict=True)
        return Batch(
            x=torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2),
            quality=None if quality is None else torch.from_numpy(quality),
            noise={
                name: torch.from_numpy(np.stack([noise[name] for noise in noises]))
                for name in noises[0]
            },
        )

    def close(self) -> None:
        """Give up what was requested."""
        self._requested.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _make(self, sample: int, size: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        visit, number = draws.photograph(self.seed, sample, len(self.crops.paths))
        noise = draws.noise(self.seed, sample, self.shapes(size, size))
        return self.crops.crop(number, visit, size), noise

"""Images on disk to batches of random crops, prepared on threads while the model works.

Threads and not processes: Pillow and NumPy release the GIL while they decode and resize, and a crop
made by a thread need not be sent anywhere.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cmamba_ref.codec.images import check_header, read_opaque_image
from cmamba_ref.errors import ImageError, TrainingError, explain
from cmamba_ref.training import draws, graphics
from cmamba_ref.training.schedule import Phase

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
# Crops that one decoding of an image is used for, at most.
MAX_CROPS_AHEAD = 16
# Files that are named when they are left out; more are counted.
MAX_NAMED = 20

logger = logging.getLogger(__name__)

T = TypeVar("T")
Shapes = Callable[[int, int], Mapping[str, tuple[int, int, int]]]


@dataclass(frozen=True)
class TrainingImages:
    """The images of a run.

    Attributes:
        train: those that are trained on.
        held_out: those that are not.
        fingerprint: of the names and sizes of all: a run goes on with the ones it began with.
    """

    train: list[Path]
    held_out: list[Path]
    fingerprint: str


def find_images(
    folder: str | Path, smallest_side: int, held_out: int, workers: int = 4
) -> TrainingImages:
    """Return all images below `folder`, of which every n-th, by path, is held out.

    Files that `read_opaque_image` refuses, or with a side below `smallest_side` pixels, are left
    out and named in the log with the reason; those with other suffixes are counted. Of images to
    train on only the header is checked, as to decode them all takes long; `CropCache` replaces
    those whose pixels cannot be used.

    Raises:
        TrainingError: there is no such folder, or nothing would be left to train on.
    """
    root = Path(folder)
    if not root.is_dir():
        raise TrainingError(
            f"`data` must be a folder of images, got {str(folder)!r}: no such folder"
        )
    files = sorted(p for p in root.rglob("*") if p.is_file())
    paths = [p for p in files if p.suffix.lower() in SUFFIXES]
    others = Counter(
        path.suffix.lower() or "no suffix"
        for path in files
        if path.suffix.lower() not in SUFFIXES and not path.name.startswith(".")
    )
    if others:
        counts = ", ".join(f"{suffix} {number}" for suffix, number in others.most_common())
        known = " ".join(sorted(SUFFIXES))
        logger.warning("left out: %d (%s), not %s", others.total(), counts, known)
    kept: dict[Path, tuple[int, int]] = {}
    left_out: dict[Path, ImageError] = {}
    with ThreadPoolExecutor(workers) as pool:
        sizes = pool.map(lambda path: _result_or_error(_size, path, smallest_side), paths)
        for path, size in zip(paths, sizes, strict=True):
            if isinstance(size, ImageError):
                left_out[path] = size
            else:
                kept[path] = size
        while True:
            if len(kept) <= held_out:
                _log_left_out(left_out, len(paths), root)
                raise TrainingError(
                    f"`data` must have at least {held_out + 1} images of {smallest_side} pixels a "
                    f"side, {held_out} to hold out (--validation) and 1 to train on, "
                    f"got {len(kept)} below {str(folder)!r}; "
                    "add images, or lower --validation or --crop"
                )
            names = list(kept)
            apart = names[:: len(names) // held_out][:held_out]
            decoded = pool.map(lambda path: _result_or_error(_decodes, path), apart)
            refused = {
                path: error
                for path, error in zip(apart, decoded, strict=True)
                if isinstance(error, ImageError)
            }
            if not refused:
                break
            left_out |= refused
            kept = {path: size for path, size in kept.items() if path not in refused}
    _log_left_out(left_out, len(paths), root)
    described = [f"{p.relative_to(root).as_posix()} {size}\n" for p, size in kept.items()]
    fingerprint = hashlib.sha256("".join(described).encode()).hexdigest()[:16]
    train = [path for path in names if path not in set(apart)]
    return TrainingImages(train, apart, fingerprint)


def _size(path: Path, smallest_side: int) -> tuple[int, int]:
    """Return width and height of an image."""
    size = check_header(path)
    if min(size) < smallest_side:
        reason = f"smaller than the crop of {smallest_side}"
        raise ImageError(f"{path} is {reason}: {size[0]}x{size[1]} pixels", reason)
    return size


def _decodes(path: Path) -> bool:
    return read_opaque_image(path).size > 0


def _result_or_error(read: Callable[..., T], path: Path, *arguments: int) -> T | ImageError:
    """Return what `read` makes of an image, or why it cannot be used."""
    try:
        return read(path, *arguments)
    except ImageError as error:
        return error
    except OSError as error:
        return ImageError(explain(error) or str(error), "cannot be read")


def _log_left_out(left_out: Mapping[Path, ImageError], count: int, folder: Path) -> None:
    if not left_out:
        return
    for path in sorted(left_out)[:MAX_NAMED]:
        logger.warning("left out: %s", left_out[path])
    if len(left_out) > MAX_NAMED:
        logger.warning("left out: %d more", len(left_out) - MAX_NAMED)
    reasons = Counter(error.reason for error in left_out.values())
    logger.warning(
        "%d of %d files below %s are left out: %s",
        len(left_out),
        count,
        folder,
        ", ".join(f"{reason} ({number})" for reason, number in reasons.most_common()),
    )


def read_rgb(path: Path) -> np.ndarray:
    """Return an image as `read_opaque_image` does, grey ones too as uint8 `[H, W, 3]`."""
    image = read_opaque_image(path)
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


def random_crop(
    image: np.ndarray, size: int, rng: np.random.Generator, scale: float = 2.0
) -> np.ndarray:
    """Return a random crop `[size, size, 3]`, reduced by up to `scale`, in one of 8 orientations.

    Reducing shows the model several scales, and hides the traces of JPEG. Orientations, mirrored
    and turned, give a small set of images more variety.
    """
    largest = min(scale, min(image.shape[:2]) / size)
    side = size if largest <= 1 else int(size * rng.uniform(1, largest))
    top = rng.integers(image.shape[0] - side + 1)
    left = rng.integers(image.shape[1] - side + 1)
    crop = image[top : top + side, left : left + side]
    if side != size:
        resized = Image.fromarray(crop).resize((size, size), Image.Resampling.LANCZOS)
        crop = np.asarray(resized)
    mirrored, upside_down, transposed = rng.integers(2, size=3)
    crop = crop[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
    return crop.transpose(1, 0, 2) if transposed else crop


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Return the middle `[size, size, 3]` of an image, or as much of it as there is."""
    top = max(0, image.shape[0] - size) // 2
    left = max(0, image.shape[1] - size) // 2
    return np.ascontiguousarray(image[top : top + size, left : left + size])


def centre_crops(paths: Iterable[Path], size: int, count: int) -> list[np.ndarray]:
    """Return the centre crops of the first `count` images that can be decoded."""
    crops: list[np.ndarray] = []
    for path in paths:
        if len(crops) == count:
            break
        image = _result_or_error(read_rgb, path)
        if not isinstance(image, ImageError):  # `CropCache` names it when it is met
            crops.append(centre_crop(image, size))
    return crops


class CropCache:
    """Crops of images, several from each decoding.

    To decode an image takes far longer than to cut a crop from it. The place of a crop depends on
    the image and the visit alone, so those of later visits are cut at the same time and kept until
    they are asked for; they are the same that would be cut then.

    One decoding serves the visits up to the next multiple of `crops_ahead`, counted from another
    start for each image. So an equal part of all images is decoded again in each epoch, where equal
    starts would decode all of them in the same one, while the model waits.

    Args:
        paths: images; one that cannot be decoded is replaced by the next.
        scale: as in `random_crop`.
        memory: bytes that kept crops may take.
    """

    def __init__(self, paths: list[Path], seed: int, scale: float, memory: float) -> None:
        self.paths, self.seed, self.scale, self.memory = paths, seed, scale, memory
        self.decoded = 0
        # Of each image: crops by visit and size.
        self._kept: dict[int, dict[tuple[int, int], np.ndarray]] = {}
        self._refused: set[Path] = set()  # those that the log names already
        self._lock = threading.Lock()

    def crops_ahead(self, size: int) -> int:
        """Return how many crops of that size one decoding gives at most, at least 1."""
        fit = int(self.memory / (len(self.paths) * 3 * size * size))
        return min(max(1, fit), MAX_CROPS_AHEAD)

    def crop(
        self,
        number: int,
        visit: int,
        size: int,
        *,
        processes: int = 1,
        mine: Callable[[int], bool] | None = None,
    ) -> np.ndarray:
        """Return the crop `[size, size, 3]` of that visit to image `number`.

        Args:
            processes: of these, this one is asked for one of as many visits, on average.
            mine: whether this process is going to be asked for a later visit, as far as it can
                know; None: for all. It saves time and memory and changes no crop.
        """
        with self._lock:
            kept = self._kept.get(number, {}).pop((visit, size), None)
        if kept is not None:
            return kept
        image = self._decode(number)
        period = self.crops_ahead(size) * processes
        end = visit + period - (visit + number) % period
        visits = [visit, *(v for v in range(visit + 1, end) if mine is None or mine(v))]
        crops = {
            (v, size): np.ascontiguousarray(
                random_crop(image, size, draws.for_crop(self.seed, number, v), self.scale)
            )
            for v in visits
        }
        first = crops.pop((visit, size))
        with self._lock:
            self._kept[number] = crops  # old ones that were not asked for go
            self.decoded += 1
        return first

    def _decode(self, number: int) -> np.ndarray:
        for offset in range(len(self.paths)):
            path = self.paths[(number + offset) % len(self.paths)]
            image = _result_or_error(read_rgb, path)
            if not isinstance(image, ImageError):
                return image
            with self._lock:
                told = path in self._refused
                self._refused.add(path)
            if not told:
                logger.warning("%s; the next image is used instead", image)
        raise TrainingError("`data` must hold images that can be decoded, got none")


@dataclass(frozen=True)
class Batch:
    """One process's part of the batch of a step.

    Attributes:
        x: crops, uint8 `[B, 3, S, S]`.
        quality: one per crop `[B]`, None for a fixed-rate model.
        noise: of each latent, `[B, C, h, w]`.
    """

    x: Tensor
    quality: Tensor | None
    noise: dict[str, Tensor]

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; the copy to a GPU waits for nothing."""
        return self._each(lambda tensor: moved(tensor, device))

    def part(self, part: slice) -> Batch:
        """Some of the crops."""
        return self._each(lambda tensor: tensor[part])

    def copy_(self, other: Batch) -> None:
        """Take the values of a batch of the same shape, wherever that is."""
        for mine, new in zip(self._tensors(), other._tensors(), strict=True):
            mine.copy_(pinned(new) if mine.is_cuda else new, non_blocking=True)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        quality = None if self.quality is None else change(self.quality)
        noise = {name: change(tensor) for name, tensor in self.noise.items()}
        return Batch(change(self.x), quality, noise)

    def _tensors(self) -> list[Tensor]:
        return [self.x, *([] if self.quality is None else [self.quality]), *self.noise.values()]


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; the copy to a GPU waits for nothing."""
    return (pinned(tensor) if device.type == "cuda" else tensor).to(device, non_blocking=True)


def pinned(tensor: Tensor) -> Tensor:
    """A tensor on a GPU as it is; one on the host where a GPU can fetch it without waiting."""
    return tensor if tensor.is_cuda else tensor.pin_memory()


class Loader:
    """Batches in the order in which they are requested, made ahead on threads.

    Args:
        crops: the source of crops.
        seed: of qualities, noise and graphics.
        top: the highest quality; 0 for a fixed-rate model.
        shapes: of the latents of an image of some height and width.
        rank, size: this process makes part `rank` of `size` equal parts of each batch.
        workers: threads.
        graphics: share of the samples that are synthetic graphics instead of crops of images, 0..1.
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
        graphics: float = 0.0,
    ) -> None:
        self.crops, self.seed, self.top, self.shapes = crops, seed, top, shapes
        self.rank, self.size, self.graphics = rank, size, graphics
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="crops")
        self._requested: deque[tuple[np.ndarray | None, list[Future]]] = deque()

    def __len__(self) -> int:
        """Return how many batches are requested and not taken."""
        return len(self._requested)

    def request(self, step: int, sample: int, phase: Phase) -> None:
        """Start to make the batch of a step, whose first crop is sample `sample` of the run."""
        part = phase.batch // self.size
        mine = slice(self.rank * part, (self.rank + 1) * part)
        quality = None
        if self.top:
            quality = draws.qualities(self.seed, step, phase.batch, self.top)[mine]
        made = [
            self._pool.submit(self._make, sample + i, phase.crop, (sample, phase.batch))
            for i in range(phase.batch)[mine]
        ]
        self._requested.append((quality, made))

    def take(self) -> Batch:
        """Return the oldest batch that was requested."""
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
        """Drop all requested batches and stop the threads."""
        self._requested.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _make(
        self, sample: int, size: int, batch: tuple[int, int]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the crop and the noise of a sample in a batch of (first sample, length)."""
        noise = draws.noise(self.seed, sample, self.shapes(size, size))
        if draws.is_graphic(self.seed, sample, self.graphics):
            return graphics.draw(draws.for_graphic(self.seed, sample), size), noise
        count = len(self.crops.paths)
        visit, number = draws.image(self.seed, sample, count)

        def is_mine(visit: int) -> bool:
            later = draws.sample_of(self.seed, visit, number, count)
            return self._is_mine(later, *batch)

        mine = is_mine if self.size > 1 or self.graphics else None
        crop = self.crops.crop(number, visit, size, processes=self.size, mine=mine)
        return crop, noise

    def _is_mine(self, sample: int, first: int, length: int) -> bool:
        """Return whether this process cuts that sample if all batches from `first` on are equal."""
        part = (sample - first) % length // (length // self.size)
        return part == self.rank and not draws.is_graphic(self.seed, sample, self.graphics)

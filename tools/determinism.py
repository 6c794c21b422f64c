"""Check that symbols depend on nothing but the file: entropy parameters under many settings.

    python tools/determinism.py images -o determinism.json

Every image is encoded once. Its file is decoded under every combination of

    threads 1, 2    oneDNN on, off    layout contiguous, channels_last    batch 1, 4
    scans chunked, reference, triton    weights float32, bfloat16

and the entropy parameters that the decoder computes on the way (in float64) are compared with those
of the first combination. Not one scale index may differ: a decoder loses the rest of the stream
with it. How far log-scales differ is what the margin of the format (docs/format.md) has to cover.
To keep this short, a combination gets every sixth image (--every), each combination beginning with
another one, so that all images occur; `triton`, where it runs in the interpreter, gets a small
model of random weights and 64x64 pixels.

Then 16 pairs of a setting that encodes and one that decodes, in which every two settings of either
side meet in all their values. One process encodes and another one decodes. Each pair codes the
central 192x128 pixels of four images. Decoders compare the symbols with their CRC; pixels are
compared with those that the encoder's side decodes, with the same type of weights: what bfloat16
does to the image is not in question here.

The exit status is 1 if symbols depend on a setting, pixels of float32 weights differ by more than
1, or a measurement failed; 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, cycle, groupby, islice, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from provenance import of_run, versions
from rd_measure import image_paths, read_rgb
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from tqdm import tqdm

from cmamba_ref import BitstreamError, CMamba, CMambaError, scan_backend
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.codec.container import Container
from cmamba_ref.entropy.gaussian import MARGIN, scale_index
from cmamba_ref.entropy.latent_coder import hyper_latent_shape
from cmamba_ref.entropy.latent_prefix import unpack_latent
from cmamba_ref.model import pad
from cmamba_ref.nn.ablations import Hyperprior
from cmamba_ref.nn.context import CAE

SMALL_MODEL = str(Path(__file__).resolve().parents[1] / "tests" / "golden" / "model")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BACKENDS = ("chunked", "reference", "triton")
QUALITIES = (1, 2.5, 4, 6.3, 8)
PAIRS, PER_PAIR = 16, 4
CROP_OF_PAIRS = (128, 192)
CROP_OF_TRITON = (64, 64)
# Relative differences are those of values of at least this magnitude: near 0 they say nothing.
LEAST_FOR_RELATIVE = 0.01
COUNTS = (
    "files", "files_with_other_symbols", "bytes", "indexes", "differing_indexes", "values",
    "differing_values",
)  # fmt: skip
OF_PARAMETERS = ("mean_absolute", "mean_relative", "ln_scale_absolute", "ln_scale_relative")
LARGEST = (*OF_PARAMETERS, "largest_difference")

Row = dict[str, Any]


class Setting(NamedTuple):
    """Circumstances of coding, none of which may change a symbol.

    Attributes:
        threads: of torch.
        onednn: whether torch may use oneDNN.
        layout: of the weights in memory, of `LAYOUTS`.
        backend: of the scans.
        batch: images at a time.
        weights: type of the model's weights, of `WEIGHTS`; the entropy path keeps its own.
    """

    threads: int = 1
    onednn: bool = True
    layout: str = "contiguous"
    backend: str = "chunked"
    batch: int = 1
    weights: str = "float32"


BASELINE = Setting()


def axes(backends: Sequence[str]) -> list[tuple]:
    """Return the values of each field of a setting, the first of them as in `BASELINE`."""
    return [(1, 2), (True, False), tuple(LAYOUTS), tuple(backends), (1, 4), tuple(WEIGHTS)]


class Source(NamedTuple):
    """The central `crop` (height, width) of an image file, or all of it for None.

    Attributes:
        weights: type of the weights that its pixels are decoded with where it is encoded.
        kept: `.npz` file for the coded image, its entropy parameters and decoded pixels.
    """

    path: Path
    crop: tuple[int, int] | None
    quality: float
    weights: str
    kept: Path

    def pixels(self) -> np.ndarray:
        """Read the pixels, uint8 `[H, W, 3]`."""
        pixels = read_rgb(self.path)
        height, width = np.minimum(self.crop or pixels.shape[:2], pixels.shape[:2])
        top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        return pixels[top : top + height, left : left + width]


class Job(NamedTuple):
    """Images that one setting encodes and another one decodes."""

    model: str
    encoder: Setting
    decoder: Setting
    sources: tuple[Source, ...]


# ---------------------------------------------------------------- one job


@functools.lru_cache(maxsize=4)
def load_model(source: str, layout: str, weights: str) -> CMamba:
    """Load the model as a setting wants it."""
    model = CMamba.from_pretrained(source).to(WEIGHTS[weights])
    return model.to(memory_format=LAYOUTS[layout])  # pyright: ignore[reportCallIssue]


@contextmanager
def under(setting: Setting) -> Iterator[None]:
    """Within the `with` block, threads, scans and oneDNN are those of a setting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(setting.threads)
    torch.backends.mkldnn.enabled = setting.onednn  # `torch.backends.mkldnn.flags` warns
    try:
        with scan_backend(setting.backend), torch.no_grad():
            yield
    finally:
        torch.backends.mkldnn.enabled = True
        torch.set_num_threads(threads)


def decode_batch(model: CMamba, files: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Decode files of one size as one batch.

    Returns:
        means and log-scales of y as the decoder computes them, float64 `[2, B, M, h, w]`; pixels,
        uint8 `[B, H, W, 3]`.

    Raises:
        BitstreamError: the symbols of one fail their check.
    """
    slices: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple, output: Any) -> None:
        if isinstance(module, CAE | Hyperprior):
            slices.append(torch.stack(output).cpu())

    containers = [Container.unpack(data) for data in files]
    height, width = containers[0].height, containers[0].width
    strings = [[c.y for c in containers], [c.z for c in containers]]
    hook = register_module_forward_hook(keep)  # the decoder works on a float64 copy of the model
    try:
        x_hat = model.decompress(strings, hyper_latent_shape(height, width))["x_hat"]
    finally:
        hook.remove()
    pixels = (x_hat[..., :height, :width].float() * 255).round().to("cpu", torch.uint8)
    return torch.cat(slices, dim=2).numpy(), pixels.permute(0, 2, 3, 1).numpy()


def scale_indexes(data: bytes, parameters: np.ndarray) -> np.ndarray:
    """Return the index of every symbol of a file, from its means and log-scales `[2, M, h, w]`."""
    shift = unpack_latent(Container.unpack(data).y)[0].shift
    return scale_index(torch.from_numpy(parameters[1]), shift).numpy()


def write(job: Job) -> None:
    """Encode the images that are not kept yet, and decode them in the same process."""
    setting = job.encoder
    model = load_model(job.model, setting.layout, setting.weights)
    sources = [source for source in job.sources if not source.kept.exists()]
    images = [{"source": source, "pixels": source.pixels()} for source in sources]
    with under(setting):
        for batch in batches(images, setting.batch):
            first, pixels = batch[0]["source"], np.stack([image["pixels"] for image in batch])
            x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
            strings = zip(*model.compress(pad(x), first.quality)["strings"], strict=True)
            _, height, width, _ = pixels.shape
            files = [Container(model.model_id, width, height, False, *s).pack() for s in strings]
            decoding = load_model(job.model, setting.layout, first.weights)
            parameters, decoded = decode_batch(decoding, files)
            for b, image in enumerate(batch):
                np.savez(
                    image["source"].kept,
                    data=np.frombuffer(files[b], np.uint8),
                    parameters=parameters[:, b],
                    pixels=decoded[b],
                )


def read(job: Job) -> Row:
    """Decode what `write` has left under another setting, and compare.

    Returns:
        files, and how many have other symbols; indexes, and how many differ (all of a batch with
        other symbols); the largest differences of log-scales and means, absolute and relative (of
        values of at least `LEAST_FOR_RELATIVE`); values of pixels that the same type of weights
        gave, how many of these differ, and by how much at the most.
    """
    model = load_model(job.model, job.decoder.layout, job.decoder.weights)
    kept = [{**np.load(source.kept), "weights": source.weights} for source in job.sources]
    return summed([compare(model, job.decoder, b) for b in batches(kept, job.decoder.batch)])


def compare(model: CMamba, setting: Setting, batch: Sequence[Row]) -> Row:
    """Decode one batch and compare, see `read`."""
    files = [kept["data"].tobytes() for kept in batch]
    expected = np.stack([kept["parameters"] for kept in batch], axis=1)
    found: Row = dict.fromkeys((*COUNTS, *LARGEST), 0)
    found |= {"files": len(files), "bytes": sum(map(len, files)), "indexes": expected[0].size}
    try:
        with under(setting):
            parameters, pixels = decode_batch(model, files)
    except BitstreamError:
        differing = {"files_with_other_symbols": len(files), "differing_indexes": expected[0].size}
        return {**found, **differing, **dict.fromkeys(OF_PARAMETERS, np.inf)}
    for b, data in enumerate(files):
        differ = scale_indexes(data, parameters[:, b]) != scale_indexes(data, expected[:, b])
        found["differing_indexes"] += int(differ.sum())
    absolute = np.nan_to_num(np.abs(parameters - expected), nan=np.inf)
    relative = absolute / np.maximum(np.abs(expected), LEAST_FOR_RELATIVE)
    worst = np.stack([absolute, relative], axis=1).reshape(4, -1).max(axis=1)
    found |= dict(zip(OF_PARAMETERS, worst.tolist(), strict=True))
    if batch[0]["weights"] == setting.weights:
        difference = np.abs(pixels.astype(int) - np.stack([kept["pixels"] for kept in batch]))
        found["values"] = difference.size
        found["differing_values"] = int((difference > 0).sum())
        found["largest_difference"] = int(difference.max())
    return found


def batches(images: Sequence[Row], size: int) -> Iterator[list[Row]]:
    """Images of one shape, so many at a time; the last ones are filled up with the first."""

    def shape(image: Row) -> tuple[int, ...]:
        return image["pixels"].shape

    for _, same in groupby(sorted(images, key=shape), key=shape):
        group = list(same)
        for start in range(0, len(group), size):
            yield [group[i % len(group)] for i in range(start, start + size)]


def summed(rows: Sequence[Row]) -> Row:
    """Return the sums of counts over rows, and the largest differences."""
    sums = {key: sum(row[key] for row in rows) for key in COUNTS}
    share = {"share": sums["differing_values"] / max(1, sums["values"])}  # of pixels
    return sums | share | {key: max((row[key] for row in rows), default=0) for key in LARGEST}


# ---------------------------------------------------------------- all jobs


def find_jobs(
    paths: Sequence[Path], model: str, backends: Sequence[str], every: int, folder: Path
) -> dict[str, list[Job]]:
    """Return jobs for all combinations: of whole images, and for triton of crops of a few.

    Args:
        every: so many images further is the next that a combination gets.
    """
    eager = [backend for backend in backends if backend != "triton"]
    triton = [backend for backend in backends if backend == "triton"]
    jobs = {}
    for part, model_of_part, chosen, taken, crop in (
        ("images", model, eager, paths, None),
        ("small", SMALL_MODEL, triton, paths[:every], CROP_OF_TRITON),
    ):
        sources = [
            Source(path, crop, quality, BASELINE.weights, folder / f"{part}-{path.name}.npz")
            for path, quality in zip(taken, cycle(QUALITIES))
        ]
        jobs[part] = [
            Job(model_of_part, BASELINE, Setting(*values), tuple(sources[i % every :: every]))
            for i, values in enumerate(product(*axes(chosen)))
        ]
    return jobs


def find_pairs(
    paths: Sequence[Path], model: str, backends: Sequence[str], count: int, folder: Path
) -> list[Job]:
    """Return the pairs of an encoder and a decoder. Images are taken in turn.

    Every axis has two values; which of them pair i takes is the parity of i under a mask of the
    axis. Two different masks meet in all four combinations over 16 pairs.
    """
    eager = [backend for backend in backends if backend != "triton"]
    if not eager:  # triton's interpreter is too slow for whole files
        return []
    jobs, images = [], cycle(paths)
    for i, quality in zip(range(count), cycle(QUALITIES)):
        masks = itertools.count(1)
        encoder, decoder = (
            Setting(*(v[(i & next(masks)).bit_count() % 2 % len(v)] for v in axes(eager)))
            for _ in range(2)
        )
        sources = tuple(
            Source(path, CROP_OF_PAIRS, quality, decoder.weights, folder / f"{i}-{k}.npz")
            for k, path in enumerate(islice(images, PER_PAIR))
        )
        jobs.append(Job(model, encoder, decoder, sources))
    return jobs


def in_fresh_process(work: Callable[[Job], Any], jobs: Sequence[Job]) -> list:
    """Return the results of `work` on each job, in another process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        done = pool.map(work, jobs)
        return list(tqdm(done, work.__name__, total=len(jobs), dynamic_ncols=True))


def report_of(part: str, jobs: Sequence[Job], results: Sequence[Row]) -> Row:
    """Return sums and largest differences, also by backend or type of weights, and all rows."""
    found = list(zip((job.decoder for job in jobs), results, strict=True))

    def by(field: str, values: Iterable[str]) -> Row:
        return {v: summed([row for d, row in found if getattr(d, field) == v]) for v in values}

    if part == "pairs":
        head = {"pairs": len(jobs), "pixels": by("weights", WEIGHTS)}
    else:
        backends = dict.fromkeys(job.decoder.backend for job in jobs)
        head = {"settings": len(jobs), "backends": by("backend", backends)}
    rows = [
        {
            "encoder": job.encoder._asdict(),
            "decoder": job.decoder._asdict(),
            "quality": [source.quality for source in job.sources],
            "images": [source.path.name for source in job.sources],
            **row,
        }
        for job, row in zip(jobs, results, strict=True)
    ]
    return {"model": Path(jobs[0].model).name, **head, **summed(results), "rows": rows}


def is_kept(report: Row) -> bool:
    """Whether all that is promised held: equal indexes and symbols, pixels within 1."""
    pixels = report["pairs"]["pixels"]["float32"] if "pairs" in report else {}
    return pixels.get("largest_difference", 0) <= 1 and all(
        part["differing_indexes"] == part["files_with_other_symbols"] == 0
        and part["ln_scale_absolute"] < MARGIN
        for part in report.values()
    )


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, help="images, for instance the Kodak set")
    add("-o", dest="output", type=Path, help="the JSON to write (default: none)")
    add("--model", default="tiny", help="name or directory (default: tiny)")
    add("--backends", nargs="+", choices=BACKENDS, default=BACKENDS, help="default: all")
    few = f"default: {PAIRS}; fewer leave out combinations of two settings"
    add("--pairs", type=int, choices=range(PAIRS + 1), default=PAIRS, help=few)
    add("--every", type=int, default=6, help="a combination gets one image of so many (default: 6)")
    args = parser.parse_args(argv)
    if args.every < 1:
        parser.error(f"--every must be at least 1, got {args.every}")
    # Threads that wait for others by spinning take the core from those they wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Everything lies on the CPU.  Read when the kernels are imported.
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        paths = image_paths(args.folder, None)
        models = {m: CMamba.from_pretrained(m).model_id.hex() for m in (args.model, SMALL_MODEL)}
    except (CMambaError, OSError) as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder:
        every = min(args.every, len(paths))
        parts = find_jobs(paths, args.model, args.backends, every, Path(folder))
        parts["pairs"] = find_pairs(paths, args.model, args.backends, args.pairs, Path(folder))
        parts = {part: jobs for part, jobs in parts.items() if jobs}
        jobs = list(chain.from_iterable(parts.values()))
        try:
            in_fresh_process(write, jobs)
            results = iter(in_fresh_process(read, jobs))
        except (CMambaError, BrokenProcessPool) as error:
            print(f"a measurement failed: {error}", file=sys.stderr)
            return 1
    report = {p: report_of(p, js, list(islice(results, len(js)))) for p, js in parts.items()}
    for part, found in report.items():
        print(part, json.dumps({k: v for k, v in found.items() if k != "rows"}, indent=1))
    all_kept = is_kept(report)
    report["meta"] = {
        **of_run("determinism.py", argv),
        "versions": versions("cmamba-ref", "torch", "numpy", "triton"),
        "models": [{"source": Path(m).name, "id": model_id} for m, model_id in models.items()],
        "images": {
            "folder": args.folder.resolve().name,
            "names": [path.name for path in paths],
        },
        "margin": MARGIN,
        "baseline": BASELINE._asdict(),
        "all_promises_kept": all_kept,
    }
    if args.output:
        write_atomically(args.output, (json.dumps(report, indent=1) + "\n").encode())
    return 0 if all_kept else 1


if __name__ == "__main__":
    sys.exit(main())

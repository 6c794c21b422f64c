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

Then 16 pairs of a setting that encodes and one that decodes, each in a process of its own, in which
every two settings of either side meet in all their values. Each pair codes the central 192x128
pixels of four images. Decoders compare the symbols with their CRC; pixels are compared with those
that the encoder's side decodes, with the same type of weights: what bfloat16 does to the image is
not in question here.

With -o, finished measurements are kept beside the output (FILE.partial): after Ctrl-C or a failure
the same command resumes. The exit status is 1 if symbols depend on a setting, pixels of float32
weights differ by more than 1, or a measurement failed; 2 for wrong arguments, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from partial_results import PartialResults
from provenance import of_run, versions
from rd_measure import picture_paths, read_rgb
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from tqdm import tqdm

from cmamba_ref import BitstreamError, CMamba, CMambaError, scan_backend
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.cli import process_pool
from cmamba_ref.codec.container import Container
from cmamba_ref.entropy.gaussian import MARGIN, scale_index
from cmamba_ref.entropy.latent_coder import hyper_latent_shape
from cmamba_ref.entropy.latent_prefix import unpack_latent
from cmamba_ref.model import pad
from cmamba_ref.nn.ablations import Hyperprior
from cmamba_ref.nn.context import CAE

PACKAGES = ("cmamba-ref", "torch", "numpy", "triton")
SMALL_MODEL = Path(__file__).resolve().parents[1] / "tests" / "golden" / "model"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AXES: dict[str, tuple] = {
    "threads": (1, 2),
    "onednn": (True, False),
    "layout": tuple(LAYOUTS),
    "batch": (1, 4),
    "weights": tuple(WEIGHTS),
}
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
LARGEST = ("mean_absolute", "mean_relative", "ln_scale_absolute", "ln_scale_relative")

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
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

    @property
    def label(self) -> str:
        """All of it in one line."""
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items())

    @property
    def process(self) -> tuple[str, int]:
        """Settings for which this is equal can follow each other in one process."""
        return self.backend, self.threads


BASELINE = Setting()


@dataclass(frozen=True)
class Picture:
    """The central `crop` (height, width) of an image file, or all of it for None.

    Attributes:
        kept: `.npz` file for the coded image, its entropy parameters and decoded pixels.
    """

    path: Path
    crop: tuple[int, int] | None
    quality: float
    kept: Path

    def pixels(self) -> np.ndarray:
        """Read the pixels, uint8 `[H, W, 3]`."""
        pixels = read_rgb(self.path)
        if self.crop is None:
            return pixels
        height, width = np.minimum(self.crop, pixels.shape[:2])
        top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        return pixels[top : top + height, left : left + width]


@dataclass(frozen=True)
class Job:
    """Images that one setting encodes and another one decodes."""

    model: str
    encoder: Setting
    decoder: Setting
    pictures: tuple[Picture, ...]


class Plan(NamedTuple):
    """Images to encode once, and the jobs that decode them, by the keys of their results."""

    name: str
    write: Job
    read: dict[str, Job]


# ---------------------------------------------------------------- in processes of their own


def prepare(threads: int, backend: str) -> None:
    """Set up a fresh process: what holds for the process and not for a call."""
    if backend == "triton" and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
    torch.set_num_threads(threads)


@functools.lru_cache(maxsize=4)
def load_model(source: str, layout: str, weights: str) -> CMamba:
    """Load the model as a setting wants it."""
    model = CMamba.from_pretrained(source).to(WEIGHTS[weights])
    return model.to(memory_format=LAYOUTS[layout])  # pyright: ignore[reportCallIssue]


@contextmanager
def under(setting: Setting) -> Iterator[None]:
    """Within the `with` block, scans and oneDNN are those of a setting."""
    if torch.get_num_threads() != setting.threads:
        raise CMambaError(f"torch has {torch.get_num_threads()} threads, not {setting.threads}")
    torch._C._set_mkldnn_enabled(setting.onednn)  # `torch.backends.mkldnn.flags` warns
    try:
        with scan_backend(setting.backend), torch.no_grad():
            yield
    finally:
        torch._C._set_mkldnn_enabled(True)


def code_batch(model: CMamba, pixels: np.ndarray, quality: float) -> list[bytes]:
    """Code images `[B, H, W, 3]` as one batch; return a file of each."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    y_strings, z_strings = model.compress(pad(x), quality)["strings"]
    _, height, width, _ = pixels.shape
    return [
        Container(model.model_id, width, height, False, y, z).pack()
        for y, z in zip(y_strings, z_strings, strict=True)
    ]


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


def write(job: Job) -> Row:
    """Encode every image, and decode it in the same process with the decoder's type of weights."""
    setting = job.encoder
    model = load_model(job.model, setting.layout, setting.weights)
    decoding = load_model(job.model, setting.layout, job.decoder.weights)
    images = [{"kept": p.kept, "quality": p.quality, "pixels": p.pixels()} for p in job.pictures]
    with under(setting):
        for batch in _batches(images, setting.batch):
            pixels = np.stack([image["pixels"] for image in batch])
            files = code_batch(model, pixels, batch[0]["quality"])
            parameters, decoded = decode_batch(decoding, files)
            for b, image in enumerate(batch):
                found = {"parameters": parameters[:, b], "pixels": decoded[b]}
                found |= {"data": np.frombuffer(files[b], np.uint8)}
                np.savez(image["kept"], **found, weights=job.decoder.weights)
    return {}


def read(job: Job) -> Row:
    """Decode what `write` has left under another setting, and compare.

    Returns:
        files, and how many have other symbols; indexes, and how many differ (all of a batch with
        other symbols); the largest differences of log-scales and means, absolute and relative (of
        values of at least `LEAST_FOR_RELATIVE`); values of pixels that the same type of weights
        gave, how many of these differ, and by how much at the most.
    """
    setting = job.decoder
    model = load_model(job.model, setting.layout, setting.weights)
    found: Row = {**dict.fromkeys(COUNTS, 0), "largest_difference": 0}
    worst = np.zeros((2, 2))  # of means and log-scales, absolute and relative
    for batch in _batches([dict(np.load(p.kept)) for p in job.pictures], setting.batch):
        files = [kept["data"].tobytes() for kept in batch]
        expected = np.stack([kept["parameters"] for kept in batch], axis=1)
        found["files"] += len(files)
        found["bytes"] += sum(map(len, files))
        found["indexes"] += expected[0].size
        try:
            with under(setting):
                parameters, pixels = decode_batch(model, files)
        except BitstreamError:
            found["files_with_other_symbols"] += len(files)
            found["differing_indexes"] += expected[0].size
            worst[:] = np.inf
            continue
        for b, data in enumerate(files):
            differ = scale_indexes(data, parameters[:, b]) != scale_indexes(data, expected[:, b])
            found["differing_indexes"] += int(differ.sum())
            if batch[b]["weights"] == setting.weights:
                difference = np.abs(pixels[b].astype(int) - batch[b]["pixels"])
                found["values"] += difference.size
                found["differing_values"] += int((difference > 0).sum())
                largest = max(found["largest_difference"], int(difference.max()))
                found["largest_difference"] = largest
        difference = np.nan_to_num(np.abs(parameters - expected), nan=np.inf)
        relative = difference / np.maximum(np.abs(expected), LEAST_FOR_RELATIVE)
        for kind, values in enumerate((difference, relative)):
            worst[:, kind] = np.maximum(worst[:, kind], values.reshape(2, -1).max(axis=1))
    return {**found, **dict(zip(LARGEST, worst.ravel().tolist(), strict=True))}


def _batches(images: Sequence[Row], size: int) -> Iterator[list[Row]]:
    """Images of one shape, so many at a time; the last ones are filled up with the first."""

    def shape(image: Row) -> tuple[int, ...]:
        return image["pixels"].shape

    for _, same in groupby(sorted(images, key=shape), key=shape):
        group = list(same)
        for start in range(0, len(group), size):
            yield [group[i % len(group)] for i in range(start, start + size)]


# ---------------------------------------------------------------- what to measure


def find_studies(
    paths: Sequence[Path],
    models: tuple[str, str],
    backends: Sequence[str],
    every: int,
    folder: Path,
) -> list[Plan]:
    """Return the plan for whole images, and that for triton on crops of a few.

    Args:
        models: for the one and the other.
        every: so many images further is the next that a combination gets.
    """
    every = min(every, len(paths))
    combinations = [dict(zip(AXES, values, strict=True)) for values in product(*AXES.values())]
    eager = [b for b in backends if b != "triton"]
    triton = [b for b in backends if b == "triton"]
    plans = []
    for name, model, chosen, taken, crop in (
        ("pictures", models[0], eager, paths, None),
        ("small", models[1], triton, paths[:every], CROP_OF_TRITON),
    ):
        pictures = tuple(
            Picture(path, crop, QUALITIES[i % len(QUALITIES)], folder / f"{name}{i}.npz")
            for i, path in enumerate(taken)
        )
        jobs = [
            Job(model, BASELINE, Setting(backend=backend, **c), pictures[i % every :: every])
            for backend in chosen
            for i, c in enumerate(combinations)
        ]
        jobs.sort(key=lambda job: job.decoder.process)
        if jobs:
            read_by_key = {f"{name}: {job.decoder.label}": job for job in jobs}
            plans.append(Plan(name, Job(model, BASELINE, BASELINE, pictures), read_by_key))
    return plans


def find_pairs(
    paths: Sequence[Path], model: str, backends: Sequence[str], count: int, folder: Path
) -> list[Plan]:
    """Return the pairs of an encoder and a decoder. Images are taken in turn.

    Every axis has two values; which of them pair i takes is the parity of i under a mask of the
    axis. Two different masks meet in all four combinations over 16 pairs.
    """
    axes = {**AXES, "backend": tuple(b for b in backends if b != "triton")}
    plans: list[Plan] = []
    if not axes["backend"]:  # triton's interpreter is too slow for whole files
        return plans
    for i in range(count):
        masks = iter(range(1, 2 * len(axes) + 1))
        encoder, decoder = (
            Setting(**{a: v[(i & next(masks)).bit_count() % 2 % len(v)] for a, v in axes.items()})
            for _ in range(2)
        )
        quality = QUALITIES[i % len(QUALITIES)]
        pictures = tuple(
            Picture(paths[k % len(paths)], CROP_OF_PAIRS, quality, folder / f"{i}-{k}.npz")
            for k in range(PER_PAIR * i, PER_PAIR * (i + 1))
        )
        job = Job(model, encoder, decoder, pictures)
        plans.append(Plan("pairs", job, {f"pair {i}": job}))
    return plans


def in_fresh_process(
    function: Callable[[Job], Row],
    jobs: Sequence[Job],
    setting: Setting,
    report: Callable[[Job, Row], object] = lambda *_: None,
) -> None:
    """Do `function` on jobs in a process that is set up for `setting`.

    Raises:
        CMambaError: the process died.
    """

    def checked(job: Job, result: Row | None) -> None:
        if result is None:
            raise CMambaError(f"the process died under {job.decoder.label}; more memory?")
        report(job, result)

    ready = functools.partial(prepare, setting.threads, setting.backend)
    process_pool.spread(function, jobs, 1, ready, checked)


def measure(plan: Plan, kept: PartialResults, bar: tqdm) -> None:
    """Measure every job of a plan that is not kept yet."""
    waiting = {job: key for key, job in plan.read.items() if key not in kept.results}
    bar.update(len(plan.read) - len(waiting))
    if not waiting:
        return
    bar.set_description_str(f"{plan.name}: encoding")
    in_fresh_process(write, [plan.write], plan.write.encoder)

    def report(job: Job, result: Row) -> None:
        kept.add(waiting[job], result)
        bar.update()

    for (backend, threads), jobs in groupby(waiting, key=lambda job: job.decoder.process):
        bar.set_description_str(f"{plan.name}: {backend}, {threads} threads")
        together = list(jobs)
        in_fresh_process(read, together, together[0].decoder, report)


# ---------------------------------------------------------------- the report


def summed(rows: Sequence[Row]) -> Row:
    """Return the sums of counts over rows, and the largest differences."""
    sums = {key: sum(row[key] for row in rows) for key in COUNTS}
    largest = (*LARGEST, "largest_difference")
    return {**sums, **{key: max((row[key] for row in rows), default=0) for key in largest}}


def report_of_study(plan: Plan, results: dict[str, Row]) -> Row:
    """Return all settings of a study, and sums and largest differences for each backend."""
    rows = [{**asdict(job.decoder), **results[key]} for key, job in plan.read.items()]
    backends = dict.fromkeys(row["backend"] for row in rows)
    return {
        "model": Path(plan.write.model).name,
        "settings": len(rows),
        **summed(rows),
        "backends": {b: summed([r for r in rows if r["backend"] == b]) for b in backends},
        "rows": rows,
    }


def report_of_pairs(plans: Sequence[Plan], results: dict[str, Row]) -> Row:
    """Return all pairs, and sums; pixels apart by the type of weights that decodes them."""
    rows = [
        {
            "encoder": asdict(job.encoder),
            "decoder": asdict(job.decoder),
            "quality": job.pictures[0].quality,
            "pictures": [picture.path.name for picture in job.pictures],
            **results[key],
        }
        for plan in plans
        for key, job in plan.read.items()
    ]
    by_weights = {}
    for weights in WEIGHTS:
        found = summed([row for row in rows if row["decoder"]["weights"] == weights])
        kept = {key: found[key] for key in ("values", "differing_values", "largest_difference")}
        share = found["differing_values"] / max(1, found["values"])
        by_weights[weights] = {**kept, "share": share}
    return {"pairs": len(rows), **summed(rows), "pixels": by_weights, "rows": rows}


def is_kept(report: Row) -> bool:
    """Whether all that is promised held: equal indexes and symbols, pixels within 1."""
    parts = [report[name] for name in ("pictures", "small", "pairs") if name in report]
    pixels = report["pairs"]["pixels"]["float32"] if "pairs" in report else {}
    return pixels.get("largest_difference", 0) <= 1 and all(
        part["differing_indexes"] == part["files_with_other_symbols"] == 0
        and part["ln_scale_absolute"] < MARGIN
        for part in parts
    )


def summary(report: Row) -> str:
    """The result in a few lines."""
    lines = [
        f"{backend}: {found['differing_indexes']} of {found['indexes']} indexes differ; "
        f"ln scale by at most {found['ln_scale_absolute']:.1e} "
        f"(relative {found['ln_scale_relative']:.1e}), "
        f"means by {found['mean_absolute']:.1e}; the margin is {MARGIN:.0e}"
        for name in ("pictures", "small")
        for backend, found in report.get(name, {}).get("backends", {}).items()
    ]
    if pairs := report.get("pairs"):
        wrong, files = pairs["files_with_other_symbols"], pairs["files"]
        lines.append(f"pairs: {wrong} of {files} files have other symbols")
        lines += [
            f"pixels decoded with {weights}: {100 * found['share']:.4f} % differ, "
            f"by at most {found['largest_difference']}"
            for weights, found in pairs["pixels"].items()
        ]
    return "\n".join(lines)


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, small = parser.add_argument, str(SMALL_MODEL)
    add("folder", type=Path, help="images, for instance the Kodak set")
    add("-o", dest="output", type=Path, help="the JSON to write (default: none)")
    add("--model", default="tiny", help="name or directory (default: tiny)")
    add("--small-model", default=small, help="for triton (default: that of the golden files)")
    add("--limit", type=int, help="only the first so many images")
    add("--backends", nargs="+", choices=BACKENDS, default=BACKENDS, help="default: all")
    few = f"default: {PAIRS}; fewer leave out combinations of two settings"
    add("--pairs", type=int, choices=range(PAIRS + 1), default=PAIRS, help=few)
    add("--every", type=int, default=6, help="a combination gets one image of so many (default: 6)")
    add("--fresh", action="store_true", help="discard what an earlier run kept")
    args = parser.parse_args(argv)
    provenance = {**of_run("determinism.py", argv), "versions": versions(*PACKAGES)}
    conditions = {key: provenance[key] for key in provenance if key not in ("command", "date")}
    # Threads that wait for others by spinning take the core from those they wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory() as name:
        folder, models = Path(name), (args.model, args.small_model)
        try:
            paths = picture_paths(args.folder, args.limit)
            images = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
            used = [
                {"source": Path(m).name, "id": CMamba.from_pretrained(m).model_id.hex()}
                for m in models
            ]
            conditions |= {"pictures": images, "models": used, "every": args.every}
            studies = find_studies(paths, models, args.backends, args.every, folder)
            pairs = find_pairs(paths, args.model, args.backends, args.pairs, folder)
            kept = PartialResults(args.output, conditions, fresh=args.fresh)
        except (CMambaError, OSError) as error:
            parser.error(str(error))
        total = sum(len(plan.read) for plan in (*studies, *pairs))
        try:
            with tqdm(total=total, dynamic_ncols=True) as bar:
                for plan in (*studies, *pairs):
                    measure(plan, kept, bar)
        except KeyboardInterrupt:
            print("interrupted; with -o the same command resumes", file=sys.stderr)
            return 130
        except CMambaError as error:
            print(error, file=sys.stderr)
            return 1
    report: Row = {plan.name: report_of_study(plan, kept.results) for plan in studies}
    if pairs:
        report["pairs"] = report_of_pairs(pairs, kept.results)
    print(summary(report))
    report["meta"] = {
        **provenance,
        "models": used,
        "pictures": {"folder": args.folder.resolve().name, "names": list(images)},
        "margin": MARGIN,
        "baseline": asdict(BASELINE),
        "relative": f"of values of at least {LEAST_FOR_RELATIVE} in magnitude",
        "reduced": {
            "pictures": f"every {args.every}th per combination, beginning with each in turn",
            "triton": f"small model, {CROP_OF_TRITON} pixels of one image per combination",
            "pairs": f"{CROP_OF_PAIRS} pixels of {PER_PAIR} images each",
        },
        "all_promises_kept": is_kept(report),
    }
    if args.output:
        write_atomically(args.output, (json.dumps(report, indent=1) + "\n").encode())
        kept.discard()
    return 0 if report["meta"]["all_promises_kept"] else 1


if __name__ == "__main__":
    sys.exit(main())

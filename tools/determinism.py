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

Then files: 16 pairs of a setting that encodes and one that decodes, each in a process of its own,
such that every two settings of either side meet in all their values. The decoder compares the
symbols with their CRC; pixels are compared with those that the encoder's side decodes. Each pair
codes the central 192x128 pixels of four images.

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
from dataclasses import asdict, dataclass, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from partial_results import PartialResults
from provenance import of_run, versions
from rd_measure import picture_paths, read_rgb
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from tqdm import tqdm

from cmamba_ref import BitstreamError, CMamba, CMambaError, encode, pool, scan_backend
from cmamba_ref.bitstream import Container, unpack_latent
from cmamba_ref.codec import latent_shape
from cmamba_ref.entropy.gaussian import MARGIN, scale_index
from cmamba_ref.files import write_atomically
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


BASELINE = Setting()


@dataclass(frozen=True)
class Picture:
    """The central `crop` (height, width) of an image file, or all of it for None.

    Attributes:
        kept: `.npz` file for the coded image and the baseline's entropy parameters.
    """

    path: Path
    crop: tuple[int, int] | None
    quality: float
    kept: Path = Path()

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
    """Images to code under a setting.

    Attributes:
        other: of a pair, the setting of the other half.
        folder: of a pair, where the files go, and the pixels that the encoder's side decodes.
    """

    model: str
    setting: Setting
    pictures: tuple[Picture, ...]
    other: Setting = BASELINE
    folder: Path = Path()

    @property
    def process(self) -> tuple[str, int]:
        """Jobs for which this is equal can follow each other in one process."""
        return self.setting.backend, self.setting.threads

    def load(self, weights: str | None = None) -> CMamba:
        """Load the model as the setting, or with the type of weights of the other one."""
        return load_model(self.model, self.setting.layout, weights or self.setting.weights)


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


def strings_of(files: Sequence[bytes]) -> tuple[list[list[bytes]], tuple[int, int]]:
    """Return the strings of files of one size, and the shape of z, as `decompress` takes them."""
    containers = [Container.unpack(data) for data in files]
    shape = latent_shape(containers[0].height, containers[0].width)
    return [[c.y for c in containers], [c.z for c in containers]], shape


def entropy_parameters(model: CMamba, files: Sequence[bytes]) -> np.ndarray:
    """Decode files of one size as one batch up to y_bar, and keep what the decoder computes.

    Returns:
        means and log-scales of y, float64 `[2, B, M, h, w]`.

    Raises:
        BitstreamError: the symbols of one fail their check.
    """
    slices: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple, output: Any) -> None:
        if isinstance(module, CAE | Hyperprior):
            slices.append(torch.stack(output).cpu())

    hook = register_module_forward_hook(keep)  # the decoder works on a float64 copy of the model
    try:
        model.decode_latent(*strings_of(files))
    finally:
        hook.remove()
    return torch.cat(slices, dim=2).numpy()


def scale_indexes(data: bytes, parameters: np.ndarray) -> np.ndarray:
    """Return the index of every symbol of a file, from its `entropy_parameters` `[2, M, h, w]`."""
    shift = unpack_latent(Container.unpack(data).y)[0].shift
    return scale_index(torch.from_numpy(parameters[1]), shift).numpy()


def keep_baseline(job: Job) -> Row:
    """Encode every image, and keep its file and the entropy parameters it is decoded with."""
    with under(job.setting):
        for picture in job.pictures:
            data = encode(job.load(), picture.pixels(), picture.quality)
            parameters = entropy_parameters(job.load(), [data])[:, 0]
            np.savez(picture.kept, data=np.frombuffer(data, np.uint8), parameters=parameters)
    return {}


def compare(job: Job) -> Row:
    """Decode the baseline's files under another setting, and compare the entropy parameters.

    Returns:
        how many indexes were compared, and how many differ (all of a batch with other symbols);
        the largest differences of log-scales and means, absolute and relative (of values of at
        least `LEAST_FOR_RELATIVE`).
    """
    found = {"pictures": 0, "indexes": 0, "differing_indexes": 0}
    worst = np.zeros((2, 2))  # of means and log-scales, absolute and relative
    for kept in _batches([dict(np.load(p.kept)) for p in job.pictures], job.setting.batch):
        files = [k["data"].tobytes() for k in kept]
        expected = np.stack([k["parameters"] for k in kept], axis=1)
        found["pictures"] += len(kept)
        found["indexes"] += expected[0].size
        try:
            with under(job.setting):
                seen = entropy_parameters(job.load(), files)
        except BitstreamError:
            found["differing_indexes"] += expected[0].size
            worst[:] = np.inf
            continue
        for b, data in enumerate(files):
            differ = scale_indexes(data, seen[:, b]) != scale_indexes(data, expected[:, b])
            found["differing_indexes"] += int(differ.sum())
        difference = np.nan_to_num(np.abs(seen - expected), nan=np.inf)
        relative = difference / np.maximum(np.abs(expected), LEAST_FOR_RELATIVE)
        largest = [d.reshape(2, -1).max(axis=1) for d in (difference, relative)]
        worst = np.maximum(worst, np.stack(largest, axis=1))
    return {**found, **dict(zip(LARGEST, worst.ravel().tolist(), strict=True))}


def _batches(baselines: Sequence[Row], size: int) -> Iterator[list[Row]]:
    """Latents of one shape, so many at a time; the last ones are filled up with the first."""

    def shape(baseline: Row) -> tuple[int, ...]:
        return baseline["parameters"].shape

    for _, same in groupby(sorted(baselines, key=shape), key=shape):
        group = list(same)
        for start in range(0, len(group), size):
            yield [group[i % len(group)] for i in range(start, start + size)]


def encode_batch(model: CMamba, pictures: Sequence[Picture]) -> list[bytes]:
    """Code images of one size and quality as one batch; return a file of each."""
    x = torch.from_numpy(np.stack([p.pixels() for p in pictures])).permute(0, 3, 1, 2).float() / 255
    y_strings, z_strings = model.compress(pad(x), pictures[0].quality)["strings"]
    height, width = x.shape[-2:]
    return [
        Container(model.model_id, width, height, False, y, z).pack()
        for y, z in zip(y_strings, z_strings, strict=True)
    ]


def decode_batch(model: CMamba, files: Sequence[bytes]) -> np.ndarray:
    """Decode files of one size as one batch, uint8 `[B, H, W, 3]`.

    Raises:
        BitstreamError: the symbols of one fail their check.
    """
    header = Container.unpack(files[0])
    x_hat = model.decompress(*strings_of(files))["x_hat"][..., : header.height, : header.width]
    return (x_hat.float() * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()


def write_half(job: Job) -> Row:
    """Encode, and decode under the same setting but for the type of weights, which is the other's.

    What bfloat16 does to the image is not in question here, so both sides decode with one type.

    Returns:
        the number of bytes of all files.
    """
    size, files = job.setting.batch, []
    with under(job.setting):
        for start in range(0, len(job.pictures), size):
            files += encode_batch(job.load(), job.pictures[start : start + size])
        model = job.load(job.other.weights)
        decoded = [decode_batch(model, files[i : i + size]) for i in range(0, len(files), size)]
    for i, data in enumerate(files):
        (job.folder / f"{i}.cmb").write_bytes(data)
    np.save(job.folder / "decoded.npy", np.concatenate(decoded))
    return {"bytes": sum(map(len, files))}


def read_half(job: Job) -> Row:
    """Decode the files of `write_half`, and compare.

    Returns:
        files, how many of them fail the check of their symbols, values of pixels of the others, how
        many of these differ, and by how much at the most.
    """
    files = [(job.folder / f"{i}.cmb").read_bytes() for i in range(len(job.pictures))]
    expected, size = np.load(job.folder / "decoded.npy").astype(int), job.setting.batch
    wrong, differences = 0, [np.zeros(0, int)]
    with under(job.setting):
        for start in range(0, len(files), size):
            try:
                decoded = decode_batch(job.load(), files[start : start + size])
            except BitstreamError:
                wrong += size
                continue
            differences.append(np.abs(decoded - expected[start : start + size]).ravel())
    joined = np.concatenate(differences)
    return {
        "files": len(files),
        "files_with_other_symbols": wrong,
        "values": joined.size,
        "differing_values": int((joined > 0).sum()),
        "largest_difference": int(joined.max(initial=0)),
    }


# ---------------------------------------------------------------- what to measure


def in_fresh_process(
    function: Callable[[Job], Row],
    jobs: Sequence[Job],
    report: Callable[[Job, Row], object] = lambda *_: None,
) -> None:
    """Do `function` on jobs in a process that is set up for the first one's setting.

    Raises:
        CMambaError: the process died.
    """

    def checked(job: Job, result: Row | None) -> None:
        if result is None:
            raise CMambaError(f"the process died under {job.setting.label}; more memory?")
        report(job, result)

    setting = jobs[0].setting
    ready = functools.partial(prepare, setting.threads, setting.backend)
    pool.spread(function, jobs, 1, ready, checked)


def find_studies(
    paths: Sequence[Path],
    models: tuple[str, str],
    backends: Sequence[str],
    every: int,
    folder: Path,
) -> dict[str, list[Job]]:
    """Return the comparisons of whole images, and those of triton on crops of a few.

    Args:
        models: for the one and the other.
        every: so many images further is the next that a combination gets.
    """
    every = min(every, len(paths))
    combinations = [dict(zip(AXES, values, strict=True)) for values in product(*AXES.values())]
    eager = [b for b in backends if b != "triton"]
    triton = [b for b in backends if b == "triton"]
    studies = {}
    for name, model, chosen, taken, crop in (
        ("pictures", models[0], eager, paths, None),
        ("small", models[1], triton, paths[:every], CROP_OF_TRITON),
    ):
        pictures = tuple(
            Picture(path, crop, QUALITIES[i % len(QUALITIES)], folder / f"{name}{i}.npz")
            for i, path in enumerate(taken)
        )
        jobs = [
            Job(model, Setting(backend=backend, **c), pictures[i % every :: every])
            for backend in chosen
            for i, c in enumerate(combinations)
        ]
        if jobs:
            studies[name] = sorted(jobs, key=lambda job: job.process)
    return studies


def find_pairs(paths: Sequence[Path], model: str, backends: Sequence[str], count: int) -> list[Job]:
    """Return the encoding halves; `other` is the setting that decodes. Images are taken in turn.

    Every axis has two values; which of them pair i takes is the parity of i under a mask of the
    axis. Two different masks meet in all four combinations over 16 pairs.
    """
    axes = {**AXES, "backend": tuple(b for b in backends if b != "triton")}
    halves = []
    for i in range(count):
        masks = iter(range(1, 2 * len(axes) + 1))
        encoder, decoder = (
            Setting(**{a: v[(i & next(masks)).bit_count() % 2 % len(v)] for a, v in axes.items()})
            for _ in range(2)
        )
        taken = [paths[(PER_PAIR * i + k) % len(paths)] for k in range(PER_PAIR)]
        quality = QUALITIES[i % len(QUALITIES)]
        pictures = tuple(Picture(path, CROP_OF_PAIRS, quality) for path in taken)
        halves.append(Job(model, encoder, pictures, decoder))
    return halves


def measure_study(name: str, study: Sequence[Job], kept: PartialResults, bar: tqdm) -> None:
    """Compare every setting that is not kept yet."""
    waiting = [job for job in study if f"{name}: {job.setting.label}" not in kept.results]
    bar.update(len(study) - len(waiting))
    if not waiting:
        return
    bar.set_description_str(f"{name}: encoding")
    pictures = dict.fromkeys(picture for job in study for picture in job.pictures)
    in_fresh_process(keep_baseline, [Job(study[0].model, BASELINE, tuple(pictures))])

    def report(job: Job, result: Row) -> None:
        kept.add(f"{name}: {job.setting.label}", result)
        bar.update()

    for (backend, threads), together in groupby(waiting, key=lambda job: job.process):
        bar.set_description_str(f"{name}: {backend}, {threads} threads")
        in_fresh_process(compare, list(together), report)


def measure_pair(half: Job) -> Row:
    """Encode in one process and decode in another."""
    found: Row = {}
    with tempfile.TemporaryDirectory() as folder:
        writer = replace(half, folder=Path(folder))
        reader = replace(writer, setting=half.other, other=half.setting)
        for function, job in ((write_half, writer), (read_half, reader)):
            in_fresh_process(function, [job], lambda _, row: found.update(row))
    return found


# ---------------------------------------------------------------- the report


def report_of_study(name: str, study: Sequence[Job], results: dict[str, Row]) -> Row:
    """Return all settings of a study, and sums and largest differences for each backend."""
    rows = [{**asdict(c.setting), **results[f"{name}: {c.setting.label}"]} for c in study]

    def summed(rows: Sequence[Row]) -> Row:
        sums = {key: sum(row[key] for row in rows) for key in ("indexes", "differing_indexes")}
        return {**sums, **{key: max(row[key] for row in rows) for key in LARGEST}}

    backends = dict.fromkeys(row["backend"] for row in rows)
    return {
        "model": Path(study[0].model).name,
        "settings": len(rows),
        **summed(rows),
        "backends": {b: summed([r for r in rows if r["backend"] == b]) for b in backends},
        "rows": rows,
    }


def report_of_pairs(halves: Sequence[Job], results: dict[str, Row]) -> Row:
    """Return all pairs, and sums; pixels apart by the type of weights that decodes them."""
    rows = [
        {
            "encoder": asdict(half.setting),
            "decoder": asdict(half.other),
            "quality": half.pictures[0].quality,
            "pictures": [picture.path.name for picture in half.pictures],
            **results[f"pair {i}"],
        }
        for i, half in enumerate(halves)
    ]
    by_weights = {}
    for weights in WEIGHTS:
        mine = [row for row in rows if row["decoder"]["weights"] == weights]
        sums = {key: sum(row[key] for row in mine) for key in ("values", "differing_values")}
        by_weights[weights] = {
            **sums,
            "share": sums["differing_values"] / max(1, sums["values"]),
            "largest_difference": max((row["largest_difference"] for row in mine), default=0),
        }
    totals = {
        key: sum(row[key] for row in rows) for key in ("files", "files_with_other_symbols", "bytes")
    }
    return {"pairs": len(rows), **totals, "pixels": by_weights, "rows": rows}


def is_kept(report: Row) -> bool:
    """Whether all that is promised held: equal indexes and symbols, pixels within 1."""
    studies = [report[name] for name in ("pictures", "small") if name in report]
    pairs = report.get("pairs")
    return all(
        s["differing_indexes"] == 0 and s["ln_scale_absolute"] < MARGIN for s in studies
    ) and (
        pairs is None
        or pairs["files_with_other_symbols"] == 0
        and pairs["pixels"]["float32"]["largest_difference"] <= 1
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
    add("--pairs", type=int, choices=range(PAIRS + 1), default=PAIRS, help=f"default: {PAIRS}")
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
            halves = find_pairs(paths, args.model, args.backends, args.pairs)
            kept = PartialResults(args.output, conditions, fresh=args.fresh)
        except (CMambaError, OSError) as error:
            parser.error(str(error))
        total = sum(map(len, studies.values())) + len(halves)
        try:
            with tqdm(total=total, dynamic_ncols=True) as bar:
                for study_name, study in studies.items():
                    measure_study(study_name, study, kept, bar)
                for i, half in enumerate(halves):
                    bar.set_description_str(f"pair {i + 1} of {len(halves)}")
                    if f"pair {i}" not in kept.results:
                        kept.add(f"pair {i}", measure_pair(half))
                    bar.update()
        except KeyboardInterrupt:
            print("interrupted; with -o the same command resumes", file=sys.stderr)
            return 130
        except CMambaError as error:
            print(error, file=sys.stderr)
            return 1
    report: Row = {name: report_of_study(name, s, kept.results) for name, s in studies.items()}
    if halves:
        report["pairs"] = report_of_pairs(halves, kept.results)
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

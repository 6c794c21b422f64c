"""Measure rate and distortion of models on a folder of images, on real files.

    python tools/eval_rd.py photos -o rd.json
    python tools/eval_rd.py photos --model tiny --qualities 1 4 8 --codecs jpeg420 webp
    python tools/eval_rd.py photos --model mine=runs/a/model --model paper=low/model high/model
    python tools/eval_rd.py photos --qualities 1:8:0.1 --codecs --brief --jobs 2 -o fine.json
    python tools/eval_rd.py photos --reuse rd.json -o rd.json
    python tools/eval_rd.py photos --effort 0 5 --codecs --anchor cmamba

Every image is encoded to a file and decoded from it. bpp is 8 times the size of the file, header
included, over the number of pixels; PSNR (RGB) and MS-SSIM (linear) are those of the decoded 8-bit
images; the values of a folder are means over its images. Times are those of the codec, from pixels
to bytes and back, without the disk; ours are split into the transforms g_a and g_s, the entropy
parameters (h_a, h_s, CAE, LRP), the entropy coder, and the rest. Peaks of memory are those of the
process, with torch and the model. With several processes (--jobs) each has its share of the cores,
and times are longer than those of one alone.

Each --model is a curve. A model with a range of qualities gives one point for each; several
directories after one --model, for instance models trained for one lambda each, are points of one
curve. With several efforts (--effort) each is a curve. The classical codecs run on the same images,
as far as this Pillow has them. --brief measures only bpp and PSNR: MS-SSIM takes more than a third
of the time of a point.

Along each curve, bpp and PSNR should rise from every quality to the next; where they do not, the
steps are printed, and `meta` has them under `not_rising`.

The JSON has CompressAI's layout, one object per codec: `results` holds a list per measure with an
entry per point, `per_image` the same for each image. `meta` holds provenance, and BD-rates
against the --anchor by PSNR and MS-SSIM (see tools/bd_rate.py), each with the interval in which
95 % of the BD-rates over resampled images lie (bootstrap).

With --reuse the classical codecs' results are taken from an earlier report on images of the same
names, as far as it was made with the same versions and settings of these codecs; the others are
measured.

With -o, finished measurements are kept beside the output (FILE.partial): after Ctrl-C or a failure
the same command resumes. The exit status is 1 if a measurement failed, 2 for wrong arguments or
images, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import bd_rate
import numpy as np
import rd_measure
import torch
from classical_codecs import CODECS
from markdown_table import markdown_table
from partial_results import PartialResults
from provenance import of_run, versions
from rd_curves import METRICS, Curve, CurveError, curves_in
from rd_measure import MEASURES, OUR_MEASURES, Point, Row, Task
from tqdm import tqdm

from cmamba_ref import CMambaError
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.cli import process_pool
from cmamba_ref.cli.batch import PROCESS_DIED
from cmamba_ref.metrics import MS_SSIM_MIN_SIDE

OURS = "cmamba"
# For the interval of a BD-rate: draws of the images, and how few say nothing.
RESAMPLES = 1000
MIN_IMAGES = 8
PACKAGES = ("cmamba-ref", "torch", "numpy", "pillow", "pytorch-msssim")


# ---------------------------------------------------------------- measurements to make


def find_images(folder: Path, limit: int | None) -> list[Path]:
    """Return the images of a folder, each of which can be measured.

    Raises:
        CMambaError: there is none, or one cannot.
        OSError: the folder or an image cannot be read.
    """
    paths = rd_measure.image_paths(folder, limit)
    for path in tqdm(paths, desc="checking images", leave=False, disable=None):
        if min(rd_measure.read_rgb(path).shape[:2]) < MS_SSIM_MIN_SIDE:
            raise CMambaError(
                f"{path} has a side of less than {MS_SSIM_MIN_SIDE} pixels, too few for MS-SSIM"
            )
    return paths


def find_points(
    given: Sequence[Sequence[str]], qualities: Sequence[float] | None, codecs: Sequence[str]
) -> list[Point]:
    """Return all points, curve by curve and model by model.

    Args:
        given: for each curve its models; the first may begin with `NAME=`.
        qualities: for every model with a range of them; None for all whole ones.

    Raises:
        CMambaError: a model cannot be loaded, a quality is out of range, or a name is taken.
        OSError: a model cannot be read.
    """
    points: list[Point] = []
    for sources in given:
        name, equals, first = sources[0].partition("=")
        if not equals:
            name, first = OURS, sources[0]
        if name in {"", "meta", *CODECS, *(point.codec for point in points)}:
            raise CMambaError(
                f"each curve must have a name of its own, got {name!r} again; "
                "name it: --model NAME=MODEL"
            )
        for source in (first, *sources[1:]):
            model = rd_measure.load_model(source)
            config, model_id = model.config, model.model_id.hex()
            whole = qualities or range(1, len(config.lmbdas) + 1)
            for quality in whole if config.variable_rate else [None]:
                checked = model.check_quality(quality)
                points.append(Point(name, checked, source, model_id, config.name))
    if qualities and all(point.setting is None for point in points):
        raise CMambaError("--qualities are for models with a range of them; these have one rate")
    return points + [Point(key, setting) for key in codecs for setting in CODECS[key].settings]


def at_efforts(points: Sequence[Point], efforts: Iterable[int]) -> list[Point]:
    """Return the points with a curve of each of our models for each effort."""
    ours = [point for point in points if point.model is not None]
    curves = [
        dataclasses.replace(p, codec=f"{p.codec}-effort-{e}" if e else p.codec, effort=e)
        for e in efforts
        for p in ours
    ]
    return curves + [point for point in points if point.model is None]


def reusable(
    path: Path, codecs: Sequence[str], images: Sequence[Path], brief: bool
) -> tuple[dict[str, dict], dict[str, object] | None]:
    """Return the curves of classical codecs in an earlier report, and how they were measured.

    Only of the same versions of these codecs at the same settings.

    Raises:
        CMambaError: it is no report on these images.
    """
    try:
        earlier = json.loads(path.read_text())
        meta = earlier["meta"]
        is_on_these = meta["images"]["names"] == [image.name for image in images]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CMambaError(f"--reuse must be a report, got {path}: {error!r}") from error
    if not is_on_these:
        raise CMambaError(f"--reuse must be a report on the same images, got {path}")
    found = {}
    for key in codecs:
        curve = earlier.get(key, {})
        results = curve.get("results", {})
        same = CODECS[key].version(), list(CODECS[key].settings)
        is_complete = brief or results.keys() >= set(MEASURES)
        if (curve.get("description"), results.get("quality")) == same and is_complete:
            found[key] = curve
    kept = ("command", "commit", "date", "machine", "threads", "versions")
    made = meta.get("reused") or {key: meta[key] for key in kept if key in meta}
    return found, made if found else None


# ---------------------------------------------------------------- measuring


def key_of(point: Point, image: Path) -> str:
    """Return the key of a result."""
    return f"{point.codec} {point.label} {image.name}"


def measure_missing(tasks: Sequence[Task], kept: PartialResults, jobs: int) -> int:
    """Measure what is not yet in `kept`, into it; return how many measurements failed."""
    waiting = [task for task in tasks if key_of(task.point, task.image) not in kept.results]
    failed, done = 0, len(tasks) - len(waiting)
    with tqdm(total=len(tasks), initial=done, disable=None) as bar:

        def report(task: Task, outcome: Row | str | None) -> None:
            nonlocal failed
            bar.update()
            key = key_of(task.point, task.image)
            if isinstance(outcome, dict):
                kept.add(key, outcome)
            else:
                failed += 1
                bar.write(f"{key}: {outcome or PROCESS_DIED}", file=sys.stderr)

        if jobs == 1:
            for task in waiting:
                report(task, rd_measure.measure(task))
        else:
            threads = max(1, torch.get_num_threads() // jobs)
            prepare = functools.partial(torch.set_num_threads, threads)
            process_pool.spread(rd_measure.measure, waiting, jobs, prepare, report)
    return failed


# ---------------------------------------------------------------- the report


def _models(points: Sequence[Point]) -> list[dict[str, object]]:
    """Return the models of one curve, with the qualities of each."""
    return [
        {
            "name": point.name,
            "id": point.model_id,
            "qualities": [other.setting for other in points if other.model == source],
        }
        for source, point in {point.model: point for point in points}.items()
    ]


def report_of(
    points: Sequence[Point], images: Sequence[Path], results: dict[str, Row]
) -> dict[str, dict]:
    """Return every curve as the JSON has it, without `meta`."""
    report: dict[str, dict] = {}
    for codec in dict.fromkeys(point.codec for point in points):
        mine = [point for point in points if point.codec == codec]
        rows = [[results[key_of(point, image)] for image in images] for point in mine]
        means: dict[str, list] = {"quality": [point.setting for point in mine]}
        if codec in CODECS:
            name, description = CODECS[codec].name, CODECS[codec].version()
        else:
            name = f"CMamba {', '.join(dict.fromkeys(point.name for point in mine))}"
            name += f", effort {mine[0].effort}" if mine[0].effort else ""
            description = f"{len(_models(mine))} model(s), see meta"
            means["model"] = [point.model_id for point in mine]
        for measure in (*MEASURES, *OUR_MEASURES):
            # Not every codec has all measures, nor every system, and --brief asks for two.
            if all(measure in row for of_point in rows for row in of_point):
                means[measure] = [
                    float(np.mean([row[measure] for row in of_point])) for of_point in rows
                ]
        report[codec] = {
            "name": name,
            "description": description,
            "results": means,
            "per_image": rows,
        }
    return report


def not_rising(report: dict[str, dict]) -> dict[str, list[dict[str, object]]]:
    """Return the steps of quality at which a mean does not rise, by codec; [] where all rise.

    A step leads from one setting of a codec, or of one model, to the next higher one. Codecs with
    no step are left out.
    """
    found: dict[str, list[dict[str, object]]] = {}
    for codec, curve in report.items():
        results = curve["results"]
        models = results.get("model", [""] * len(results["quality"]))
        points = [k for k, quality in enumerate(results["quality"]) if quality is not None]
        points.sort(key=lambda k: (models[k], results["quality"][k]))
        for low, high in pairwise(points):
            if models[low] != models[high]:
                continue
            steps = found.setdefault(codec, [])
            for measure in ("bpp", "psnr-rgb"):
                gain = results[measure][high] - results[measure][low]
                if not gain > 0:
                    ends = [results["quality"][k] for k in (low, high)]
                    steps.append({"measure": measure, "step": ends, "by": gain})
    return found


def bd_rates(report: dict[str, dict], anchor: str) -> tuple[dict[str, object], str]:
    """Return BD-rates of all other codecs against the anchor, as JSON and as text."""
    found = {curve.name: curve for curve in curves_in(report, Path("this run"))}
    as_json, lines = {}, []
    for metric in METRICS:
        outcomes = bd_rate.compare_all(found[anchor], list(found.values()), metric)
        lines.append(f"{bd_rate.table(found[anchor], metric, outcomes)}\n")
        codecs = []
        for curve, outcome in outcomes:
            entry: dict[str, object] = dict(curve.identity())
            if isinstance(outcome, CurveError):
                entry["refused"] = str(outcome)
            else:
                entry["bd_rate"] = dataclasses.asdict(outcome)
                ends = entry["interval_95"] = interval(report, found[anchor], curve, metric)
                if ends is not None:
                    low, high = ends
                    lines.append(f"{curve.name}: {low:+.2f} to {high:+.2f} % in 95 % of resamples")
            codecs.append(entry)
        as_json[metric] = {
            "metric": metric,
            "interpolation": "PCHIP of log rate over dB",
            "anchor": found[anchor].identity(),
            "codecs": codecs,
        }
    return as_json, "\n".join(lines)


def interval(
    report: dict[str, dict], anchor: Curve, test: Curve, metric: str
) -> tuple[float, float] | None:
    """Return where 95 % of the BD-rates over resampled images lie, in per cent (bootstrap).

    None where there are fewer than `MIN_IMAGES`, or where resampled curves fall.
    """
    from scipy.stats import bootstrap

    measures = ("bpp", METRICS[metric])
    # Of each codec [measure, point, image].
    values = {
        name: np.array(
            [[[row[m] for row in rows] for rows in report[name]["per_image"]] for m in measures]
        )
        for name in (anchor.name, test.name)
    }
    images = np.arange(values[test.name].shape[2])
    if len(images) < MIN_IMAGES:
        return None

    def percent(chosen: np.ndarray) -> float:
        points = []
        for curve in (anchor, test):
            means = values[curve.name][:, :, chosen].mean(axis=2)
            results = dict(zip(measures, means.tolist(), strict=True))
            points.append(dataclasses.replace(curve, results=results).points(metric))
        return bd_rate.bd_rate(*points).percent

    try:
        found = bootstrap(
            (images,),
            percent,
            n_resamples=RESAMPLES,
            vectorized=False,
            method="percentile",
            rng=np.random.default_rng(0),
        )
    except CurveError:
        return None
    low, high = found.confidence_interval
    return round(float(low), 2), round(float(high), 2)


# ---------------------------------------------------------------- the command


def quality_range(text: str) -> list[float]:
    """Return qualities written as one number or as FROM:TO:STEP, both ends of which are in it.

    Raises:
        ValueError: it is neither; argparse then names the argument.
    """
    low, *rest = map(float, text.split(":"))
    if not rest:
        return [low]
    high, step = rest
    if not 0.01 <= step <= high - low < math.inf:
        raise ValueError
    # In hundredths, as files store them: steps of 0.1 add up to something else than a whole.
    return np.arange(low, high + 0.005, step).round(2).tolist()


def parse(argv: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, help="folder of images with sides of at least 161 pixels")
    models = "a curve: name or directory of a model, or of several (default: cmamba=tiny)"
    add("--model", nargs="+", action="append", metavar="[NAME=]MODEL", help=models)
    range_ = "numbers, or FROM:TO:STEP (default: every whole quality of the model)"
    add("--qualities", type=quality_range, nargs="+", metavar="QUALITY", help=range_)
    efforts = "efforts of our encoder, 0 to 9 (default: 0)"
    add("--effort", nargs="+", type=int, choices=range(10), default=[0], metavar="N", help=efforts)
    classical = f"of {' '.join(CODECS)} (default: all; --codecs alone: none)"
    add("--codecs", nargs="*", choices=CODECS, metavar="CODEC", help=classical)
    add("--anchor", default="jpeg420", metavar="CODEC", help="of BD-rates (default: jpeg420)")
    add("--limit", type=int, metavar="N", help="only the first N images")
    add("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")
    add("--brief", action="store_true", help="only bpp and PSNR: no MS-SSIM, no times, no memory")
    add("--keep", type=Path, metavar="DIR", help="keep this run's files and decoded images in here")
    add("--reuse", type=Path, metavar="FILE", help="take classical codecs from this report")
    add("--fresh", action="store_true", help="discard what an earlier run left unfinished")
    add("-o", "--output", type=Path, metavar="FILE", help="write the JSON here")
    args = parser.parse_args(argv)
    if args.qualities:
        args.qualities = [quality for part in args.qualities for quality in part]
    if args.output and not args.output.parent.is_dir():
        parser.error(f"-o must lie in an existing directory, got {str(args.output)!r}")
    for name in ("limit", "jobs"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    return parser, args


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser, args = parse(argv)
    asked = list(CODECS) if args.codecs is None else args.codecs
    codecs = [key for key in asked if CODECS[key].is_available()]
    provenance = {**of_run("eval_rd.py", argv), "versions": versions(*PACKAGES), "jobs": args.jobs}
    if args.brief:
        provenance["brief"] = True
    reused, reused_from = {}, None
    try:
        images = find_images(args.folder, args.limit)
        if args.reuse:
            reused, reused_from = reusable(args.reuse, codecs, images, args.brief)
        missing = [key for key in codecs if key not in reused]
        points = find_points(args.model or [[f"{OURS}=tiny"]], args.qualities, missing)
        points = at_efforts(points, dict.fromkeys(args.effort))
        conditions = {key: provenance[key] for key in provenance if key not in ("command", "date")}
        conditions["images"] = hashlib.sha256(b"".join(map(Path.read_bytes, images))).hexdigest()
        kept = PartialResults(args.output, conditions, fresh=args.fresh)
    except (CMambaError, OSError) as error:
        parser.error(str(error))

    tasks = [Task(point, image, args.keep, args.brief) for point in points for image in images]
    resumes = "without -o nothing is kept"
    if kept.path is not None:
        resumes = f"what was measured is kept in {kept.path}, the same command resumes"
    try:
        if failed := measure_missing(tasks, kept, args.jobs):
            print(f"{failed} measurements failed; {resumes}", file=sys.stderr)
            return 1
    except KeyboardInterrupt:
        print(f"interrupted; {resumes}", file=sys.stderr)
        return 130

    report = report_of(points, images, kept.results) | reused
    falls = not_rising(report)
    for curve in curves_in(report, Path("this run")):
        heading, rows = curve.table()
        print(f"{curve.label}\n\n{markdown_table(heading, rows, figures=len(heading))}\n")
    for codec, steps in falls.items():
        rises = f"not at {steps}" if steps else "at every step"
        print(f"{codec}: mean bpp and mean PSNR rise with quality, {rises}")
    ours = dict.fromkeys(point.codec for point in points if point.model is not None)
    meta = {
        **provenance,
        "models": {name: _models([p for p in points if p.codec == name]) for name in ours},
        "images": {
            "folder": args.folder.resolve().name,
            "names": [path.name for path in images],
        },
        "codecs_left_out": [key for key in asked if key not in codecs],
        "reused": reused_from,
        "not_rising": falls,
    }
    if args.anchor in report:
        try:
            meta["bd_rates"], text = bd_rates(report, args.anchor)
        except ImportError as error:
            text = f"no BD-rates: {error}; pip install scipy"
        print(f"\n{text}")
    if args.output:
        content = json.dumps({**report, "meta": meta}, indent=1) + "\n"
        write_atomically(args.output, content.encode())
        kept.discard()
    return 0


if __name__ == "__main__":
    sys.exit(main())

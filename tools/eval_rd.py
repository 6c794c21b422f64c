"""Measure rate and distortion of models on a folder of images, on real files.

    python tools/eval_rd.py photos -o rd.json
    python tools/eval_rd.py photos --model tiny --qualities 1 4 8 --codecs jpeg420 webp
    python tools/eval_rd.py photos --model mine=runs/a/model --model paper=low/model high/model
    python tools/eval_rd.py photos --qualities 1:8:0.1 --codecs --brief --jobs 2 -o fine.json
    python tools/eval_rd.py photos --reuse rd.json -o rd.json

Every image is encoded to a file and decoded from it. bpp is 8 times the size of the file, header
included, over the number of pixels; PSNR (RGB) and MS-SSIM (linear) are those of the decoded 8-bit
images; the values of a folder are means over its images. Times are those of the codec, from pixels
to bytes and back, without the disk; ours are split into the transforms g_a and g_s, the entropy
parameters (h_a, h_s, CAE, LRP), the entropy coder, and the rest. Peaks of memory are those of the
process, with torch and the model. With several processes (--jobs) each has its share of the cores,
and times are longer than those of one alone.

Each --model is a curve. A model with a range of qualities gives one point for each; several
directories after one --model, for instance models trained for one lambda each, are points of one
curve. The classical codecs run on the same images, as far as this Pillow has them. --brief measures
only bpp and PSNR: MS-SSIM takes more than a third of the time of a point.

Along each curve, bpp and PSNR should rise from every quality to the next; where they do not, the
steps are printed, and `meta` has them under `not_rising`.

The JSON has CompressAI's layout, one object per codec: `results` holds a list per measure with an
entry per point, `per_picture` the same for each image. `meta` holds provenance, and BD-rates
against the --anchor by PSNR and MS-SSIM (see tools/bd_rate.py), each with the interval in which
95 % of the BD-rates over resampled images lie (bootstrap).

With --reuse the classical codecs' results are taken from an earlier report on images of the same
names, as far as it was made with the same versions of these codecs; the others are measured.

With -o, finished measurements are kept beside the output (FILE.partial): after Ctrl-C or a failure
the same command resumes. The exit status is 1 if a measurement failed, 2 for wrong arguments or
images, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import bd_rate
import numpy as np
import rd_curves
import rd_measure
from classical_codecs import CODECS
from partial_results import PartialResults
from provenance import of_run, versions
from rd_measure import MEASURES, OUR_MEASURES, Point, Row, Task
from tqdm import tqdm

from cmamba_ref import CMambaError
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.cli import process_pool
from cmamba_ref.cli.batch import PROCESS_DIED, core_count
from cmamba_ref.metrics import MS_SSIM_MIN_SIDE

OURS = "cmamba"
# For the interval of a BD-rate: draws of the images, and how few say nothing.
RESAMPLES = 1000
MIN_IMAGES = 8
PACKAGES = ("cmamba-ref", "torch", "numpy", "pillow", "pytorch-msssim")

# The digest of each image file.
Digests = Mapping[Path, str]


# ---------------------------------------------------------------- what to measure


def find_images(folder: Path, limit: int | None) -> Digests:
    """Return the images of a folder, each of which can be measured.

    Raises:
        CMambaError: there is none, or some cannot; all of those are named.
    """
    paths = rd_measure.picture_paths(folder, limit)
    bad, digests = [], {}
    for path in tqdm(paths, desc="checking images", leave=False, disable=None):
        try:
            if min(rd_measure.read_rgb(path).shape[:2]) < MS_SSIM_MIN_SIDE:
                raise CMambaError(
                    f"{path} has a side of less than {MS_SSIM_MIN_SIDE} pixels, too few for MS-SSIM"
                )
            digests[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        except (CMambaError, OSError) as error:
            bad.append(str(error))
    if bad:
        raise CMambaError(
            f"{len(bad)} of {len(paths)} images cannot be measured:\n  "
            + "\n  ".join(bad)
            + "\nmove them away, so that it is clear over which images the means are"
        )
    return digests


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


# ---------------------------------------------------------------- measuring


def key_of(point: Point, digest: str) -> str:
    """Return the key of a result: everything that it depends on beside the conditions."""
    return f"{point.codec} {point.label} {digest}"


def measure_all(keys: dict[Task, str], kept: PartialResults, jobs: int) -> int:
    """Measure what is not yet in `kept`, into it; return how many measurements failed."""
    waiting = [task for task, key in keys.items() if key not in kept.results]
    failed, done = 0, len(keys) - len(waiting)
    form = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed} gone, {remaining} to go"
    with tqdm(total=len(keys), initial=done, bar_format=form, disable=None) as bar:

        def report(task: Task, outcome: Row | str | None) -> None:
            nonlocal failed
            name = f"{task.point.codec} {task.point.label}"
            bar.set_description_str(name, refresh=False)
            bar.update()
            if isinstance(outcome, dict):
                kept.add(keys[task], outcome)
                return
            failed += 1
            bar.write(f"{name}, {task.picture}: {outcome or PROCESS_DIED}", file=sys.stderr)

        if jobs == 1:
            for task in waiting:
                report(task, rd_measure.measure(task))
        else:
            threads = max(1, core_count() // jobs)
            prepare = functools.partial(rd_measure.use_threads, threads)
            process_pool.spread(rd_measure.measure, waiting, jobs, prepare, report)
    return failed


def reusable(
    path: Path, points: Sequence[Point], images: Digests, brief: bool
) -> tuple[dict[str, Row], dict[str, object]]:
    """Return results of classical codecs in an earlier report, by key, and their provenance.

    Raises:
        CMambaError: it is no report, or one on other images.
    """
    try:
        earlier = json.loads(path.read_text())
        meta = earlier["meta"]
        names = meta["pictures"]["names"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CMambaError(
            f"--reuse must be a report of this tool, got {path}: {error!r}"
        ) from error
    if names != [image.name for image in images]:
        raise CMambaError(f"--reuse must be a report on the same images, got {path}")
    found, wanted = {}, {"bpp", "psnr-rgb"} if brief else set(MEASURES)
    for point in points:
        codec = earlier.get(point.codec, {})
        if point.codec not in CODECS or codec.get("description") != _description(point.codec):
            continue
        settings = codec["results"]["quality"]
        if point.setting in settings:
            rows = codec["per_picture"][settings.index(point.setting)]
            if all(wanted <= row.keys() for row in rows):
                keys = (key_of(point, digest) for digest in images.values())
                found |= dict(zip(keys, rows, strict=True))
    kept = ("command", "commit", "date", "machine", "threads", "versions")
    return found, meta.get("reused") or {key: meta[key] for key in kept if key in meta}


# ---------------------------------------------------------------- the report


def _description(codec: str) -> str:
    """The version of a classical codec."""
    return f"Pillow, {CODECS[codec].version()}"


def _models(points: Sequence[Point]) -> list[dict[str, object]]:
    """The models of one curve, with the qualities of each."""
    return [
        {"name": p.name, "id": p.model_id, "qualities": [q.setting for q in points
                                                         if q.model == source]}
        for source, p in {point.model: point for point in points}.items()
    ]  # fmt: skip


def report_of(points: Sequence[Point], images: Digests, results: dict[str, Row]) -> dict[str, dict]:
    """Return every curve as the JSON has it, without `meta`."""
    report: dict[str, dict] = {}
    for codec in dict.fromkeys(point.codec for point in points):
        mine = [point for point in points if point.codec == codec]
        rows = [[results[key_of(p, digest)] for digest in images.values()] for p in mine]
        means: dict[str, list] = {"quality": [point.setting for point in mine]}
        measures = MEASURES
        if codec in CODECS:
            name, description = CODECS[codec].name, _description(codec)
        else:
            models = _models(mine)
            name = f"CMamba {', '.join(dict.fromkeys(str(m['name']) for m in models))}"
            description = f"{len(models)} model(s), see meta"
            means["model"] = [point.model_id for point in mine]
            measures += OUR_MEASURES
        for measure in measures:
            # The peak of memory is not counted everywhere, and not all measures are asked for.
            if all(measure in row for of_point in rows for row in of_point):
                means[measure] = [
                    float(np.mean([row[measure] for row in of_point])) for of_point in rows
                ]
        report[codec] = {
            "name": name,
            "description": description,
            "results": means,
            "per_picture": rows,
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
        models = results.get("model", [None] * len(results["quality"]))
        points = [k for k, quality in enumerate(results["quality"]) if quality is not None]
        points.sort(key=lambda k: (str(models[k]), results["quality"][k]))
        for before, after in zip(points, points[1:], strict=False):
            if models[before] != models[after]:
                continue
            steps = found.setdefault(codec, [])
            for measure in ("bpp", "psnr-rgb"):
                gain = results[measure][after] - results[measure][before]
                if not gain > 0:
                    ends = [results["quality"][k] for k in (before, after)]
                    steps.append({"measure": measure, "step": ends, "by": gain})
    return found


def rising_lines(report: dict[str, dict], falls: dict[str, list[dict[str, object]]]) -> str:
    """Write the verdict on each codec that has steps."""
    lines = []
    for codec, steps in falls.items():
        points = len(report[codec]["results"]["quality"])
        if not steps:
            lines.append(f"{codec}: mean bpp and mean PSNR rise at every step of {points} points")
        for step in steps:
            low, high = step["step"]  # type: ignore[misc]
            lines.append(
                f"{codec}: mean {step['measure']} changes by {step['by']:.3g} from quality {low:g} "
                f"to {high:g}"
            )
    return "\n".join(lines)


def bd_rates(report: dict[str, dict], anchor: str) -> tuple[dict[str, object], str]:
    """Return BD-rates of all other codecs against the anchor, as JSON and as text."""
    found = {curve.name: curve for curve in rd_curves.curves_in(report, Path("this run"))}
    others = [curve for name, curve in found.items() if name != anchor]
    as_json, text = {}, []
    for metric in rd_curves.METRICS:
        outcomes = bd_rate.compare(found[anchor], others, metric)
        as_json[metric] = bd_rate.as_json(found[anchor], metric, outcomes)
        lines = [bd_rate.table(found[anchor], metric, outcomes)]
        for (curve, outcome), entry in zip(outcomes, as_json[metric]["codecs"], strict=True):
            if isinstance(outcome, bd_rate.BDRate):
                ends = entry["interval_95"] = interval(report, anchor, curve.name, metric)
                if ends is not None:
                    low, high = ends
                    lines.append(f"{curve.name}: {low:+.2f} to {high:+.2f} % in 95 % of resamples")
        text.append("\n".join(lines))
    return as_json, "\n\n".join(text)


def interval(
    report: dict[str, dict], anchor: str, test: str, metric: str
) -> tuple[float, float] | None:
    """Where 95 % of the BD-rates over resampled images lie, in per cent (percentile bootstrap).

    None where there are fewer than `MIN_IMAGES`, or where resampled curves fall.
    """
    measures = "bpp", {"psnr": "psnr-rgb", "ms-ssim": "ms-ssim-rgb"}[metric]
    # Of each codec [measure, point, image].
    values = [
        np.array(
            [[[row[m] for row in rows] for rows in report[name]["per_picture"]] for m in measures]
        )
        for name in (anchor, test)
    ]
    images = values[0].shape[2]
    if images < MIN_IMAGES:
        return None
    draw, percents = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        chosen = draw.integers(0, images, images)
        curves = [of_codec[:, :, chosen].mean(axis=2) for of_codec in values]
        if metric == "ms-ssim":
            curves = [(bpp, [rd_curves.ms_ssim_db(x) for x in linear]) for bpp, linear in curves]
        try:
            found = bd_rate.bd_rate(*(list(zip(*curve, strict=True)) for curve in curves))
        except rd_curves.CurveError:
            return None
        percents.append(found.percent)
    low, high = np.percentile(percents, (2.5, 97.5))
    return round(float(low), 2), round(float(high), 2)


def table(report: dict[str, dict]) -> str:
    """Write the means as text."""
    shown = [m for m in MEASURES if all(m in curve["results"] for curve in report.values())]
    lines = [f"{'codec':<12}{'quality':>8}" + "".join(f"{measure:>15}" for measure in shown)]
    for codec, curve in report.items():
        results = curve["results"]
        for k, quality in enumerate(results["quality"]):
            values = "".join(f"{results[measure][k]:>15.4f}" for measure in shown)
            lines.append(f"{codec:<12}{'' if quality is None else f'{quality:g}':>8}{values}")
    return "\n".join(lines)


# ---------------------------------------------------------------- the command


def quality_range(text: str) -> list[float]:
    """Qualities written as one number or as FROM:TO:STEP, for argparse; both ends are in it."""
    try:
        numbers = [float(part) for part in text.split(":")]
        if len(numbers) == 1:
            return numbers
        low, high, step = numbers
        # In hundredths, as files store them: steps of 0.1 add up to something else than a whole.
        low, high, step = (round(100 * value) for value in (low, high, step))
        if not (step > 0 and low <= high):
            raise ValueError
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"must be a number or FROM:TO:STEP with a step of at least 0.01, got {text!r}"
        ) from None
    return [value / 100 for value in range(low, high + 1, step)]


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
    left_out = [key for key in asked if not CODECS[key].is_available()]
    codecs = [key for key in asked if key not in left_out]
    provenance = {**of_run("eval_rd.py", argv), "versions": versions(*PACKAGES), "jobs": args.jobs}
    if args.brief:
        provenance["brief"] = True
    conditions = {key: provenance[key] for key in provenance if key not in ("command", "date")}
    reused, made = {}, None
    try:
        images = find_images(args.folder, args.limit)
        points = find_points(args.model or [[f"{OURS}=tiny"]], args.qualities, codecs)
        if args.reuse:
            reused, made = reusable(args.reuse, points, images, args.brief)
        kept = PartialResults(args.output, conditions, fresh=args.fresh)
    except (CMambaError, OSError) as error:
        parser.error(str(error))
    kept.results |= reused
    for key in left_out:
        print(f"{key} is left out: this Pillow cannot write it", file=sys.stderr)
    keys = {
        Task(point, path, args.keep, args.brief): key_of(point, digest)
        for point in points
        for path, digest in images.items()
    }

    what_is_kept = "without -o nothing is kept"
    try:
        failed = measure_all(keys, kept, args.jobs)
    except KeyboardInterrupt:
        failed = None
    if failed != 0:
        if kept.path is not None:
            what_is_kept = f"{len(kept.results)} are kept in {kept.path}, the same command resumes"
        reason = "interrupted" if failed is None else f"{failed} measurements failed"
        print(f"{reason}; {what_is_kept}", file=sys.stderr)
        return 130 if failed is None else 1

    report = report_of(points, images, kept.results)
    falls = not_rising(report)
    print(table(report))
    print(f"\n{rising_lines(report, falls)}\n")
    ours = dict.fromkeys(point.codec for point in points if point.model is not None)
    meta = {
        **provenance,
        "models": {name: _models([p for p in points if p.codec == name]) for name in ours},
        "pictures": {
            "folder": args.folder.resolve().name,
            "names": [path.name for path in images],
        },
        "codecs_left_out": left_out,
        # How the classical codecs' results were measured, where this run took them over.
        "reused": made if reused else None,
        "not_rising": falls,
    }
    text = f"no BD-rates: the anchor {args.anchor!r} is not in this run"
    if args.anchor in report:
        try:
            meta["bd_rates"], text = bd_rates(report, args.anchor)
        except ImportError as error:
            text = f"no BD-rates: {error}; pip install scipy"
    print(text)
    if args.output:
        content = json.dumps({**report, "meta": meta}, indent=1) + "\n"
        write_atomically(args.output, content.encode())
        kept.discard()
    return 0


if __name__ == "__main__":
    sys.exit(main())

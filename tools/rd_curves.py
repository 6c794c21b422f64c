"""Rate-distortion curves out of JSON files.

A curve is named as FILE or FILE:NAME, for instance `anchors.json:kodak/VTM-9.1`. What is read:

    ours            what tools/eval_rd.py writes: an object per codec, with `results`
    CompressAI's    one object with `name` and `results`
    tables          objects, nested as one likes, that end in `bpp` and `psnr` or `ms-ssim`

NAME is the path of keys to a curve, joined by `/`, or the beginning of one: `anchors.json:kodak` is
every curve below `kodak`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cmamba_ref import CMambaError

# What may stand on the ordinate, both in dB, by its key in the results of an evaluation.
METRICS = {"psnr": "psnr-rgb", "ms-ssim": "ms-ssim-rgb"}
# The columns of a table of points, by their keys: heading and format.
COLUMNS = {
    "quality": ("quality", "g"),
    "bpp": ("bpp", ".4f"),
    "psnr-rgb": ("PSNR, dB", ".2f"),
    "ms-ssim-rgb": ("MS-SSIM", ".4f"),
    "encoding_time": ("encode, s", ".3f"),
    "decoding_time": ("decode, s", ".3f"),
}


class CurveError(CMambaError, ValueError):
    """A curve cannot be read, or does not allow what was asked of it."""


@dataclass(frozen=True)
class Curve:
    """Rate and distortion of one codec on one set of images, means over the images.

    Attributes:
        file: the name of the file, without folders.
        name: the path of keys to it in there.
        label: the codec as its file describes it.
        dataset: the images, as far as the file says.
        source: where the points come from, as the file says, or the file.
        results: `bpp`, the metrics (PSNR in dB, MS-SSIM linear), and what else an evaluation says
            of each point; one value per point.
        is_measured: whether it is the result of an evaluation, and not of a table.
        meta: the provenance of the whole file; empty for a table.
    """

    file: str
    name: str
    label: str
    dataset: str
    source: str
    results: dict[str, list[Any]]
    is_measured: bool = False
    meta: dict[str, Any] = field(default_factory=dict)

    def identity(self) -> dict[str, str]:
        """Return which curve it is, as JSON holds it."""
        keys = ("file", "name", "label", "dataset", "source")
        return {key: getattr(self, key) for key in keys}

    @property
    def images(self) -> str:
        """The dataset in a word, the same for files that describe it at length or in short."""
        return self.dataset.split(",")[0].casefold()

    def has(self, metric: str) -> bool:
        """Return whether the file has this metric."""
        return METRICS[metric] in self.results

    def table(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """Return heading and rows of a table of the points."""
        columns = {key: self.results.get(key, []) for key in COLUMNS}
        shown = [key for key, values in columns.items() if any(v is not None for v in values)]
        cells = [
            ["" if value is None else format(value, COLUMNS[key][1]) for value in columns[key]]
            for key in shown
        ]
        return [COLUMNS[key][0] for key in shown], list(zip(*cells, strict=True))

    def points(self, metric: str) -> list[tuple[float, float]]:
        """Return (bpp, dB) of every point, by rising bpp.

        MS-SSIM goes to dB after the mean over images, as the field's plots have it.

        Raises:
            CurveError: the file does not have this metric.
        """
        if not self.has(metric):
            raise CurveError(f"{self.label} ({self.source}) has no {metric}")
        values = self.results[METRICS[metric]]
        if metric == "ms-ssim":
            values = map(ms_ssim_db, values)
        return sorted(zip(self.results["bpp"], values, strict=True))


def ms_ssim_db(linear: float) -> float:
    """Return -10 log10(1 - MS-SSIM), infinite for 1."""
    return math.inf if linear >= 1 else -10 * math.log10(1 - linear)


def load_curves(spec: str) -> list[Curve]:
    """Return the curves that FILE or FILE:NAME stands for, at least one.

    Raises:
        CurveError: no such file, no JSON, no curve of that name, or malformed points.
    """
    file, _, name = spec.rpartition(":")
    path, name = (Path(spec), "") if Path(spec).exists() or not file else (Path(file), name)
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CurveError(f"{path} must be a JSON file: {error}") from error
    found = list(curves_in(data, path))
    chosen = [c for c in found if name in ("", c.name) or c.name.startswith(f"{name}/")]
    if not chosen:
        known = ", ".join(c.name for c in found) or "none"
        raise CurveError(f"{path} has no curve {name!r}; it has: {known}")
    return chosen


def load_curve(spec: str) -> Curve:
    """Return the one curve that FILE or FILE:NAME stands for.

    Raises:
        CurveError: as `load_curves`, or there are several.
    """
    curves = load_curves(spec)
    if len(curves) > 1:
        names = ", ".join(c.name for c in curves)
        raise CurveError(f"{spec} has {len(curves)} curves; name one of them as FILE:NAME: {names}")
    return curves[0]


def curves_in(data: object, path: Path) -> Iterator[Curve]:
    """Yield every curve in what a file of that path holds, in its order."""
    if not isinstance(data, dict):
        raise CurveError(f"{path} must hold a JSON object, got {type(data).__name__}")
    meta = data.get("meta", {})
    dataset = data.get("dataset") or meta.get("images", {}).get("folder", "")
    # A table that names its images has its curves one level down.
    for keys, node in _nodes_with_points(data.get("codecs", data), ()):
        name = "/".join(keys) or node.get("name", path.stem)
        results = node.get("results", node)
        yield Curve(
            file=path.name,
            name=name,
            label=node.get("name", keys[-1] if keys else name),
            dataset=dataset or "/".join(keys[:-1]),
            source=node.get("source", path.name),
            results=_checked(results, f"{path}:{name}"),
            is_measured=results is not node,
            meta=meta,
        )


def _nodes_with_points(
    node: dict[str, Any], keys: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield the objects that have points, each with its path of keys."""
    if "bpp" in node.get("results", node):
        yield keys, node
        return
    for key, child in node.items():
        if isinstance(child, dict) and key != "meta":
            yield from _nodes_with_points(child, (*keys, key))


def _checked(results: dict[str, Any], where: str) -> dict[str, list[Any]]:
    """Return the lists of a curve, with metrics by the names that an evaluation gives them."""
    found = {METRICS.get(key, key): v for key, v in results.items() if isinstance(v, list)}
    for key in {"bpp", *METRICS.values()} & found.keys():
        if not all(isinstance(value, int | float) and value > 0 for value in found[key]):
            raise CurveError(f"{key} of {where} must be positive numbers, got {found[key]}")
    if len({len(values) for values in found.values()}) != 1:
        lengths = ", ".join(f"{len(values)} {key}" for key, values in found.items())
        raise CurveError(f"{where} must have as many values of each kind, got {lengths}")
    return found

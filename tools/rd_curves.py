"""Rate-distortion curves out of JSON files.

A curve is named as FILE or FILE:NAME, for instance `anchors.json:kodak/VTM-9.1`.  What is read:

    ours            what tools/eval_rd.py writes: an object per codec, with `results`
    CompressAI's    one object with `name` and `results`
    tables          objects, nested as one likes, that end in `bpp` and `psnr` or `ms-ssim`

NAME is the path of keys to a curve, joined by `/`, or the beginning of one: `anchors.json:kodak` is
every curve below `kodak`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cmamba_ref import CMambaError

# What may stand on the ordinate, both in dB; the keys that it has in files, the first is ours.
METRICS = {
    "psnr": ("psnr-rgb", "psnr"),
    "ms-ssim": ("ms-ssim-rgb", "ms-ssim"),
}
# What an evaluation may say of each point besides: the setting, and seconds per picture.
DETAILS = ("quality", "encoding_time", "decoding_time")


class CurveError(CMambaError, ValueError):
    """A curve cannot be read, or does not allow what was asked of it."""


@dataclass(frozen=True)
class Curve:
    """Rate and distortion of one codec on one set of pictures, means over the pictures.

    Attributes:
        file: the name of the file, without folders.
        name: the path of keys to it in there.
        label: the codec as its file describes it.
        dataset: the pictures, as far as the file says.
        source: where the points come from, as the file says, or the file.
        bpp: bits per pixel.
        qualities: for each metric that the file has, one value per point: PSNR in dB, MS-SSIM
            linear.
        is_measured: whether it is the result of an evaluation, and not of a table.
        details: those of `DETAILS` that the file has, one value per point; None is no setting.
    """

    file: str
    name: str
    label: str
    dataset: str
    source: str
    bpp: tuple[float, ...]
    qualities: dict[str, tuple[float, ...]]
    is_measured: bool = False
    details: dict[str, tuple[float | None, ...]] = field(default_factory=dict)

    def identity(self) -> dict[str, str]:
        """Which curve it is, as JSON holds it."""
        keys = ("file", "name", "label", "dataset", "source")
        return {key: getattr(self, key) for key in keys}

    @property
    def pictures(self) -> str:
        """The dataset in a word, the same for files that describe it at length or in short."""
        return self.dataset.split(",")[0].casefold()

    def points(self, metric: str) -> list[tuple[float, float]]:
        """(bpp, dB) of every point, by rising bpp.

        MS-SSIM goes to dB after the mean over pictures, as the field's plots have it.

        Raises:
            CurveError: the file does not have this metric, or not at all points.
        """
        if metric not in self.qualities:
            raise CurveError(f"{self.label} ({self.source}) has no {metric}")
        values = self.qualities[metric]
        if metric == "ms-ssim":
            values = tuple(ms_ssim_db(value) for value in values)
        return sorted(zip(self.bpp, values, strict=True))


def ms_ssim_db(linear: float) -> float:
    """-10 log10(1 - MS-SSIM), infinite for 1."""
    return math.inf if linear >= 1 else -10 * math.log10(1 - linear)


def load_curves(spec: str) -> list[Curve]:
    """Return the curves that FILE or FILE:NAME stands for, at least one.

    Raises:
        CurveError: no such file, no JSON, no curve of that name, or malformed points.
    """
    path, name = split(spec)
    found = list(curves_in(_read(path), path))
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


def load_with_anchor(specs: Sequence[str], anchor: str | None) -> tuple[list[Curve], Curve | None]:
    """Return all curves, and that of the anchor, which is among them."""
    curves = [curve for spec in specs for curve in load_curves(spec)]
    found = load_curve(anchor) if anchor else None
    if found is not None and found not in curves:
        curves.append(found)
    return curves, found


def load_meta(path: Path) -> dict[str, object]:
    """Return the provenance that an evaluation holds; empty for a table.

    Raises:
        CurveError: no such file, or no JSON.
    """
    data = _read(path)
    meta = data.get("meta") if isinstance(data, dict) else None
    return meta if isinstance(meta, dict) else {}


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise CurveError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise CurveError(f"{path} is not JSON: {error}") from error


def split(spec: str) -> tuple[Path, str]:
    """Return the file and the name that FILE or FILE:NAME stands for; the name may be empty."""
    path, _, name = spec.rpartition(":")
    return (Path(spec), "") if Path(spec).exists() or not path else (Path(path), name)


def curves_in(data: object, path: Path) -> Iterator[Curve]:
    """Return every curve in what a file of that path holds, in its order."""
    if not isinstance(data, dict):
        raise CurveError(f"{path} must hold a JSON object, got {type(data).__name__}")
    dataset = data.get("dataset", "")
    if isinstance(meta := data.get("meta"), dict):
        dataset = meta.get("pictures", {}).get("folder", "")
    # A table that names its images has its curves one level down.
    yield from _below(data.get("codecs", data), (), str(dataset), path)


def _below(node: dict, keys: tuple[str, ...], dataset: str, path: Path) -> Iterator[Curve]:
    results = node.get("results", node)
    if isinstance(results, dict) and isinstance(results.get("bpp"), list):
        yield _curve(node, results, keys, dataset or "/".join(keys[:-1]), path)
        return
    for key, child in node.items():
        if isinstance(child, dict) and key != "meta":
            yield from _below(child, (*keys, key), dataset, path)


def _curve(node: dict, results: dict, keys: tuple[str, ...], dataset: str, path: Path) -> Curve:
    name = "/".join(keys) or str(node.get("name", path.stem))
    where = f"{path}:{name}"

    def numbers(key: str) -> tuple[float, ...]:
        values = results[key]
        if not isinstance(values, list) or not all(
            isinstance(v, int | float) and not math.isnan(v) for v in values
        ):
            raise CurveError(f"{key} of {where} must be a list of numbers")
        if len(values) != len(results["bpp"]):
            raise CurveError(f"{where} has {len(results['bpp'])} rates and {len(values)} {key}")
        return tuple(float(v) for v in values)

    bpp = numbers("bpp")
    if not all(value > 0 for value in bpp):
        raise CurveError(f"bpp of {where} must be positive, got {min(bpp)}")
    keys_of = {m: [k for k in spellings if k in results] for m, spellings in METRICS.items()}
    details = {key: results[key] for key in DETAILS if isinstance(results.get(key), list)}
    return Curve(
        file=path.name,
        name=name,
        label=str(node.get("name", keys[-1] if keys else name)),
        dataset=dataset,
        source=str(node.get("source", path.name)),
        bpp=bpp,
        qualities={metric: numbers(found[0]) for metric, found in keys_of.items() if found},
        is_measured=results is not node,
        details={
            key: tuple(values)
            for key, values in details.items()
            if len(values) == len(bpp) and all(isinstance(v, int | float | None) for v in values)
        },
    )

"""What one process of tools/determinism.py does: code pictures under given settings, and compare.

Functions here run in processes of their own, so what goes in and out can be pickled.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmamba_ref import BitstreamError, CMamba, CMambaError, scan_backend
from cmamba_ref.codec.container import Container
from cmamba_ref.codec.images import read_image
from cmamba_ref.entropy import rans
from cmamba_ref.entropy.gaussian import scale_index
from cmamba_ref.entropy.latent_coder import hyper_latent_shape
from cmamba_ref.entropy.latent_prefix import LatentPrefix, symbols_crc, unpack_latent
from cmamba_ref.model import pad
from cmamba_ref.ops.autocast import without_autocast

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUALITIES = (1, 2.5, 4, 6.3, 8)
# Relative differences are those of values of at least this magnitude: near 0 they say nothing.
LEAST_FOR_RELATIVE = 0.01


@dataclass(frozen=True)
class Setting:
    """Circumstances of coding, none of which may change a symbol.

    Attributes:
        threads: of torch.
        onednn: whether torch may use oneDNN.
        layout: of weights and maps in memory, of `LAYOUTS`.
        backend: of the scans.
        batch: pictures at a time.
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
    """A picture to code: the central `crop` x `crop` pixels of a file, or all of it for None.

    Attributes:
        crop: height and width.
        kept: where its symbols and the baseline's entropy parameters are, a `.npz` file.
    """

    path: Path
    crop: tuple[int, int] | None
    quality: float
    kept: Path


@dataclass(frozen=True)
class Comparison:
    """One setting, to be compared with the baseline on these pictures."""

    model: str
    setting: Setting
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Half:
    """One half of a pair: to encode under one setting, or to decode under another.

    Attributes:
        folder: where the files go, and the pixels that the encoder's side decodes from them.
        other: the setting of the other half.
    """

    model: str
    setting: Setting
    other: Setting
    pictures: tuple[Picture, ...]
    folder: Path


def prepare(threads: int, backend: str) -> None:
    """Set up a fresh process: what holds for the process and not for a call."""
    if backend == "triton" and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
    torch.set_num_threads(threads)


@functools.lru_cache(maxsize=4)
def load_model(source: str, layout: str, weights: str) -> CMamba:
    """The model as a setting wants it."""
    model = CMamba.from_pretrained(source).to(WEIGHTS[weights])
    return model.to(memory_format=LAYOUTS[layout])  # pyright: ignore[reportCallIssue]


@contextmanager
def under(setting: Setting) -> Iterator[None]:
    """What holds for a call: the backend, and oneDNN."""
    if torch.get_num_threads() != setting.threads:
        raise CMambaError(f"torch has {torch.get_num_threads()} threads, not {setting.threads}")
    torch._C._set_mkldnn_enabled(setting.onednn)  # `torch.backends.mkldnn.flags` warns
    try:
        with scan_backend(setting.backend), torch.no_grad():
            yield
    finally:
        torch._C._set_mkldnn_enabled(True)


def read_pixels(picture: Picture) -> np.ndarray:
    """The uint8 pixels `[H, W, 3]` of a picture."""
    pixels = read_image(picture.path)
    if pixels.ndim == 2:
        pixels = np.stack([pixels] * 3, axis=-1)
    if picture.crop is None:
        return pixels
    height, width = (min(a, b) for a, b in zip(picture.crop, pixels.shape[:2], strict=True))
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


# ---------------------------------------------------------------- entropy parameters


def entropy_parameters(
    model: CMamba,
    z_symbols: Tensor,
    symbols_of: Callable[[int, Tensor], Tensor],
    layout: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor, Tensor]:
    """Log-scales and means of every element of y, `[B, M, h, w]`, as a decoder computes them.

    Args:
        z_symbols: int32 `[B, Z, h/4, w/4]`.
        symbols_of: gives the symbols of a slice, from its number and log-scales.
        layout: of z_hat; that of the weights is the model's.
    """
    coder = model.latent_coder
    path, device = coder.float64_modules(), coder.device
    log_scales: list[Tensor] = []
    means: list[Tensor] = []

    def code(i: int, means_: Tensor, log_scales_: Tensor) -> Tensor:
        means.append(means_)
        log_scales.append(log_scales_)
        return symbols_of(i, log_scales_).to(device, torch.float64) + means_

    with torch.no_grad(), without_autocast(device):
        z_hat = z_symbols.to(device, torch.float64) + coder.medians()
        path["context"](path["h_s"](z_hat.contiguous(memory_format=layout)), code)
    return torch.cat(log_scales, dim=1).cpu(), torch.cat(means, dim=1).cpu()


def keep_baseline(comparison: Comparison) -> None:
    """Encode every picture, and keep its symbols and the entropy parameters they are coded with."""
    setting = comparison.setting
    model = load_model(comparison.model, setting.layout, setting.weights)
    with under(setting):
        for picture in comparison.pictures:
            data = encode(model, [picture])[0]
            z, y, log_scales, means = read_symbols(model, data)
            prefix, _ = unpack_latent(Container.unpack(data).y)
            np.savez(picture.kept, z=z, y=y, log_scales=log_scales, means=means, shift=prefix.shift)


def read_symbols(
    model: CMamba, data: bytes
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of a file: symbols of z `[Z, h/4, w/4]` and y, log-scales and means, each `[M, h, w]`.

    Raises:
        BitstreamError: the symbols fail their check.
    """
    container = Container.unpack(data)
    prefix, coded = unpack_latent(container.y)
    rows, columns = hyper_latent_shape(container.height, container.width)
    z_decoder = rans.Decoder(model.entropy_bottleneck.stored.tables(), container.z)
    z = z_decoder.take(model.latent_coder.z_index((rows, columns))).reshape(-1, rows, columns)
    y_decoder = rans.Decoder(model.gaussian_conditional.stored.tables(), coded)
    blocks: list[np.ndarray] = []

    def read(_: int, log_scales: Tensor) -> Tensor:
        index = scale_index(log_scales, prefix.shift).to("cpu", torch.int32).numpy()
        blocks.append(y_decoder.take(index.ravel()).reshape(index.shape))
        return torch.from_numpy(blocks[-1])

    log_scales, means = entropy_parameters(model, torch.from_numpy(z)[None], read)
    _check_symbols(prefix, [z, *blocks])
    y = np.concatenate(blocks, axis=1)[0]
    return z, y, log_scales[0].numpy(), means[0].numpy()


def _check_symbols(prefix: LatentPrefix, blocks: Sequence[np.ndarray]) -> None:
    if symbols_crc([block.ravel() for block in blocks]) != prefix.crc:
        raise BitstreamError("the decoded symbols fail their check")


def compare(comparison: Comparison) -> dict[str, float]:
    """Entropy parameters from the same symbols under another setting, beside the baseline's.

    Returns:
        how many indexes were compared, and how many differ; the largest differences of log-scales
        and means, absolute and relative (of values of at least `LEAST_FOR_RELATIVE`).
    """
    setting = comparison.setting
    model = load_model(comparison.model, setting.layout, setting.weights)
    found = {"pictures": 0, "indexes": 0, "differing_indexes": 0}
    worst = dict.fromkeys(
        ["ln_scale_absolute", "ln_scale_relative", "mean_absolute", "mean_relative"], 0.0
    )
    baselines = [dict(np.load(picture.kept)) for picture in comparison.pictures]
    for kept in _batches(baselines, setting.batch):
        z = torch.from_numpy(np.stack([k["z"] for k in kept]))
        slices = torch.from_numpy(np.stack([k["y"] for k in kept])).split(
            model.config.slice_widths, dim=1
        )

        def known(i: int, _: Tensor, slices: Sequence[Tensor] = slices) -> Tensor:
            return slices[i]

        with under(setting):
            log_scales, means = entropy_parameters(model, z, known, LAYOUTS[setting.layout])
        for b, baseline in enumerate(kept):
            shift = int(baseline["shift"])
            expected = torch.from_numpy(baseline["log_scales"])
            differ = scale_index(log_scales[b], shift) != scale_index(expected, shift)
            found["pictures"] += 1
            found["indexes"] += differ.numel()
            found["differing_indexes"] += int(differ.sum())
            for name, values in (("ln_scale", log_scales[b]), ("mean", means[b])):
                key = "log_scales" if name == "ln_scale" else "means"
                absolute, relative = _largest(values, torch.from_numpy(baseline[key]))
                worst[f"{name}_absolute"] = max(worst[f"{name}_absolute"], absolute)
                worst[f"{name}_relative"] = max(worst[f"{name}_relative"], relative)
    return {**found, **worst}


def _largest(values: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest absolute and relative difference; infinite where a value is not finite."""
    difference = (values - expected).abs().nan_to_num(nan=torch.inf)
    relative = difference / expected.abs().clamp(min=LEAST_FOR_RELATIVE)
    return float(difference.max()), float(relative.max())


def _batches(
    baselines: Sequence[dict[str, np.ndarray]], size: int
) -> Iterator[list[dict[str, np.ndarray]]]:
    """Latents of one shape, so many at a time; the last ones are filled up with the first."""

    def shape(baseline: dict[str, np.ndarray]) -> tuple[int, ...]:
        return baseline["z"].shape

    for _, same in groupby(sorted(baselines, key=shape), key=shape):
        group = list(same)
        for start in range(0, len(group), size):
            yield [group[i % len(group)] for i in range(start, start + size)]


# ---------------------------------------------------------------- files


def encode(model: CMamba, pictures: Sequence[Picture]) -> list[bytes]:
    """Code pictures of one size and quality as one batch; a file of each."""
    pixels = np.stack([read_pixels(picture) for picture in pictures])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    y_strings, z_strings = model.compress(pad(x), pictures[0].quality)["strings"]
    height, width = x.shape[-2:]
    return [
        Container(model.model_id, width, height, False, y, z).pack()
        for y, z in zip(y_strings, z_strings, strict=True)
    ]


def decode(model: CMamba, files: Sequence[bytes]) -> np.ndarray:
    """Decode files of one size as one batch, uint8 `[B, H, W, 3]`.

    Raises:
        BitstreamError: the symbols of one fail their check.
    """
    containers = [Container.unpack(data) for data in files]
    height, width = containers[0].height, containers[0].width
    strings = [[c.y for c in containers], [c.z for c in containers]]
    x_hat = model.decompress(strings, hyper_latent_shape(height, width))["x_hat"]
    x_hat = x_hat[..., :height, :width].float()
    return (x_hat * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()


def write_half(half: Half) -> int:
    """Encode, and decode under the same setting but for the type of weights, which is the other's.

    What bfloat16 does to the picture is not in question here, so both sides decode with one type.

    Returns:
        the number of bytes of all files.
    """
    size, files = half.setting.batch, []
    model = load_model(half.model, half.setting.layout, half.setting.weights)
    with under(half.setting):
        for start in range(0, len(half.pictures), size):
            files += encode(model, half.pictures[start : start + size])
        model = load_model(half.model, half.setting.layout, half.other.weights)
        decoded = [decode(model, files[i : i + size]) for i in range(0, len(files), size)]
    for i, data in enumerate(files):
        (half.folder / f"{i}.cmb").write_bytes(data)
    np.save(half.folder / "decoded.npy", np.concatenate(decoded))
    return sum(map(len, files))


def read_half(half: Half) -> dict[str, int]:
    """Decode what `write_half` wrote, and compare.

    Returns:
        files, how many of them fail the check of their symbols, values of pixels of the others, how
        many of these differ, and by how much at the most.
    """
    files = [(half.folder / f"{i}.cmb").read_bytes() for i in range(len(half.pictures))]
    expected = np.load(half.folder / "decoded.npy").astype(int)
    found = {"files": len(files), "files_with_other_symbols": 0}
    found |= {"values": 0, "differing_values": 0, "largest_difference": 0}
    model = load_model(half.model, half.setting.layout, half.setting.weights)
    size = half.setting.batch
    with under(half.setting):
        for start in range(0, len(files), size):
            try:
                decoded = decode(model, files[start : start + size])
            except BitstreamError:
                found["files_with_other_symbols"] += size
                continue
            difference = np.abs(decoded.astype(int) - expected[start : start + size])
            found["values"] += difference.size
            found["differing_values"] += int((difference > 0).sum())
            found["largest_difference"] = max(found["largest_difference"], int(difference.max()))
    return found

"""Peak memory of coding an image on the CPU: estimate and limit.

Feature maps dominate. A transform holds, at each of its scales, the input and the output
of a block and what a block needs as a whole in between (`cmamba_ref.nn.tiled`); the coding path
holds the latent in float64, with what the slices see of each other. The largest of these moments is
the peak.
"""

from __future__ import annotations

import os
from pathlib import Path

from cmamba_ref.codec import refinement
from cmamba_ref.codec.refinement import STRIDE
from cmamba_ref.config import CMambaConfig
from cmamba_ref.errors import MemoryLimitError
from cmamba_ref.nn import tiled

GIB = 2**30
FLOAT, DOUBLE = 4, 8
# Floats per pixel of images: the one that is coded, the same padded, and its bytes before and
# after.
IMAGE_FLOATS = 3 * 2 + 2
# Maps that are at work on one strip at a time: of the block's channels and of those of its scan.
STRIP_MAPS = 6
# Latents in float64 that are held beside the context: y, y_bar, both halves of Phi', symbols,
# scales, and what is made of them one after the other.
LATENTS = 8
# Maps of each stage that a refinement keeps of one tile for its gradients.
REFINED_MAPS = 24


def predict(config: CMambaConfig, height: int, width: int, *, refined: bool = False) -> int:
    """Return the peak bytes that encoding or decoding one image takes, beside model and program.

    On the CPU, in float32 and with the default scans; another type, autocast or another backend
    takes more. Measured peaks are in benchmarks/cpu.md.

    Args:
        refined: encoding with an effort above 0.
    """
    positions = (-(-height // 64) * 64) * (-(-width // 64) * 64)
    image = FLOAT * IMAGE_FLOATS * positions
    moments = []
    before = 3 * positions
    for channels, has_scan in zip(config.widths, config.stages_with_scan, strict=True):
        positions //= 4
        inner = round(config.ssm_ratio * channels) if has_scan else channels
        at_work = STRIP_MAPS * (channels + inner) * min(positions, tiled.STRIP_POSITIONS)
        moments.append(before + channels * positions)
        moments.append((2 * channels + inner) * positions + at_work)
        before = channels * positions
    transforms = FLOAT * max(moments)

    positions //= 4
    context = 3 * config.latent_channels  # Phi' and all slices but for one
    convolved = context + 2 * max(config.lrp_widths)  # padded, and before and after a function
    coding = DOUBLE * (LATENTS * config.latent_channels + context + convolved) * positions
    if not refined:
        return image + max(transforms, coding)

    tile = refinement.largest_window(-(-height // 64) * 4, -(-width // 64) * 4)
    stages = zip(config.depths, config.widths, (4, 16, 64), strict=True)
    maps = sum(depth * channels / area for depth, channels, area in stages)
    refining = round(FLOAT * REFINED_MAPS * maps * tile)
    # Meanwhile there are the encoder's symbols, and an image with its errors.
    held = (DOUBLE * LATENTS * config.latent_channels + FLOAT * 6 * STRIDE**2) * positions
    return image + max(transforms, coding, refining) + held


def available() -> int | None:
    """Return the bytes that this process may still take, as Linux says; None where it does not.

    Only the control group of a container is read, which appears as the root inside it.
    """
    found = []
    for line in _lines("/proc/meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            found.append(int(value.split()[0]) * 1024)
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0] != "max":
        # Cached files count as used, and give way.
        counts = dict(line.split() for line in _lines("/sys/fs/cgroup/memory.stat"))
        cached = int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))
        found.append(max(int(limit[0]) - int(used[0]) + cached, 0))
    return min(found, default=None)


def check(
    config: CMambaConfig, height: int, width: int, max_memory: int | None, *, refined: bool = False
) -> None:
    """Refuse an image before any work if it will take too much.

    Args:
        refined: as for `predict`.
        max_memory: bytes; None for what is available, as far as that can be found out.

    Raises:
        MemoryLimitError: it will.
    """
    limit = available() if max_memory is None else max_memory
    needed = predict(config, height, width, refined=refined)
    if limit is not None and needed > limit:
        source = "are available" if max_memory is None else "are allowed"
        raise MemoryLimitError(
            f"{width}x{height} pixels take about {_in_words(needed)} with {config.name!r}, and "
            f"{_in_words(limit)} {source}; raise `max_memory` to override, "
            "or take a smaller model or a smaller image"
        )


def _in_words(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def _lines(path: str | os.PathLike) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []

"""Damage to files, by chance: what the tests of hostile files and `tools/fuzz.py` both do to them.

Each function takes the bytes of something sound, or of something damaged before, and a generator,
and returns other bytes.  `begin` spares what lies before it, where damage would go no further.
"""

import struct
from collections.abc import Sequence

import numpy as np
from codec_helpers import HEADER_BYTES, with_checksum, with_field

# Of pictures: nothing, sides around one position of z, and those at which arithmetic may wrap.
SIZES = (0, 1, 63, 64, 65, 500, 9_999, 10_000, 65_535, 2**20, 2**31 - 1, 2**31, 2**32 - 1)
# Where the model's id ends: a file damaged before that is refused by name.
BEHIND_ID = 14


def flip_bits(data: bytes, rng: np.random.Generator) -> bytes:
    """From one to dozens of bits turned over."""
    changed = np.frombuffer(data, np.uint8).copy()
    for bit in rng.integers(0, 8 * len(data), rng.integers(1, 40)):
        changed[bit // 8] ^= 1 << bit % 8
    return changed.tobytes()


def truncate(data: bytes, rng: np.random.Generator) -> bytes:
    """The beginning, of any length."""
    return data[: rng.integers(len(data))]


def splice(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """The beginning of another one, and the rest of this one."""
    cut = int(rng.integers(min(len(data), len(other))))
    return other[:cut] + data[cut:]


def resize(data: bytes, rng: np.random.Generator) -> bytes:
    """A .cmb file that declares another size, with its checksum made right."""
    data = with_field(data, "width", int(rng.choice(SIZES)))
    return with_field(data, "height", int(rng.choice(SIZES)))


def overwrite(data: bytes, rng: np.random.Generator, begin: int = 0) -> bytes:
    """A few bytes replaced."""
    changed = np.frombuffer(data, np.uint8).copy()
    places = rng.integers(begin, len(data), rng.integers(1, 8))
    changed[places] = rng.integers(0, 256, len(places))
    return changed.tobytes()


def take_out_or_put_in(data: bytes, rng: np.random.Generator, begin: int = 0) -> bytes:
    """A piece removed, noise in its place."""
    cut, end = sorted(rng.integers(begin, len(data), 2))
    return data[:cut] + rng.bytes(int(rng.integers(0, 50))) + data[end:]


def write_extreme(data: bytes, rng: np.random.Generator, begin: int = 0) -> bytes:
    """A little-endian number of 1 to 8 bytes replaced by 0, 1, or one beside its type's ends."""
    size = int(rng.choice([1, 2, 4, 8]))
    if len(data) < begin + size:
        return data
    top = 2 ** (8 * size)
    value = int(rng.choice(np.array([0, 1, top // 2 - 1, top // 2, top - 2, top - 1], object)))
    place = int(rng.integers(begin, len(data) - size + 1))
    return data[:place] + value.to_bytes(size, "little") + data[place + size :]


def damage(data: bytes, files: Sequence[bytes], kind: int, rng: np.random.Generator) -> bytes:
    """A sound .cmb file, damaged in the `kind`-th of six ways; its checksum may be wrong."""
    if kind == 0:
        return flip_bits(data, rng)
    if kind == 1:
        return truncate(data, rng)
    if kind == 2:
        return splice(data, files[rng.integers(len(files))], rng)
    if kind == 3:
        return resize(data, rng)
    if kind == 4:  # where damage goes deepest
        return overwrite(data, rng, BEHIND_ID)
    return take_out_or_put_in(data, rng, HEADER_BYTES)


def damage_again(
    data: bytes, others: Sequence[bytes], rng: np.random.Generator, begin: int = 0
) -> bytes:
    """Anything, of any format, damaged in one more way."""
    if len(data) <= begin + 1:
        return data + rng.bytes(8)
    ways = (
        lambda: flip_bits(data, rng),
        lambda: truncate(data, rng),
        lambda: splice(data, others[rng.integers(len(others))] or data, rng),
        lambda: overwrite(data, rng, begin),
        lambda: take_out_or_put_in(data, rng, begin),
        lambda: write_extreme(data, rng, begin),
    )
    return ways[rng.integers(len(ways))]()


def completed(data: bytes) -> bytes:
    """A .cmb file with the checksum of what it holds; of what is shorter than one, itself."""
    return with_checksum(data[:-4]) if len(data) > struct.calcsize("<I") else data

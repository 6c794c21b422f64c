"""Integer probability tables: what the encoder and the decoder must share to the last bit.

The entropy coder never sees a floating-point probability. Each distribution is a table of integer
frequencies that sum to 2**16; the tables are computed once, after training, and stored with the
weights. A decoder never rebuilds them, because an `erfc` that differs in the last bit could move
one frequency by one, and one such difference destroys the rest of a stream.

Glossary: a *table* is one distribution; its *entries* are consecutive integer symbols, followed by
one *escape* entry that stands for every integer outside the table; an entry's *frequency* is its
probability times 2**16.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cmamba_ref.errors import InvalidArgumentError, WeightsError

PRECISION = 16
"""Every table's cumulative frequencies run from 0 to 2**PRECISION."""

TOTAL = 1 << PRECISION

MAX_TABLES = 4096
"""A decoder may hold 128 kB of lookup per table, so the number of tables bounds its memory."""

_INT32 = np.iinfo(np.int32)


@dataclass(frozen=True, eq=False)
class CdfTables:
    """T integer distributions of different lengths, stored back to back. Treated as immutable.

    Table t is `cdf[starts[t]:starts[t + 1]]`: E + 1 cumulative frequencies for E entries, strictly
    increasing from 0 to 65536. Entry e < E - 1 is the symbol `offsets[t] + e`; the last entry is
    the escape, so a table holds E - 1 symbols and E is at least 2.

    Attributes:
        cdf: cumulative frequencies of all tables, int32 `[total]`.
        starts: where each table begins in `cdf`, and the total length, int32 `[T + 1]`.
        offsets: the symbol value of each table's entry 0, int32 `[T]`.

    Equality is identity (`eq=False`): a table set is large, and caches are keyed by the object.
    """

    cdf: np.ndarray
    starts: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        """The number of tables, T."""
        return len(self.offsets)

    @property
    def symbol_counts(self) -> np.ndarray:
        """Symbols in each table, the escape not counted, int64 `[T]`."""
        return np.diff(self.starts.astype(np.int64)) - 2

    def frequencies(self) -> np.ndarray:
        """Frequency of the entry that begins at each position of `cdf`, int64 `[total]`.

        The closing 65536 of a table begins no entry; its place holds 0, so that positions in this
        array and in `cdf` agree.
        """
        following = np.append(self.cdf[1:], 0).astype(np.int64)
        frequency = following - self.cdf
        frequency[self.starts[1:] - 1] = 0
        return frequency

    def cheapest_bits(self) -> np.ndarray:
        """Cost in bits of each table's cheapest entry, float64 `[T]`.

        A block of symbols cannot take fewer bits than the sum of this over its table indexes,
        which bounds a payload from below before anything is allocated.
        """
        most_frequent = np.maximum.reduceat(self.frequencies(), self.starts[:-1])
        return PRECISION - np.log2(most_frequent)

    def validate(self) -> None:
        """Check everything that the coder relies on; call it once on tables that come from a file.

        Raises:
            WeightsError: the tables are malformed; the message names the first reason found.
        """
        for name in ("cdf", "starts", "offsets"):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != np.int32 or array.ndim != 1:
                kind = f"{getattr(array, 'dtype', type(array).__name__)}"
                raise WeightsError(
                    f"tables: `{name}` must be a one-dimensional int32 array, got {kind} of shape "
                    f"{getattr(array, 'shape', None)}"
                )
        count = len(self.offsets)
        if not 1 <= count <= MAX_TABLES:
            raise WeightsError(f"tables: there must be 1 to {MAX_TABLES} tables, got {count}")
        if len(self.starts) != count + 1:
            raise WeightsError(
                f"tables: `starts` must have one element more than `offsets`, "
                f"got {len(self.starts)} for {count}"
            )
        if self.starts[0] != 0 or self.starts[-1] != len(self.cdf):
            raise WeightsError(
                f"tables: `starts` must run from 0 to {len(self.cdf)}, the length of `cdf`, "
                f"got {self.starts[0]} to {self.starts[-1]}"
            )
        lengths = np.diff(self.starts.astype(np.int64))
        # Two entries are the least that lets a table hold a symbol beside its escape.
        if lengths.min() < 3 or lengths.max() > TOTAL + 1:
            bad = int(np.flatnonzero((lengths < 3) | (lengths > TOTAL + 1))[0])
            raise WeightsError(
                f"tables: each table must have 3 to {TOTAL + 1} cumulative frequencies, "
                f"got {lengths[bad]} in table {bad}"
            )
        first, last = self.cdf[self.starts[:-1]], self.cdf[self.starts[1:] - 1]
        if (first != 0).any() or (last != TOTAL).any():
            bad = int(np.flatnonzero((first != 0) | (last != TOTAL))[0])
            raise WeightsError(
                f"tables: each table must run from 0 to {TOTAL}, "
                f"got {first[bad]} to {last[bad]} in table {bad}"
            )
        # In int64, because the difference of two hostile int32 values may wrap around.
        rising = np.diff(self.cdf.astype(np.int64)) > 0
        rising[self.starts[1:-1] - 1] = True  # between two tables it falls back to 0
        if not rising.all():
            bad = int(np.searchsorted(self.starts, np.argmin(rising), side="right")) - 1
            raise WeightsError(f"tables: table {bad} is not strictly increasing")
        highest = self.offsets.astype(np.int64) + self.symbol_counts - 1
        if highest.max() > _INT32.max:
            bad = int(np.argmax(highest))
            raise WeightsError(
                f"tables: symbols must fit int32, but table {bad} reaches {highest[bad]}"
            )


def quantise_pmf(pmf: Sequence[float] | np.ndarray, escape_mass: float) -> np.ndarray:
    """Turn probabilities into integer frequencies that sum to 65536, none of them zero.

    The frequencies are first rounded; then single units are given or taken where that changes the
    expected code length least, until the sum is right. One unit more or less on an entry of
    probability p and frequency f changes the expected length by p·log2(1 ± 1/f), whose order is
    that of p / (f ± ½): Webster's rule for sharing out seats by votes, here with at least one seat
    for everybody. Only exactly rounded operations decide (no logarithm), so that equal
    probabilities give equal tables on every machine.

    Args:
        pmf: probability of each symbol `[S]`, finite, not negative; need not be normalised.
        escape_mass: probability of all other integers together, on the same scale as `pmf`.

    Returns:
        Cumulative frequencies, int32 `[S + 2]`, from 0 to 65536; the last entry is the escape.

    Raises:
        InvalidArgumentError: no symbols, too many, or masses that are no distribution.
    """
    mass = np.append(np.asarray(pmf, dtype=np.float64).ravel(), float(escape_mass))
    if not 2 <= len(mass) <= TOTAL:
        raise InvalidArgumentError(
            f"`pmf` must hold 1 to {TOTAL - 1} probabilities, got {len(mass) - 1}"
        )
    if not np.isfinite(mass).all() or mass.min() < 0 or not 0 < mass.sum() < math.inf:
        raise InvalidArgumentError(
            "`pmf` and `escape_mass` must be finite, not negative and not all zero, "
            f"got values from {mass.min()} to {mass.max()}"
        )
    mass /= math.fsum(mass)  # the exactly rounded sum does not depend on the order of adding
    frequency = np.maximum(np.rint(mass * TOTAL), 1).astype(np.int64)

    surplus = int(frequency.sum()) - TOTAL
    step = -1 if surplus > 0 else 1
    # Taking wants the smallest p / (f - ½), giving the largest p / (f + ½); heapq pops the
    # smallest, hence the sign. Ties go to the lower index.
    heap = [
        (-step * p / (f + step / 2), i)
        for i, (p, f) in enumerate(zip(mass.tolist(), frequency.tolist(), strict=True))
        if f + step >= 1
    ]
    heapq.heapify(heap)
    for _ in range(abs(surplus)):
        _, i = heapq.heappop(heap)
        frequency[i] += step
        if frequency[i] + step >= 1:
            heapq.heappush(heap, (-step * mass[i] / (frequency[i] + step / 2), i))
    return np.concatenate([[0], np.cumsum(frequency)]).astype(np.int32)


def tables_from_pmfs(pmfs: Iterable[tuple[int, Sequence[float] | np.ndarray, float]]) -> CdfTables:
    """Build one table per distribution.

    Args:
        pmfs: for each table the symbol value of its first probability, the probabilities `[S_t]`,
            and the mass of all integers outside them; see `quantise_pmf`.

    Raises:
        InvalidArgumentError: a distribution is malformed, or there is none.
    """
    offsets, cdfs = [], []
    for offset, pmf, tail_mass in pmfs:
        offsets.append(offset)
        cdfs.append(quantise_pmf(pmf, tail_mass))
    if not 1 <= len(cdfs) <= MAX_TABLES:
        raise InvalidArgumentError(
            f"`pmfs` must hold 1 to {MAX_TABLES} distributions, got {len(cdfs)}"
        )
    for t, (offset, cdf) in enumerate(zip(offsets, cdfs, strict=True)):
        if not _INT32.min <= offset <= _INT32.max - (len(cdf) - 3):
            raise InvalidArgumentError(
                f"`pmfs` must cover int32 symbols only, got offset {offset} for table {t}"
            )
    return CdfTables(
        cdf=np.concatenate(cdfs),
        starts=np.cumsum([0, *map(len, cdfs)]).astype(np.int32),
        offsets=np.array(offsets, dtype=np.int32),
    )


def gaussian_tables(scales: Sequence[float] | np.ndarray, tail_sigmas: float = 4.4) -> CdfTables:
    """Zero-mean Gaussians of the given scales, integrated over bins of width one.

    P(k) = Phi((k + ½) / scale) - Phi((k - ½) / scale) for |k| <= R (Ballé et al. 2018, eq. 5 at
    integer k, the mean being subtracted before rounding), the rest is the escape's. R is about
    `tail_sigmas` scales: at 4.4 the mass beyond is 1.1e-5, just under the smallest probability
    that 16 bits can express, so a wider table would spend frequencies on symbols that never come.

    Args:
        scales: standard deviations `[T]`, finite, positive, in units of the quantisation step.
        tail_sigmas: half-width of the support in standard deviations; R is at least 1.

    Raises:
        InvalidArgumentError: a scale or `tail_sigmas` is out of range.
    """
    scale_list = [float(s) for s in np.asarray(scales, dtype=np.float64).ravel()]
    if not (math.isfinite(tail_sigmas) and tail_sigmas > 0):
        raise InvalidArgumentError(f"`tail_sigmas` must be positive, got {tail_sigmas}")
    for scale in scale_list:
        if not (math.isfinite(scale) and 0 < scale * tail_sigmas < TOTAL / 4):
            raise InvalidArgumentError(
                f"`scales` must be positive and below {TOTAL / 4 / tail_sigmas:.0f} "
                f"(a table has at most {TOTAL} entries), got {scale}"
            )
    return tables_from_pmfs(_gaussian_pmf(scale, tail_sigmas) for scale in scale_list)


def fitted_tables(
    scales: Sequence[float] | np.ndarray,
    counts: np.ndarray,
    weight: float = 200.0,
    tail_sigmas: float = 4.4,
) -> CdfTables:
    """Zero-mean distributions that were counted, blended with the Gaussians of `gaussian_tables`.

    P(k) is (n_k / 2 + weight G(k)) / (n + weight), k != 0, with n_k of n symbols of magnitude |k|
    and the Gaussian's mass G(k): what a prior of `weight` symbols makes of the counts (our choice).
    A table reaches as far as `gaussian_tables` lets it, or to the largest magnitude that was
    counted more than once in 2**16 symbols, if that is further.

    Args:
        scales: standard deviations `[T]` in units of the quantisation step.
        counts: for each scale how many symbols had each magnitude `[T, K + 1]`; the last column
            counts K and all above.
        weight: symbols that the Gaussian counts for, positive.
        tail_sigmas: as in `gaussian_tables`.

    Raises:
        InvalidArgumentError: counts or `weight` are out of range, or do not fit the scales.
    """
    counts = np.asarray(counts, dtype=np.float64)
    if counts.ndim != 2 or len(counts) != len(scales) or counts.shape[1] < 2 or counts.min() < 0:
        raise InvalidArgumentError(
            f"`counts` must be [{len(scales)}, K + 1] and not negative, got "
            f"{list(counts.shape)}; count magnitudes for each scale"
        )
    if not (math.isfinite(weight) and weight > 0):
        raise InvalidArgumentError(f"`weight` must be positive, got {weight}")
    return tables_from_pmfs(
        _fitted_pmf(float(scale), n, weight, tail_sigmas)
        for scale, n in zip(scales, counts, strict=True)
    )


def _fitted_pmf(
    scale: float, n: np.ndarray, weight: float, tail_sigmas: float
) -> tuple[int, np.ndarray, float]:
    """Offset, pmf `[2 R + 1]` and tail mass, as `tables_from_pmfs` takes them."""
    often = np.flatnonzero(n[:-1] * TOTAL > n.sum())
    radius = max(_radius(scale, tail_sigmas), int(often.max(initial=0)))
    offset, pmf, tail = _gaussian_pmf(scale, tail_sigmas, radius)
    inside = np.zeros(radius + 1)
    within = min(radius + 1, len(n) - 1)  # the last column has no magnitude of its own
    inside[:within] = n[:within]
    one_side = inside[1:] / 2
    counted = np.concatenate([one_side[::-1], inside[:1], one_side])
    return offset, counted + weight * pmf, n.sum() - inside.sum() + weight * tail


def _radius(scale: float, tail_sigmas: float) -> int:
    return max(1, math.ceil(scale * tail_sigmas - 0.5))


def _gaussian_pmf(
    scale: float, tail_sigmas: float, radius: int = 0
) -> tuple[int, np.ndarray, float]:
    """Offset, pmf `[2 R + 1]` and tail mass of one Gaussian, as `tables_from_pmfs` takes them."""
    radius = max(radius, _radius(scale, tail_sigmas))
    # beyond[k] is the mass of both tails outside ±(k + ½). Differences of erfc, unlike those of
    # Phi, keep their relative accuracy far from the centre; mirroring makes the table symmetric.
    beyond = np.array([math.erfc((k + 0.5) / (scale * math.sqrt(2))) for k in range(radius + 1)])
    one_side = (beyond[:-1] - beyond[1:]) / 2
    pmf = np.concatenate([one_side[::-1], [1 - beyond[0]], one_side])
    return -radius, pmf, float(beyond[-1])

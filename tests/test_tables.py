"""Integer CDF tables: exactness, closeness to the densities, and refusal of malformed input."""

import hashlib
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmamba_ref.entropy.tables import (
    TOTAL,
    CdfTables,
    fitted_tables,
    gaussian_tables,
    quantise_pmf,
    tables_from_pmfs,
)
from cmamba_ref.errors import InvalidArgumentError, WeightsError

SCALES = np.exp(np.linspace(math.log(0.11), math.log(256), 64))

masses = st.floats(0, 1e6, allow_subnormal=False)
pmfs = st.lists(masses, min_size=1, max_size=300).filter(lambda pmf: sum(pmf) > 0)


def frequencies_of(tables: CdfTables, t: int) -> np.ndarray:
    return np.diff(tables.cdf[tables.starts[t] : tables.starts[t + 1]].astype(np.int64))


def expected_bits(mass: np.ndarray, frequency: np.ndarray) -> float:
    return float(mass @ (16 - np.log2(frequency)))


@given(pmfs, masses)
def test_quantised_frequencies_are_positive_and_complete(pmf, escape_mass):
    cdf = quantise_pmf(pmf, escape_mass)
    assert cdf.dtype == np.int32 and len(cdf) == len(pmf) + 2
    assert cdf[0] == 0 and cdf[-1] == TOTAL and (np.diff(cdf) > 0).all()


@given(pmfs, masses)
def test_quantisation_is_locally_optimal(pmf, escape_mass):
    mass = np.append(pmf, escape_mass) / math.fsum([*pmf, escape_mass])
    frequency = np.diff(quantise_pmf(pmf, escape_mass)).astype(float)
    gain = mass * np.log2((frequency + 1) / frequency)
    takeable = frequency > 1
    loss = mass[takeable] * np.log2(frequency[takeable] / (frequency[takeable] - 1))
    # p / (f ± ½) stands for the logarithm and is at most 6 % off, for f = 1.
    assert gain.max() <= 1.06 * loss.min(initial=np.inf) + 1e-15


def shared_out(mass: np.ndarray) -> np.ndarray:
    """Webster's rule as `quantise_pmf` words it, unit by unit, over all entries each time."""
    frequency = np.maximum(np.rint(mass * TOTAL), 1)
    while frequency.sum() > TOTAL:
        cost = np.where(frequency > 1, mass / (frequency - 0.5), np.inf)
        frequency[np.argmin(cost)] -= 1
    while frequency.sum() < TOTAL:
        frequency[np.argmax(mass / (frequency + 0.5))] += 1
    return frequency


@given(st.integers(0, 2**32 - 1), st.integers(1, 3000), st.sampled_from([0.2, 1.0, 4.0]))
def test_units_move_where_they_cost_least(seed, count, spread):
    mass = np.exp(spread * np.random.default_rng(seed).normal(size=count + 1))
    mass /= math.fsum(mass)
    expected = shared_out(mass)
    assert np.array_equal(np.diff(quantise_pmf(mass[:-1], mass[-1])), expected)


def test_quantising_a_representable_distribution_is_exact():
    frequency = np.array([1, 30000, 20000, 535, 15000])
    cdf = quantise_pmf(frequency[:-1] / TOTAL, frequency[-1] / TOTAL)
    assert np.diff(cdf).tolist() == frequency.tolist()


def test_quantising_many_improbable_symbols_takes_from_the_frequent_ones():
    pmf = np.full(40001, 1e-12)
    pmf[20000] = 1.0
    frequency = np.diff(quantise_pmf(pmf, 0.0))
    assert frequency[20000] == TOTAL - 40001 and (np.delete(frequency, 20000) == 1).all()


def test_frequencies_stay_at_least_one():
    # 30,000 symbols that need their one unit, 25,205 and the escape with 2.6 units each.
    pmf = np.append(np.zeros(30_000), np.full(25_205, 2.6))
    frequency = np.diff(quantise_pmf(pmf, 2.6))
    assert frequency.sum() == TOTAL and (frequency[:30_000] == 1).all()
    assert set(frequency[30_000:]) == {1, 2}
    # Here 1,000 symbols of 1.5 units are down to one long before the large one has given enough.
    pmf = np.concatenate([np.zeros(50_000), np.full(1_000, 1.5), [64_036]])
    frequency = np.diff(quantise_pmf(pmf, 0.0))
    assert (np.delete(frequency, 51_000) == 1).all() and frequency[51_000] == TOTAL - 51_001


@pytest.mark.parametrize(
    ("pmf", "escape_mass"),
    [
        ([], 0.5),
        ([0.0, 0.0], 0.0),
        ([0.5, -0.1], 0.1),
        ([0.5, math.nan], 0.1),
        ([0.5], math.inf),
        ([1.0], -1e-9),
        (np.full(TOTAL, 1e-5), 0.0),
        ([1e308, 1e308], 0.0),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in reduce")
def test_invalid_distributions_are_refused(pmf, escape_mass):
    with pytest.raises(InvalidArgumentError, match="`pmf`"):
        quantise_pmf(pmf, escape_mass)


def test_gaussian_tables_agree_with_an_independent_integration():
    tables = gaussian_tables(SCALES)
    tables.validate()
    assert len(tables) == 64 and len(tables.cdf) < 20_000
    for t, scale in enumerate(SCALES):
        radius = -int(tables.offsets[t])
        frequency = frequencies_of(tables, t)
        assert len(frequency) == 2 * radius + 2
        assert radius == max(1, math.ceil(4.4 * scale - 0.5))
        phi = NormalDist(0, scale).cdf
        k = np.arange(-radius, radius + 1)
        mass = np.array([phi(v + 0.5) - phi(v - 0.5) for v in k])
        mass = np.append(mass, 2 * phi(-radius - 0.5))
        # The excess over the entropy is at most 0.01 bit for the widest table (which cannot go
        # below 1/65536 in its tails), far less for the others.
        some = mass > 0
        excess = expected_bits(mass, frequency) + float(mass[some] @ np.log2(mass[some]))
        assert excess < 0.01, f"scale {scale}: {excess} bits"
        symmetric = np.abs(frequency[:-1] - frequency[-2::-1])
        assert symmetric.max() <= 1, f"scale {scale}"


def test_gaussian_tables_are_pinned():
    """The tables that every model is published with; a change makes new streams, so it is noticed.

    `math.erfc` may differ between systems by an ulp. That moves a frequency only if a probability
    lies that close to a rounding boundary, which the first half of this test excludes.
    """
    for scale in SCALES:
        radius = max(1, math.ceil(4.4 * scale - 0.5))
        beyond = [math.erfc((k + 0.5) / (scale * math.sqrt(2))) for k in range(radius + 1)]
        mass = np.append(-np.diff(beyond) / 2, [beyond[-1], 1 - beyond[0]]) * TOTAL
        assert np.abs(mass - np.floor(mass) - 0.5).min() > 1e-9
    tables = gaussian_tables(SCALES)
    content = b"".join(a.astype("<i4").tobytes() for a in (tables.cdf, tables.offsets))
    assert hashlib.sha256(content).hexdigest()[:16] == "0602d120e986de92"


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, 1e5])
def test_impossible_scales_are_refused(scale):
    with pytest.raises(InvalidArgumentError, match="`scales`"):
        gaussian_tables([1.0, scale])


@pytest.mark.parametrize("sigmas", [0.0, -0.5, math.nan, math.inf])
def test_an_impossible_support_is_refused(sigmas):
    with pytest.raises(InvalidArgumentError, match="`tail_sigmas` must be positive"):
        gaussian_tables([1.0], sigmas)


def test_widest_promised_table():
    """A quarter of 65536 on either side: every other one of the units is left for the shape."""
    gaussian_tables([16_383.9], tail_sigmas=1.0).validate()
    with pytest.raises(InvalidArgumentError, match="`scales` must be positive and below 16384"):
        gaussian_tables([16_384.0], tail_sigmas=1.0)


def test_a_narrow_support_is_one_symbol_on_either_side():
    tables = gaussian_tables([1.0], tail_sigmas=0.01)
    assert tables.offsets.tolist() == [-1] and tables.symbol_counts.tolist() == [3]


def test_extreme_but_possible_scales():
    tables = gaussian_tables([1e-300, 1e-3, 3000.0])
    tables.validate()
    assert frequencies_of(tables, 0).tolist() == [1, TOTAL - 3, 1, 1]


def test_frequencies_match_entry_starts():
    tables = tables_from_pmfs([(0, [0.5, 0.25], 0.25), (-7, [0.5], 0.5)])
    assert tables.frequencies().tolist() == [32768, 16384, 16384, 0, 32768, 32768, 0]


def test_cheapest_bits():
    tables = tables_from_pmfs([(0, [0.5, 0.25], 0.25), (-7, [0.125] * 7, 0.125)])
    assert tables.cheapest_bits().tolist() == [1.0, 3.0]
    assert tables.symbol_counts.tolist() == [2, 7]


def test_offsets_beyond_int32_and_no_tables_are_refused():
    tables_from_pmfs([(2**31 - 2, [0.5, 0.5], 0.0)]).validate()
    for offset in (2**31 - 1, -(2**31) - 1):
        with pytest.raises(InvalidArgumentError, match="int32"):
            tables_from_pmfs([(offset, [0.5, 0.5], 0.0)])
    with pytest.raises(InvalidArgumentError, match="distributions"):
        tables_from_pmfs([])


def int32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


GOOD = {
    "cdf": int32(0, 1, TOTAL, 0, 5, 7, TOTAL),
    "starts": int32(0, 3, 7),
    "offsets": int32(0, -3),
}


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("cdf", int32(0, 1, TOTAL, 0, 7, 7, TOTAL), "table 1 is not strictly increasing"),
        ("cdf", int32(0, 1, TOTAL, 0, 9, 7, TOTAL), "table 1 is not strictly increasing"),
        ("cdf", int32(0, 1, TOTAL, 0, 5, TOTAL, TOTAL), "table 1 is not strictly increasing"),
        ("cdf", int32(0, -(2**31), TOTAL, 0, 5, 7, TOTAL), "table 0 is not strictly increasing"),
        ("cdf", int32(0, 2**31 - 1, TOTAL, 0, 5, 7, TOTAL), "table 0 is not strictly increasing"),
        ("cdf", int32(0, 1, TOTAL, 1, 5, 7, TOTAL), "got 1 to 65536 in table 1"),
        ("cdf", int32(0, 1, TOTAL - 1, 0, 5, 7, TOTAL), "got 0 to 65535 in table 0"),
        ("cdf", int32(0, 1, 9, 2, 5, 7, TOTAL), "got 0 to 9 in table 0"),
        ("cdf", int32(0, 1, TOTAL, 0, 5, 7, TOTAL, TOTAL), "the length of `cdf`"),
        ("cdf", GOOD["cdf"].astype(np.int64), "int32"),
        ("cdf", GOOD["cdf"].reshape(1, 7), "one-dimensional"),
        ("cdf", GOOD["cdf"].tolist(), "int32 array, got list"),
        ("starts", int32(0, 5, 7), "3 to 65537 cumulative"),
        ("starts", int32(0, 9, 7), "3 to 65537 cumulative"),
        ("starts", int32(0, -3, 7), "3 to 65537 cumulative"),
        ("starts", int32(0, 0, 7), "3 to 65537 cumulative"),
        ("starts", int32(1, 3, 7), "must run from 0 to 7"),
        ("starts", int32(0, 7), "one element more"),
        ("starts", int32(), "one element more"),
        ("offsets", int32(), "1 to 4096 tables"),
        ("offsets", int32(0, 2**31 - 1), "reaches 2147483648"),
    ],
)
def test_malformed_tables_are_refused(field, value, reason):
    CdfTables(**GOOD).validate()
    with pytest.raises(WeightsError, match=reason):
        CdfTables(**(GOOD | {field: value})).validate()


def test_overlong_table_is_named():
    # The longest, the shortest, another, and two too long, of which the first is named.
    lengths = [TOTAL + 1, 3, 4, TOTAL + 2, TOTAL + 3]
    cdf = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    with pytest.raises(WeightsError, match="3 to 65537 .*, got 65538 in table 3"):
        CdfTables(cdf, starts, np.zeros(5, np.int32)).validate()


def test_more_than_4096_tables_are_refused():
    def tables(count: int) -> CdfTables:
        cdf = np.tile(int32(0, 1, TOTAL), count)
        starts = np.arange(0, 3 * count + 1, 3, dtype=np.int32)
        return CdfTables(cdf, starts, np.zeros(count, np.int32))

    tables(4096).validate()
    with pytest.raises(WeightsError, match="1 to 4096 tables, got 4097"):
        tables(4097).validate()
    tables_from_pmfs([(0, [1.0], 1.0)] * 4096)
    with pytest.raises(InvalidArgumentError, match="1 to 4096 distributions, got 4097"):
        tables_from_pmfs([(0, [1.0], 1.0)] * 4097)


# ---------------------------------------------------------------- fitted tables


def laplacian_counts(scale: float, total: int, magnitudes: int) -> np.ndarray:
    """How many of `total` symbols of a Laplacian of this standard deviation have each magnitude."""
    b = scale / math.sqrt(2)
    beyond = np.array([math.exp(-(k - 0.5) / b) for k in range(1, magnitudes + 1)])
    return total * np.append(np.append(1.0, beyond[:-1]) - beyond, beyond[-1])


def test_fitting_without_counts_keeps_the_gaussian():
    fitted, gaussian = fitted_tables(SCALES, np.zeros((64, 5))), gaussian_tables(SCALES)
    for name in ("cdf", "starts", "offsets"):
        assert np.array_equal(getattr(fitted, name), getattr(gaussian, name))


def test_fitted_tables_are_symmetric_and_save_bits():
    scales = [0.5, 2.0, 8.0]
    counts = np.stack([laplacian_counts(scale, 100_000, 80) for scale in scales])
    fitted, gaussian = fitted_tables(scales, counts), gaussian_tables(scales)
    fitted.validate()
    for t in range(len(scales)):
        frequency = frequencies_of(fitted, t)[:-1]
        # Equal masses get equal frequencies, but for a unit that makes up the sum.
        assert np.abs(frequency - frequency[::-1]).max() <= 1
        entropy = -(counts[t] / 1e5 * np.log2(np.maximum(counts[t] / 1e5, 1e-300))).sum()
        signs = 1 - counts[t, 0] / 1e5  # a bit for each that is not 0
        spent = {}
        for name, tables in (("fitted", fitted), ("gaussian", gaussian)):
            f, radius = frequencies_of(tables, t), -int(tables.offsets[t])
            inside = counts[t, 1 : min(radius + 1, 80)]
            bits = counts[t, 0] * (16 - np.log2(f[radius]))
            bits += inside @ (16 - np.log2(f[radius + 1 : radius + 1 + len(inside)]))
            bits += (counts[t].sum() - counts[t, 0] - inside.sum()) * (16 - np.log2(f[-1]) + 8)
            spent[name] = bits / 1e5
        assert spent["fitted"] < 0.98 * spent["gaussian"]
        assert spent["fitted"] == pytest.approx(entropy + signs, rel=0.01)


def test_fitting_weight_follows_the_number_of_symbols():
    def chance_of_zero(symbols: int) -> float:
        tables = fitted_tables([1.0], np.array([[symbols, 0, 0]]), weight=200)
        return frequencies_of(tables, 0)[-int(tables.offsets[0])] / TOTAL

    gaussian = chance_of_zero(0)
    assert chance_of_zero(2) == pytest.approx((2 + 200 * gaussian) / 202, abs=1e-4)
    assert chance_of_zero(100_000) == pytest.approx(1, abs=2e-3)


def test_table_reach_follows_the_counts():
    counts = np.zeros((1, 60))
    counts[0, [0, 40, 50]] = 900_000, 100, 1  # once in a million is left to the escape
    assert fitted_tables([1.0], counts).offsets[0] == -40
    assert gaussian_tables([1.0]).offsets[0] == -4


@pytest.mark.parametrize(
    ("counts", "weight", "message"),
    [
        (np.zeros((2, 5)), 200, r"must be \[3, K \+ 1\]"),
        (np.zeros((3, 1)), 200, r"must be \[3, K \+ 1\]"),
        (-np.ones((3, 5)), 200, "not negative"),
        (np.zeros((3, 5)), 0, "`weight` must be positive"),
        (np.zeros((3, 5)), math.inf, "`weight` must be positive"),
    ],
)
def test_wrong_counts_are_refused(counts, weight, message):
    with pytest.raises(InvalidArgumentError, match=message):
        fitted_tables([0.5, 1, 2], counts, weight)

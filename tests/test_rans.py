"""The rANS coder: exact round trips, the documented format, length, speed, damaged strings."""

import copy
import itertools
import math
import pickle
import struct
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmamba_ref.entropy import rans
from cmamba_ref.entropy.tables import (
    TOTAL,
    CdfTables,
    gaussian_tables,
    quantise_pmf,
    tables_from_pmfs,
)
from cmamba_ref.errors import BitstreamError, InvalidArgumentError

INT32 = np.iinfo(np.int32)
GAUSSIANS = gaussian_tables(np.exp(np.linspace(math.log(0.11), math.log(256), 64)))

Block = tuple[np.ndarray, np.ndarray]


def decode(tables: CdfTables, data: bytes, blocks: list[Block]) -> list[np.ndarray]:
    decoder = rans.Decoder(tables, data)
    symbols = [decoder.take(indexes) for _, indexes in blocks]
    decoder.finish()
    return symbols


def assert_round_trip(tables: CdfTables, blocks: list[Block], lanes: int | None = None) -> bytes:
    data = rans.encode(tables, blocks, lanes)
    for decoded, (symbols, _) in zip(decode(tables, data, blocks), blocks, strict=True):
        assert decoded.dtype == np.int32 and decoded.shape == symbols.shape
        assert np.array_equal(decoded, symbols)
    return data


def latent(count: int, blocks: int = 1, seed: int = 0) -> list[Block]:
    """A typical latent: Gaussian symbols, most of them of small scale; about 0.8 bits each."""
    rng = np.random.default_rng(seed)
    indexes = np.clip(rng.normal(8, 8, count), 0, 63).astype(np.int64)
    scales = np.exp(np.linspace(math.log(0.11), math.log(256), 64))
    symbols = np.rint(rng.normal(0, 1, count) * scales[indexes]).astype(np.int64)
    return [(symbols[b::blocks], indexes[b::blocks]) for b in range(blocks)]


@st.composite
def tables_and_blocks(draw) -> tuple[CdfTables, list[Block]]:
    weights = st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(any)
    edges = st.sampled_from([INT32.min, INT32.max - 40])
    offsets = st.integers(-60, 60) | edges
    pmfs = st.tuples(offsets, weights, st.integers(0, 500))
    tables = tables_from_pmfs(draw(st.lists(pmfs, min_size=1, max_size=6)))
    tables.validate()
    symbols = st.integers(-70, 110) | st.integers(INT32.min, INT32.max) | edges
    pairs = st.tuples(symbols, st.integers(0, len(tables) - 1))
    blocks = [
        (np.array([s for s, _ in block], np.int64), np.array([t for _, t in block], np.int64))
        for block in draw(st.lists(st.lists(pairs, max_size=60), max_size=5))
    ]
    return tables, blocks


@given(tables_and_blocks(), st.none() | st.integers(1, 256))
def test_round_trip_of_arbitrary_symbols(case, lanes):
    tables, blocks = case
    data = assert_round_trip(tables, blocks, lanes)
    assert scalar_decode(tables, data, [t for _, t in blocks]) == [s.tolist() for s, _ in blocks]
    if lanes is not None:
        assert data[0] == lanes - 1


@given(st.integers(0, 3000), st.integers(1, 12), st.integers(1, 256), st.integers(0, 2**32 - 1))
def test_round_trip_of_latents(count, blocks, lanes, seed):
    assert_round_trip(GAUSSIANS, latent(count, blocks, seed), lanes)


@pytest.mark.parametrize("value", [INT32.min, INT32.max, INT32.min + 1, 0, -2, 2])
def test_escapes_reach_every_int32(value):
    symbols = np.array([value, 0, value, 1, value])
    for index in (0, 63):
        assert_round_trip(GAUSSIANS, [(symbols, np.full(5, index))])


@pytest.mark.parametrize("count", [1, 127, 128, 129, 255, 256, 16_383, 16_384])
def test_round_trip_of_any_number_of_escapes(count):
    """Their length takes one byte up to 127, two up to 16,383; its lowest digit may be zero."""
    data = assert_round_trip(SMALL, [(np.full(count, 2), np.zeros(count, int))])
    assert rans._read_length(data, 1)[0] == count


def test_shapes_and_dtypes_are_preserved():
    symbols = np.arange(-6, 6, dtype=np.int32).reshape(2, 3, 2)
    indexes = np.full((2, 3, 2), 30, dtype=np.uint8)
    assert_round_trip(GAUSSIANS, [(symbols, indexes), (symbols.T, indexes.T)])


def test_splitting_into_blocks_of_whole_rows_changes_nothing():
    ((symbols, indexes),) = latent(600)
    split = [(symbols[:200], indexes[:200]), (symbols[200:], indexes[200:])]
    assert rans.encode(GAUSSIANS, [(symbols, indexes)], 50) == rans.encode(GAUSSIANS, split, 50)


# The format.

SMALL = CdfTables(
    cdf=np.array([0, 40000, 60000, 65535, 65536, 0, 1000, 65000, 65536], np.int32),
    starts=np.array([0, 5, 9], np.int32),
    offsets=np.array([-1, 10], np.int32),
)


def scalar_decode(tables: CdfTables, data: bytes, blocks: list[np.ndarray]) -> list[list[int]]:
    """`docs/format.md` in plain integers, without a look at the package's coder."""

    def varint(position: int) -> tuple[int, int]:
        value = 0
        for shift in itertools.count(0, 7):
            value |= (data[position] & 127) << shift
            position += 1
            if data[position - 1] < 128:
                return value, position
        raise AssertionError

    lanes = data[0] + 1
    length, at_escape = varint(1)
    at_states = at_escape + length
    at_word = at_states + (34 * lanes + 7) // 8
    packed = int.from_bytes(data[at_states:at_word], "little")
    states = [packed >> 34 * lane & (1 << 34) - 1 for lane in range(lanes)]
    decoded = []
    for indexes in blocks:
        symbols = []
        for j, t in enumerate(indexes.tolist()):
            cdf = tables.cdf[tables.starts[t] : tables.starts[t + 1]].tolist()
            x = states[j % lanes]
            slot = x % 65536
            entry = next(e for e in range(len(cdf)) if cdf[e + 1] > slot)
            x = (cdf[entry + 1] - cdf[entry]) * (x // 65536) + slot - cdf[entry]
            if x < 1 << 18:
                x = x << 16 | struct.unpack_from("<H", data, at_word)[0]
                at_word += 2
            states[j % lanes] = x
            symbol = int(tables.offsets[t]) + entry
            if entry == len(cdf) - 2:
                value, at_escape = varint(at_escape)
                below = int(tables.offsets[t]) - 1 - value // 2
                symbol = below if value % 2 else symbol + value // 2
            symbols.append(symbol)
        decoded.append(symbols)
    assert at_escape == at_states and at_word == len(data) and set(states) == {1 << 18}
    return decoded


@pytest.mark.parametrize("lanes", [None, 1, 2, rans.SERIAL_LANES, rans.SERIAL_LANES + 1, 255, 256])
def test_independent_scalar_decoder_agrees(lanes):
    blocks = latent(4000, blocks=3)
    blocks[1][0][::50] += 4000  # escapes
    data = rans.encode(GAUSSIANS, blocks, lanes)
    decoded = scalar_decode(GAUSSIANS, data, [indexes for _, indexes in blocks])
    assert decoded == [symbols.tolist() for symbols, _ in blocks]


def test_format_is_pinned():
    """These bytes may change only together with the version of the file format."""
    blocks = [
        (np.array([-1, 0, 1, 2, -2, 11, 10, INT32.max]), np.array([0, 0, 0, 0, 0, 1, 1, 1])),
        (np.array([], np.int64), np.array([], np.int64)),
        (
            np.array([INT32.min, 11, -1, -1, 0, 1, 1, 11, 11, 11]),
            np.array([1] * 2 + [0] * 5 + [1] * 3),
        ),
    ]
    data = assert_round_trip(SMALL, blocks, lanes=3)
    assert scalar_decode(SMALL, data, [t for _, t in blocks]) == [s.tolist() for s, _ in blocks]
    assert data.hex() == "020c0001e6ffffff0f9380808010ff3b10007cb04658b0cabf3c001e03d0fed0ff"
    assert rans.encode(SMALL, []).hex() == "00000000040000"


# Length.


@pytest.mark.parametrize("count", [0, 1, 10, 300, 5000, 20_000, 100_000, 500_000])
def test_length_is_within_half_a_percent_and_16_bytes_of_the_information(count):
    blocks = latent(count, blocks=10)
    ideal = sum(rans.ideal_bits(GAUSSIANS, *block) for block in blocks) / 8
    length = len(assert_round_trip(GAUSSIANS, blocks))
    print(f"{count} symbols: {length} bytes, ideal {ideal:.1f} (+{length - ideal:.1f})")
    assert ideal - 1 <= length <= 1.005 * ideal + 16


@pytest.mark.parametrize(
    ("pmf", "escape_mass"),
    [
        ([0.99998], 1e-5),  # next to nothing per symbol
        ([0.001, 0.998, 0.001], 1e-6),
        ([0.3, 0.3, 0.3], 0.1),  # an escape every tenth symbol
        ([0.001] * 999, 0.001),
    ],
)
def test_length_of_other_distributions(pmf, escape_mass):
    tables = tables_from_pmfs([(-3, pmf, escape_mass)])
    rng = np.random.default_rng(1)
    mass = np.append(pmf, escape_mass)
    symbols = rng.choice(len(mass), 200_000, p=mass / mass.sum()) - 3  # the last one escapes
    block = (symbols, np.zeros_like(symbols))
    ideal = rans.ideal_bits(tables, *block) / 8
    assert len(assert_round_trip(tables, [block])) <= 1.005 * ideal + 16


@pytest.mark.parametrize(("count", "lanes"), [(200_400, 200), (200_700, 201), (300_000, 256)])
def test_lane_count_follows_the_length(count, lanes):
    tables = tables_from_pmfs([(0, [1] * 255, 1)])  # eight bits for each symbol
    block = (np.arange(count) % 255, np.zeros(count, np.int64))
    assert rans.lane_count(rans.encode(tables, [block])) == lanes


@pytest.mark.parametrize("value", [0, 126, 127, 128, 2**14 - 1, 2**14, INT32.max])
def test_escapes_take_the_fewest_bytes(value):
    """Nothing reads longer ones otherwise; they would be a second file of the same image."""
    width = max(1, -(-value.bit_length() // 7))
    symbol = -(value // 2) - 2 if value % 2 else value // 2 + 2  # SMALL's table 0 is -1, 0, 1
    data = rans.encode(SMALL, [(np.array([symbol]), np.array([0]))])
    assert data[1] == width and rans.lane_count(data) == 1
    assert sum((byte & 0x7F) << 7 * k for k, byte in enumerate(data[2 : 2 + width])) == value


def test_ideal_bits_counts_frequencies_and_escaped_bytes():
    assert rans.ideal_bits(SMALL, np.array([-1, 1]), np.array([0, 0])) == pytest.approx(
        -math.log2(40000 / TOTAL) - math.log2(5535 / TOTAL)
    )
    assert rans.ideal_bits(SMALL, np.array([2]), np.array([0])) == 16 + 8
    assert rans.ideal_bits(SMALL, np.array([INT32.min]), np.array([0])) == 16 + 40


@pytest.fixture
def constriction():
    return pytest.importorskip("constriction", reason="constriction is not installed")


def test_constriction_needs_as_many_bytes(constriction):
    """Size oracle: another ANS coder, given the same probabilities."""
    rng = np.random.default_rng(2)
    tables = tables_from_pmfs([(0, rng.dirichlet(np.ones(12)), 1e-9) for _ in range(20)])
    cdf = tables.cdf.reshape(20, 14)
    probabilities = np.diff(cdf) / TOTAL
    indexes = rng.integers(0, 20, 50_000)
    symbols = (rng.random((len(indexes), 1)) > cdf[indexes, 1:] / TOTAL).sum(axis=1)
    symbols = np.minimum(symbols, 11)  # no escapes: constriction has none
    ours = len(rans.encode(tables, [(symbols, indexes)], lanes=1))
    coder = constriction.stream.stack.AnsCoder()
    family = constriction.stream.model.Categorical(perfect=False)
    coder.encode_reverse(symbols.astype(np.int32), family, probabilities[indexes])
    theirs = coder.get_compressed().nbytes
    print(f"ours {ours} bytes, constriction {theirs}")
    assert abs(ours - theirs) <= 0.0005 * theirs + 8


def test_gaussian_tables_cost_what_constriction_needs_for_the_density(constriction):
    ((symbols, indexes),) = latent(100_000)
    scales = np.exp(np.linspace(math.log(0.11), math.log(256), 64))
    model = constriction.stream.model.QuantizedGaussian(-2000, 2000)
    coder = constriction.stream.queue.RangeEncoder()
    coder.encode(symbols.astype(np.int32), model, np.zeros(len(symbols)), scales[indexes])
    theirs = coder.get_compressed().nbytes
    ours = len(rans.encode(GAUSSIANS, [(symbols, indexes)]))
    print(f"ours {ours} bytes, constriction {theirs}")
    assert ours <= 1.005 * theirs + 16


# Speed.


@pytest.mark.parametrize(
    ("count", "least_bytes", "goal"), [(90_000, 8_000, 1e6), (520_000, 50_000, 5e6)]
)
def test_speed(count, least_bytes, goal):
    """The goal in symbols per second on one core was met with a margin of 1.6 where it was set.

    Asserted is half of it, by the best CPU time of several runs: other machines are slower, or
    shared.
    """
    blocks = latent(count, blocks=10)
    data = assert_round_trip(GAUSSIANS, blocks)  # also fills the lookup
    assert least_bytes <= len(data) <= 1.15 * least_bytes
    encode_seconds, decode_seconds = [], []
    for _ in range(15):
        t0 = time.process_time()
        rans.encode(GAUSSIANS, blocks)
        t1 = time.process_time()
        decode(GAUSSIANS, data, blocks)
        t2 = time.process_time()
        encode_seconds.append(t1 - t0)
        decode_seconds.append(t2 - t1)
        speeds = count / min(encode_seconds), count / min(decode_seconds)
        if min(speeds) >= goal:
            break
    print(f"{len(data)} bytes: {speeds[0] / 1e6:.1f} and {speeds[1] / 1e6:.1f} M symbols/s")
    assert min(speeds) >= goal / 2


# Damage.


@pytest.fixture(scope="module", params=[5, rans.SERIAL_LANES + 4], ids=["serial", "rows"])
def intact(request: pytest.FixtureRequest) -> tuple[list[Block], bytes]:
    blocks = latent(3000, blocks=3)
    blocks[0][0][::100] -= 3000  # escapes
    return blocks, rans.encode(GAUSSIANS, blocks, lanes=request.param)


def decode_damaged(data: bytes, blocks: list[Block]) -> bool:
    """Whether the damage is noticed; any exception but BitstreamError goes through."""
    t0 = time.process_time()
    try:
        decoded = decode(GAUSSIANS, data, blocks)
    except BitstreamError as error:
        assert str(error)
        return True
    finally:
        assert time.process_time() - t0 < 1
    assert [d.shape for d in decoded] == [s.shape for s, _ in blocks]
    return False


def test_every_truncation_is_detected(intact):
    blocks, data = intact
    for length in range(len(data)):
        assert decode_damaged(data[:length], blocks)


def test_trailing_bytes_are_detected(intact):
    blocks, data = intact
    for tail in (b"\0", b"\0\0", b"\xff" * 1000):
        assert decode_damaged(data + tail, blocks)


def test_flipped_bits_raise_or_decode(intact):
    blocks, data = intact
    noticed = 0
    for bit in range(0, 8 * len(data), 7):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        noticed += decode_damaged(bytes(damaged), blocks)
    assert noticed > 0.9 * len(range(0, 8 * len(data), 7))


@given(st.binary(max_size=400))
def test_noise_raises_or_decodes(data):
    decode_damaged(data, latent(200, blocks=2))


@given(st.data())
def test_overwritten_and_moved_bytes_raise_or_decode(intact, data):
    blocks, good = intact
    cut = data.draw(st.integers(0, len(good)))
    length = data.draw(st.integers(0, 8))
    decode_damaged(good[:cut] + data.draw(st.binary(max_size=8)) + good[cut + length :], blocks)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("", "is empty"),
        ("00", "length of its escapes"),
        ("00ffffffffff00", "length of its escapes"),
        ("00ffffffff0f", "truncated"),
        ("0000000004", "truncated"),
        ("0000ffff030000", "starts out of range"),
        ("00000000040004", "padding"),
        ("0000000004000000", "within a word"),
        ("000000000400000000", "words left over: 1$"),
        ("0001050000040000", "escaped values left over: 1$"),
        ("0001850000040000", "end within a number"),
        ("0006808080808000" + "0000040000", "escaped value is too long"),
        ("00000000050000", "a lane ends in a wrong state"),
    ],
)
def test_errors_name_their_reason(data, reason):
    with pytest.raises(BitstreamError, match=reason):
        rans.Decoder(SMALL, bytes.fromhex(data)).finish()


@pytest.mark.parametrize("value", [INT32.min, INT32.max])
def test_escapes_without_values_or_with_impossible_ones(value):
    block = np.array([value, value]), np.array([0, 0])
    data = rans.encode(SMALL, [block])
    assert data[1] == 10  # bytes of two escaped values, the first in data[2:7]
    with pytest.raises(BitstreamError, match="more escapes than values"):
        decode(SMALL, data[:1] + b"\5" + data[2:7] + data[12:], [block])
    with pytest.raises(BitstreamError, match="exceeds int32"):
        decode(SMALL, data[:6] + b"\x7f" + data[7:], [block])


def test_unread_bytes_are_counted():
    symbols = np.tile([0, 1, 7], 200)  # 200 escapes of one byte, and more than 100 words
    indexes = np.zeros(600, np.int64)
    data = rans.encode(SMALL, [(symbols, indexes)], lanes=1)
    decoder = rans.Decoder(SMALL, data)
    decoder.take(indexes[:300])
    left = len(decoder._words) - decoder._next_word
    assert 0 < left < len(decoder._words)
    with pytest.raises(BitstreamError, match=f"words left over: {left}$"):
        decoder.finish()
    decoder = rans.Decoder(SMALL, data[:1] + b"\xc9\x01" + b"\0" + data[3:])  # 201 escapes
    decoder.take(indexes)
    with pytest.raises(BitstreamError, match="escaped values left over: 1$"):
        decoder.finish()


def test_missing_words_are_detected():
    decoder = rans.Decoder(SMALL, rans.encode(SMALL, []))
    with pytest.raises(BitstreamError, match="before its last symbol"):
        decoder.take(np.zeros(100_000, np.int64))


# Arguments and sharing.


@pytest.mark.parametrize(
    ("symbols", "indexes", "name"),
    [
        (np.zeros(3, int), np.zeros(2, int), "symbols"),
        (np.zeros(3), np.zeros(3, int), "symbols"),
        (np.full(3, 2**31), np.zeros(3, int), "symbols"),
        (np.full(3, -(2**31) - 1), np.zeros(3, int), "symbols"),
        (np.zeros(3, int), np.zeros(3), "table_index"),
        (np.zeros(3, int), np.full(3, 2), "table_index"),
        (np.zeros(3, int), np.full(3, -1), "table_index"),
    ],
)
def test_bad_arguments_are_named(symbols, indexes, name):
    with pytest.raises(InvalidArgumentError, match=f"`{name}` must"):
        rans.encode(SMALL, [(symbols, indexes)])


@pytest.mark.parametrize("lanes", [0, -1, 257])
def test_bad_lane_counts_are_refused(lanes):
    with pytest.raises(InvalidArgumentError, match="`lanes` must be 1 to 256"):
        rans.encode(SMALL, [], lanes)


def test_threads_may_share_tables():
    tables = gaussian_tables([0.5, 1, 2, 4, 8])
    rng = np.random.default_rng(3)
    indexes = rng.integers(0, 5, 5000)
    block = (rng.integers(-3, 4, 5000), indexes)
    data = rans.encode(tables, [block], lanes=rans.SERIAL_LANES + 1)
    results: list[bool] = []

    def work() -> None:
        results.append(np.array_equal(decode(tables, data, [block])[0], block[0]))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8


def test_a_lookup_holds_only_the_tables_in_use():
    """A table takes memory once it is used: 4096 of them would take 256 MiB."""
    tables = tables_from_pmfs([(0, [1, 1], 0)] * 3)
    lanes = rans.SERIAL_LANES + 1  # fewer need no lookup
    rans.Decoder(tables, rans.encode(tables, [], lanes)).take(np.array([], np.int64))
    blocks = [(np.array([0, 1]), np.array([1, 1]))]
    decode(tables, rans.encode(tables, blocks, lanes), blocks)
    entry, is_filled = rans._lookups[tables]
    assert is_filled.tolist() == [False, True, False]
    assert not entry[:TOTAL].any() and entry[TOTAL : 2 * TOTAL].any()


def test_used_tables_can_be_copied_and_pickled():
    blocks = latent(500)
    data = assert_round_trip(GAUSSIANS, blocks, lanes=rans.SERIAL_LANES + 1)
    for other in (copy.deepcopy(GAUSSIANS), pickle.loads(pickle.dumps(GAUSSIANS))):
        assert np.array_equal(decode(other, data, blocks)[0], blocks[0][0])


def test_tables_of_every_width():
    """One lookup holds bytes, another two bytes per slot; 65536 entries are the most."""
    for count in (1, 254, 255, 256, 257, TOTAL - 1):
        cdf = quantise_pmf(np.ones(count), 1)
        tables = CdfTables(cdf, np.array([0, len(cdf)], np.int32), np.array([-1], np.int32))
        tables.validate()
        symbols = np.array([-2, -1, count - 3, count - 2, count - 1, count])
        for lanes in (1, rans.SERIAL_LANES + 1):
            assert_round_trip(tables, [(symbols, np.zeros(6, np.int64))], lanes)

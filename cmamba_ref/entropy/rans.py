"""Interleaved rANS: symbols to bytes and back, vectorised over lanes in NumPy.

An asymmetric numeral system (Duda 2013, arXiv:1311.2540) keeps everything it has coded in one
integer, the state x. Coding an entry of frequency f that begins at cumulative frequency s, out of
M = 2**16, grows the state by the entry's information content, log2(M / f) bits:

    encode:  x' = (x // f) * M + s + x % f        decode:  slot = x' % M, which lies in [s, s + f)
                                                           x    = f * (x' // M) + slot - s

A stack, then: the encoder runs backwards so that the decoder runs forwards. Whenever the state
grows too large, the encoder first moves its low 16 bits out as a *word*; the decoder takes the
word back when its state has become too small.

One state is inherently serial. As in Giesen 2014 (arXiv:1402.3392), L states (*lanes*) take turns
instead: symbol j of a block belongs to lane j % L, so that a *row* of L symbols is one step of
array arithmetic. All lanes share one sequence of words, in the order in which the decoder needs
them. `docs/format.md` specifies the stream byte by byte. Of a few lanes each symbol is a step of
its own, in Python's integers: the call of an array operation costs as much as several of them.
"""

import threading
import weakref
from bisect import bisect_right
from collections.abc import Sequence
from itertools import cycle

import numpy as np

from cmamba_ref.entropy.tables import PRECISION, TOTAL, CdfTables
from cmamba_ref.errors import BitstreamError, InvalidArgumentError

WORD_BITS = 16
LOW_BITS = 18
"""Between two symbols, every state lies in [2**LOW_BITS, 2**(LOW_BITS + WORD_BITS)).

Both ends of a lane cost bytes. It starts at 2**LOW_BITS, which says nothing and is paid in full;
its last state is stored in LOW_BITS + 16 bits, of which 8 are idle on average: LOW_BITS + 8 bits
together. A small LOW_BITS therefore makes lanes cheap, but `x // f` then rounds more. Measured on
Gaussians of mixed scales: 16 loses 0.13 % of the stream, 17 0.03 %, 18 0.006 %, 20 nothing.
"""

LOW = 1 << LOW_BITS
STATE_BITS = LOW_BITS + WORD_BITS

MAX_LANES = 256
SERIAL_LANES = 16
"""Up to so many lanes, symbols are coded one by one: 0.6 to 1 us each, where a row takes 13 us."""

BYTES_PER_LANE = 1000
"""Estimated bytes of words for which one more lane is opened: 3.25 / 1000 = 0.33 % overhead."""

TOO_SHORT = "the entropy-coded string ends before its last symbol"

_INT32 = np.iinfo(np.int32)
_MAX_VARINT_BYTES = 5

# A row is a few dozen lanes, so that its time is the number of NumPy calls, 0.2 to 0.5 us each. The
# loops below therefore take their operands as arrays (converting a Python integer doubles a call's
# price), pass `out` by position, and keep types equal (mixing two also doubles it).
_PRECISION = np.array(PRECISION)
_WORD_BITS = np.array(WORD_BITS)
_SLOT_MASK = np.array(TOTAL - 1)
_LOW = np.array(LOW)


def encode(
    tables: CdfTables,
    blocks: Sequence[tuple[np.ndarray, np.ndarray]],
    lanes: int | None = None,
) -> bytes:
    """Code blocks of symbols into one self-contained string.

    Args:
        tables: valid tables (see `CdfTables.validate`).
        blocks: pairs of symbols and table indexes, integer arrays of equal shape; a decoder asks
            for the blocks in this order and needs nothing else than their table indexes. Any int32
            symbol is lossless; those outside their table cost an escape and 1 to 5 bytes.
        lanes: 1 to 256, default one per 1000 estimated bytes. More lanes decode faster and cost
            3.25 bytes each.

    Raises:
        InvalidArgumentError: `lanes`, a shape, a type, a table index or a symbol is out of range.
    """
    flat_blocks = [_check_block(tables, symbols, indexes) for symbols, indexes in blocks]
    entry_blocks, escape_blocks = [], []
    for symbols, indexes in flat_blocks:
        entries, escapes = _to_entries(tables, symbols, indexes)
        entry_blocks.append(entries)
        escape_blocks.append(_pack_varints(escapes))
    frequencies = tables.frequencies()
    if lanes is None:
        bits = sum(_information(frequencies, entries) for entries in entry_blocks)
        lanes = min(max(1, round(bits / 8 / BYTES_PER_LANE)), MAX_LANES)
    if not 1 <= lanes <= MAX_LANES:
        raise InvalidArgumentError(f"`lanes` must be 1 to {MAX_LANES}, got {lanes}")

    # Words are produced from the last to the first, at most one per symbol.
    words = np.empty(sum(map(len, entry_blocks)), dtype="<u2")
    top = len(words)
    states = np.full(lanes, LOW, dtype=np.int64)
    for entries in reversed(entry_blocks):
        start = tables.cdf[entries].astype(np.int64)
        frequency = frequencies[entries]
        if lanes <= SERIAL_LANES:
            top = _encode_serially(states, start, frequency, words, top)
            continue
        full = len(entries) - len(entries) % lanes
        # The decoder finishes a block with its short row, so the encoder begins with it.
        top = _encode_rows(states, start[None, full:], frequency[None, full:], words, top)
        rows = (-1, lanes)
        top = _encode_rows(
            states, start[:full].reshape(rows), frequency[:full].reshape(rows), words, top
        )

    escapes = b"".join(escape_blocks)
    header = bytes([lanes - 1]) + _pack_varints(np.array([len(escapes)]))
    return header + escapes + _pack_states(states) + words[top:].tobytes()


def _encode_rows(
    states: np.ndarray, starts: np.ndarray, frequencies: np.ndarray, words: np.ndarray, top: int
) -> int:
    """Code rows `[rows, width]` from the last to the first into the first `width` lanes.

    Writes words downwards from `words[top]`, changes `states` and returns the new top.
    """
    x = states[: starts.shape[1]]
    quotient, is_full = np.empty_like(x), np.empty(len(x), dtype=bool)
    limits = frequencies << LOW_BITS  # from here on, coding would leave the states' interval
    gaps = TOTAL - frequencies
    rows = zip(limits[::-1], frequencies[::-1], gaps[::-1], starts[::-1], strict=True)
    for limit, frequency, gap, start in rows:
        np.greater_equal(x, limit, is_full)
        spill = is_full.nonzero()[0]
        if spill.size:
            spilled = x[spill]
            words[top - spill.size : top] = spilled  # keeps the low 16 bits
            top -= spill.size
            spilled >>= _WORD_BITS
            x[spill] = spilled
        # x // f * M + x % f + s, rearranged so that the remainder is not needed.
        np.floor_divide(x, frequency, quotient)
        quotient *= gap
        x += quotient
        x += start
    return top


def _encode_serially(
    states: np.ndarray, start: np.ndarray, frequency: np.ndarray, words: np.ndarray, top: int
) -> int:
    """As `_encode_rows`, symbol by symbol: all of a block, starts and frequencies `[n]`."""
    x = states.tolist()
    spilled = []
    lanes = np.arange(len(start)) % len(x)
    backwards = (values[::-1].tolist() for values in (lanes, start, frequency))
    for lane, s, f in zip(*backwards, strict=True):
        state = x[lane]
        if state >= f << LOW_BITS:
            spilled.append(state & TOTAL - 1)
            state >>= WORD_BITS
        x[lane] = (state // f << PRECISION) + state % f + s
    states[:] = x
    words[top - len(spilled) : top] = spilled[::-1]
    return top - len(spilled)


class Decoder:
    """Reads a string of `encode`, one block at a time.

    A block is read as soon as its table indexes are known, which may depend on the blocks before
    it: this is what a context model needs. Memory is bounded by the string's length, by the blocks
    asked for, and by the lookup of the tables in use (at most 128 kB each, shared by all decoders
    of the same tables). A decoder belongs to one thread; the tables may be shared.

        decoder = Decoder(tables, data)
        first = decoder.take(first_indexes)
        second = decoder.take(second_indexes)
        decoder.finish()

    Args:
        tables: the tables used for encoding, valid (see `CdfTables.validate`).
        data: the whole string.

    Raises:
        BitstreamError: the string is damaged; from here, from `take` and from `finish`. After an
            error the decoder must not be used again.
    """

    def __init__(self, tables: CdfTables, data: bytes) -> None:
        self._tables = tables
        self._cumulative = tables.cdf.astype(np.int64)
        self._frequencies = tables.frequencies()
        lanes = lane_count(data)
        escape_bytes, position = _read_length(data, 1)
        state_bytes = _state_bytes(lanes)
        if len(data) < position + escape_bytes + state_bytes:
            raise BitstreamError(
                f"the entropy-coded string is truncated: {len(data)} bytes, but {lanes} lanes and "
                f"{escape_bytes} bytes of escapes take {position + escape_bytes + state_bytes}"
            )
        self._escapes = _unpack_varints(data[position : position + escape_bytes])
        self._next_escape = 0
        position += escape_bytes
        self._states = _unpack_states(data[position : position + state_bytes], lanes)
        position += state_bytes
        if (len(data) - position) % 2:
            raise BitstreamError("the entropy-coded string ends within a word")
        self._words = np.frombuffer(data, "<u2", offset=position).astype(np.int64)
        self._next_word = 0

    def take(self, table_index: np.ndarray) -> np.ndarray:
        """Decode the next block: one symbol for each table index, int32, of the same shape.

        Raises:
            BitstreamError: the string ends too early or escapes to an impossible value.
            InvalidArgumentError: a table index is out of range.
        """
        indexes = _check_indexes(self._tables, table_index)
        is_serial = len(self._states) <= SERIAL_LANES
        entries = (self._take_serially if is_serial else self._take_in_rows)(indexes)
        return self._to_symbols(entries, indexes).reshape(np.shape(table_index))

    def _take_serially(self, indexes: np.ndarray) -> np.ndarray:
        """Decode the entries `[n]` of a block symbol by symbol; each block begins with lane 0."""
        x = self._states.tolist()
        words = iter(self._words[self._next_word :].tolist())
        cumulative = self._cumulative.tolist()
        begins, ends = (self._tables.starts[indexes + i].tolist() for i in (0, 1))
        entries = []
        try:
            for lane, begin, end in zip(cycle(range(len(x))), begins, ends, strict=False):
                state = x[lane]
                slot = state & TOTAL - 1
                entry = bisect_right(cumulative, slot, begin, end) - 1
                start = cumulative[entry]
                state = (cumulative[entry + 1] - start) * (state >> PRECISION) + slot - start
                x[lane] = state if state >= LOW else state << WORD_BITS | next(words)
                entries.append(entry)
        except StopIteration:
            raise BitstreamError(TOO_SHORT) from None
        self._states[:] = x
        self._next_word = len(self._words) - len(list(words))
        return np.array(entries, dtype=np.int64)

    def _take_in_rows(self, indexes: np.ndarray) -> np.ndarray:
        """As `_take_serially`, a row of all lanes at a time."""
        entry_of_slot = _slot_lookup(self._tables, indexes)
        entries = np.empty(len(indexes), dtype=np.int64)
        lanes = len(self._states)
        full = len(entries) - len(entries) % lanes
        rows = (-1, lanes)
        self._take_rows(entry_of_slot, indexes[:full].reshape(rows), entries[:full].reshape(rows))
        self._take_rows(entry_of_slot, indexes[None, full:], entries[None, full:])
        return entries

    def _take_rows(
        self, entry_of_slot: np.ndarray, indexes: np.ndarray, entries: np.ndarray
    ) -> None:
        """Decode rows `[rows, width]` from the first `width` lanes into `entries`."""
        x = self._states[: indexes.shape[1]]
        slot, place, is_low = np.empty_like(x), np.empty_like(x), np.empty(len(x), dtype=bool)
        words, next_word = self._words, self._next_word
        starts, frequencies = self._cumulative, self._frequencies
        first_places = indexes << PRECISION
        first_entries = self._tables.starts[indexes].astype(np.int64)
        for first_place, first_entry, entry in zip(
            first_places, first_entries, entries, strict=True
        ):
            np.bitwise_and(x, _SLOT_MASK, slot)
            np.add(slot, first_place, place)
            entry[:] = entry_of_slot[place]
            entry += first_entry
            x >>= _PRECISION
            x *= frequencies[entry]
            x += slot
            x -= starts[entry]
            np.less(x, _LOW, is_low)
            refill = is_low.nonzero()[0]
            if refill.size:
                taken = words[next_word : next_word + refill.size]
                if taken.size < refill.size:
                    raise BitstreamError(TOO_SHORT)
                next_word += refill.size
                refilled = x[refill]
                refilled <<= _WORD_BITS
                refilled += taken
                x[refill] = refilled
        self._next_word = next_word

    def _to_symbols(self, entries: np.ndarray, indexes: np.ndarray) -> np.ndarray:
        """Symbols of a block, its escaped values filled in from the escape section."""
        tables = self._tables
        symbols = entries - tables.starts[indexes] + tables.offsets[indexes]
        escaped = np.flatnonzero(entries == tables.starts[indexes + 1] - 2)
        if escaped.size:
            taken = self._escapes[self._next_escape : self._next_escape + escaped.size]
            if taken.size < escaped.size:
                raise BitstreamError("the entropy-coded string has more escapes than values")
            self._next_escape += escaped.size
            lowest = tables.offsets[indexes[escaped]].astype(np.int64)
            highest = lowest + tables.symbol_counts[indexes[escaped]] - 1
            distance = taken >> 1
            values = np.where(taken & 1, lowest - 1 - distance, highest + 1 + distance)
            if values.min() < _INT32.min or values.max() > _INT32.max:
                raise BitstreamError("an escaped symbol exceeds int32")
            symbols[escaped] = values
        return symbols.astype(np.int32)

    def finish(self) -> None:
        """Check that the string holds no more than was taken.

        Raises:
            BitstreamError: words or escapes are left over, or a lane is not back where the encoder
                started it. Damage is thus noticed with a probability that grows with the number of
                lanes; it is no substitute for a checksum.
        """
        if self._next_word != len(self._words):
            left = len(self._words) - self._next_word
            raise BitstreamError(f"the entropy-coded string has words left over: {left}")
        if self._next_escape != len(self._escapes):
            left = len(self._escapes) - self._next_escape
            raise BitstreamError(f"the entropy-coded string has escaped values left over: {left}")
        if (self._states != LOW).any():
            raise BitstreamError(
                "the entropy-coded string is damaged: a lane ends in a wrong state"
            )


def lane_count(data: bytes) -> int:
    """The number of lanes of a string, without decoding it.

    Raises:
        BitstreamError: the string is empty.
    """
    if not data:
        raise BitstreamError("the entropy-coded string is empty")
    return data[0] + 1


def ideal_bits(tables: CdfTables, symbols: np.ndarray, table_index: np.ndarray) -> float:
    """Information content in bits under the integer tables, the escaped values' bytes included.

    Raises:
        InvalidArgumentError: as for `encode`.
    """
    entries, escapes = _to_entries(tables, *_check_block(tables, symbols, table_index))
    return _information(tables.frequencies(), entries) + 8 * len(_pack_varints(escapes))


def _information(frequencies: np.ndarray, entries: np.ndarray) -> float:
    """Sum of log2(2**16 / frequency) over entries, in bits."""
    used = np.bincount(entries, minlength=len(frequencies))
    occurs = np.flatnonzero(used)
    return float(used[occurs] @ (PRECISION - np.log2(frequencies[occurs])))


def _to_entries(
    tables: CdfTables, symbols: np.ndarray, indexes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Positions in `tables.cdf` of the symbols' entries `[n]`; escaped values `[escapes]`.

    A symbol outside its table becomes the escape entry and a non-negative value: twice its distance
    beyond the nearer end of the table (0 for the neighbour), plus one below the lower end.
    """
    position = symbols - tables.offsets[indexes]
    count = tables.symbol_counts[indexes]
    above, below = position >= count, position < 0
    escaped = np.where(above, 2 * (position - count), 2 * (-1 - position) + 1)[above | below]
    position[above | below] = count[above | below]
    return position + tables.starts[indexes], escaped


def _check_indexes(tables: CdfTables, table_index: np.ndarray) -> np.ndarray:
    """The table indexes, flat, int64 `[n]`, all of them in range."""
    indexes = np.asarray(table_index)
    if not np.issubdtype(indexes.dtype, np.integer):
        raise InvalidArgumentError(f"`table_index` must be integers, got {indexes.dtype}")
    indexes = indexes.ravel().astype(np.int64)
    if indexes.size and not (indexes.min() >= 0 and indexes.max() < len(tables)):
        raise InvalidArgumentError(
            f"`table_index` must be 0 to {len(tables) - 1}, got {indexes.min()} to {indexes.max()}"
        )
    return indexes


def _check_block(
    tables: CdfTables, symbols: np.ndarray, table_index: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Symbols and table indexes, flat, int64 `[n]`, all of them in range."""
    indexes = _check_indexes(tables, table_index)
    values = np.asarray(symbols)
    if values.shape != np.shape(table_index):
        raise InvalidArgumentError(
            f"`symbols` must have the shape of `table_index`, {np.shape(table_index)}, "
            f"got {values.shape}"
        )
    if not np.issubdtype(values.dtype, np.integer):
        raise InvalidArgumentError(f"`symbols` must be integers, got {values.dtype}; round first")
    if values.size and not (values.min() >= _INT32.min and values.max() <= _INT32.max):
        raise InvalidArgumentError(
            f"`symbols` must fit int32, got {values.min()} to {values.max()}"
        )
    return values.ravel().astype(np.int64), indexes


# Kept beside the tables, not in them: they stay plain data that can be copied and pickled, and a
# lookup goes when its tables go. Each holds the lookup and, per table, whether it is filled in.
_lookups: "weakref.WeakKeyDictionary[CdfTables, tuple[np.ndarray, np.ndarray]]"
_lookups = weakref.WeakKeyDictionary()
_lookups_lock = threading.Lock()


def _slot_lookup(tables: CdfTables, indexes: np.ndarray) -> np.ndarray:
    """For each table, the entry that owns each of the 65536 slots, flat `[T * 65536]`.

    Place `t << 16 | slot` holds the entry, counted from the first of table t. The array is
    allocated whole, but the operating system provides memory only for what is written, and only
    the tables in `indexes` (and those of earlier calls) are filled in.
    """
    with _lookups_lock:
        if tables not in _lookups:
            # One byte per slot suffices where no table has more than 256 entries.
            smallest = np.min_scalar_type(int(tables.symbol_counts.max()))
            entry = np.zeros(len(tables) << PRECISION, dtype=smallest)
            _lookups[tables] = entry, np.zeros(len(tables), dtype=bool)
        entry, is_filled = _lookups[tables]
        is_used = np.bincount(indexes, minlength=len(tables)) > 0
        for t in np.flatnonzero(is_used & ~is_filled).tolist():
            frequency = np.diff(tables.cdf[tables.starts[t] : tables.starts[t + 1]])
            slots = slice(t << PRECISION, (t + 1) << PRECISION)
            entry[slots] = np.arange(len(frequency)).repeat(frequency)
            is_filled[t] = True
        return entry


def _state_bytes(lanes: int) -> int:
    return -(-lanes * STATE_BITS // 8)


def _pack_states(states: np.ndarray) -> bytes:
    """STATE_BITS bits per lane, lane 0 lowest, as one little-endian number."""
    number = sum(int(x) << STATE_BITS * lane for lane, x in enumerate(states))
    return number.to_bytes(_state_bytes(len(states)), "little")


def _unpack_states(data: bytes, lanes: int) -> np.ndarray:
    """The inverse of `_pack_states`, int64 `[lanes]`; refuses what no encoder writes."""
    number = int.from_bytes(data, "little")
    if number >> STATE_BITS * lanes:
        raise BitstreamError("the entropy-coded string is damaged: padding after the states")
    mask = (1 << STATE_BITS) - 1
    states = np.array([number >> STATE_BITS * lane & mask for lane in range(lanes)], dtype=np.int64)
    if (states < LOW).any():
        raise BitstreamError("the entropy-coded string is damaged: a lane starts out of range")
    return states


def _pack_varints(values: np.ndarray) -> bytes:
    """LEB128: seven bits per byte, lowest first; all but a number's last byte have bit 7 set."""
    packed = bytearray()
    for value in values.tolist():
        while value > 0x7F:
            packed.append(value & 0x7F | 0x80)
            value >>= 7
        packed.append(value)
    return bytes(packed)


def _unpack_varints(data: bytes) -> np.ndarray:
    """The inverse of `_pack_varints`, int64 `[numbers]`; each in at most 5 bytes."""
    digits = np.frombuffer(data, np.uint8).astype(np.int64)
    ends = np.flatnonzero(digits < 0x80)
    if digits.size and (not ends.size or ends[-1] != digits.size - 1):
        raise BitstreamError("the entropy-coded string is damaged: its escapes end within a number")
    begins = np.append(0, ends[:-1] + 1)[: ends.size]
    lengths = ends - begins + 1
    if ends.size and lengths.max() > _MAX_VARINT_BYTES:
        raise BitstreamError("the entropy-coded string is damaged: an escaped value is too long")
    values = np.zeros(ends.size, dtype=np.int64)
    for k in range(_MAX_VARINT_BYTES):
        longer = np.flatnonzero(lengths > k)
        values[longer] |= (digits[begins[longer] + k] & 0x7F) << 7 * k
    return values


def _read_length(data: bytes, position: int) -> tuple[int, int]:
    """The LEB128 number at `position`, and the position after it."""
    for end in range(position, min(position + _MAX_VARINT_BYTES, len(data))):
        if data[end] < 0x80:
            return int(_unpack_varints(data[position : end + 1])[0]), end + 1
    raise BitstreamError("the entropy-coded string is damaged: no valid length of its escapes")

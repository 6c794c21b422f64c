"""Few combinations in which every two settings meet in all their values.

Most faults that depend on settings depend on one or two of them.  So instead of every combination a
*covering array of strength two* will do: a list of rows, each with a value of every factor, in
which each pair of values of each two factors stands together in some row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any

from cmamba_ref import InvalidArgumentError

Row = dict[str, Any]
Cell = tuple[str, Hashable]


def pairs_of(row: Mapping[str, Hashable]) -> set[tuple[Cell, Cell]]:
    """The pairs of (factor, value) that stand together in a row."""
    return set(combinations(row.items(), 2))


def all_pairs(factors: Mapping[str, Sequence[Hashable]]) -> list[tuple[Cell, Cell]]:
    """The pairs that a covering array has to hold, in the order of factors and values."""
    return [
        ((one, a), (other, b))
        for one, other in combinations(factors, 2)
        for a in factors[one]
        for b in factors[other]
    ]


def covering_array(factors: Mapping[str, Sequence[Hashable]], rows: int) -> list[Row]:
    """So many rows that cover all pairs, the same ones at every call.

    Built greedily: a row begins with the first pair that is missing yet, and takes of every other
    factor the value that adds most pairs, the least used one among equals.

    Args:
        factors: the values of each factor.

    Raises:
        InvalidArgumentError: the rows do not suffice; a greedy array need not be the smallest.
    """
    order = all_pairs(factors)
    missing = set(order)
    used: Counter[Cell] = Counter()
    found: list[Row] = []
    for _ in range(rows):
        chosen: dict[str, Hashable] = dict(next((pair for pair in order if pair in missing), ()))
        for factor in factors:
            if factor not in chosen:
                options = [_row(factors, {**chosen, factor: v}) for v in factors[factor]]
                worth = [
                    (len(pairs_of(row) & missing), -used[factor, row[factor]]) for row in options
                ]
                chosen = options[worth.index(max(worth))]
        row = _row(factors, chosen)
        missing -= pairs_of(row)
        used.update(row.items())
        found.append(row)
    if missing:
        raise InvalidArgumentError(
            f"`rows` must be enough for all pairs, got {rows}, which leave out {len(missing)}; "
            "allow more rows"
        )
    return found


def _row(factors: Mapping[str, Sequence[Hashable]], chosen: Mapping[str, Hashable]) -> Row:
    """What is chosen so far, in the order of the factors, so that pairs compare equal."""
    return {factor: chosen[factor] for factor in factors if factor in chosen}

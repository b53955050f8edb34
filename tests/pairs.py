"""Few rows that hold every pair of values of any two factors (pairwise testing)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence

Row = dict[str, int]
Pair = tuple[tuple[str, int], tuple[str, int]]
# Completions of a pair that are tried before it counts as one that nothing allows.
_TRIES = 400
# Of those that look allowed, how many compete for the pairs that are left.
_COMPETE = 12


def pairwise(
    factors: Mapping[str, Sequence[object]], plausible: Callable[[Row], bool], allowed: Callable[[Row], bool]
) -> tuple[list[Row], list[Pair]]:
    """Rows (factor -> index of its value) and the pairs that no row holds, since none with them is allowed.

    plausible: cheap, and true of all that is allowed.
    """
    draw = random.Random(0)
    left = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(factors, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    rows: list[Row] = []
    impossible: list[Pair] = []
    for pair in sorted(left):
        if pair not in left:
            continue
        result: list[Row] = []
        for _ in range(_TRIES):
            row = {name: draw.randrange(len(values)) for name, values in factors.items()} | dict(pair)
            if plausible(row):
                result.append(row)
            if len(result) == _COMPETE:
                break
        result.sort(key=lambda row: -len(left & pairs_of(row)))
        best = next((row for row in result if allowed(row)), None)
        if best is None:
            impossible.append(pair)
            left.discard(pair)
            continue
        rows.append(best)
        left -= pairs_of(best)
    return rows, impossible


def pairs_of(row: Row) -> set[Pair]:
    """The pairs that a row holds."""
    return set(itertools.combinations(row.items(), 2))


def cover(cases: Sequence[Mapping[str, object]], strength: int) -> list[int]:
    """Indices of few of the cases (argument -> value's name) that hold all values (strength 1) or all pairs of values
    (strength 2) which any case holds.

    Greedy: each round takes the case with most that is still missing, the first of those that tie.
    """
    held = [set(itertools.combinations(sorted(case.items()), min(strength, len(case)))) for case in cases]
    left = set().union(*held)
    chosen = []
    while left:
        best = max(range(len(cases)), key=lambda index: len(held[index] & left))
        chosen.append(best)
        left -= held[best]
    return sorted(chosen)

"""Tables of `generate.py`'s finished rows, and what they say about the targets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from statistics import median
from typing import Any

from generate_arms import LARGE, OURS, SHORT, SMALL
from measure import print_table
from peers.build import IK, LLAMA

Row = dict[str, Any]
COLUMNS = (
    "program", "file, MB", "read a token, MB", "load, s", "first token, s", "prompt, t/s", "of the best other",
    "decode, t/s", "of the best other", "peak memory, MB", "loss",
)  # fmt: skip
# Bytes of a process that runs a model, beside its file and its keys and values.
_SPARE = 64e6


def show(rows: list[Row]) -> None:
    """Print a table for each model, context, number of threads and processor, and its targets."""
    for (cpu, instructions, model, context, threads), group in groupby(sorted(rows, key=_place), _place):
        of_table = list(group)
        print(f"**{model}, {context} tokens, {threads} thread{'s' if threads > 1 else ''}**, {cpu}, {instructions}\n")
        print_table(COLUMNS, map(list, (_cells(row, of_table) for row in of_table)))
        print()
        lines = list(targets(of_table))
        if lines:
            print_table(("target", "wanted", "measured", "met"), lines)
            print()


def _place(row: Row) -> tuple[str, str, str, int, int]:
    return row["cpu"], row["instructions"], row["model"], row["context"], row["threads"]


def _cells(row: Row, rows: list[Row]) -> Iterator[str]:
    yield row["arm"]
    yield f"{row['file'] / 1e6:.0f}"
    yield f"{row['read'] / 1e6:.0f}"
    yield f"{row['load']:.1f}"
    yield f"{row['first']:.2f}"
    for part, digits in (("prompt", 0), ("decode", 1)):
        yield f"{max(row[part]):.{digits}f}"
        other = best(others(rows), row, part)
        yield "" if other is None or row["program"] != OURS else _times(ratio(row, other, part))
    yield f"{row['peak'] / 1e6:.0f}"
    yield f"{row['loss']:.2f}"


def others(rows: Iterable[Row]) -> list[Row]:
    """The rows of other programs."""
    return [row for row in rows if row["program"] != OURS]


def ratio(row: Row, other: Row, part: str) -> float:
    """How many times as fast as `other` a row is: the median over rounds. part: "prompt" or "decode"."""
    return median(ours / theirs for ours, theirs in zip(row[part], other[part], strict=True))


def best(candidates: Iterable[Row], row: Row, part: str) -> Row | None:
    """The fastest of the candidates that took turns with a row; None if there are none."""
    beside = [other for other in candidates if other["run"] == row["run"]]
    return max(beside, key=lambda other: median(other[part]), default=None)


def targets(rows: list[Row]) -> Iterator[list[str]]:
    """Cells of the targets that the rows of one table answer."""
    for row in (row for row in rows if row["program"] == OURS):
        if row["context"] <= SHORT:
            yield from _short(row, rows)
        elif row["kv"]:
            plain = [other for other in rows if _but_cache(other) == _but_cache(row) and not other["kv"]]
            yield from _faster(
                f"decode of {row['arm']}, of 16-bit KV's", 1.5, row, best(plain, row, "decode"), "decode"
            )
        if row["model"] == LARGE.name:
            yield from _resources(row)


def _short(row: Row, rows: list[Row]) -> Iterator[list[str]]:
    wanted = 2.0 if row["inputs"] else 1.2
    other = best(others(rows), row, "prompt")
    yield from _faster(f"prompt of {row['arm']}, of the best other's", wanted, row, other, "prompt")
    if row["model"] == SMALL.name and row["bits"] == 3:
        same = [other for other in rows if other["program"] == LLAMA.name and other["kind"] == "Q4_0"]
        yield from _faster(f"decode of {row['arm']}, of Q4_0's", 2.0, row, best(same, row, "decode"), "decode")
    if row["model"] == LARGE.name and row["bits"] == 2:
        other = best((one for one in rows if one["program"] == IK.name and one["bits"] == 2), row, "decode")
        yield from _faster(f"decode of {row['arm']}, of ik_llama.cpp's fastest 2 bits", 1.7, row, other, "decode")
        if other is not None:
            most, read = other["read"] / 1e6, row["read"] / 1e6
            yield [f"bytes read by {row['arm']}, MB", f"<= {most:.0f}", f"{read:.0f}", _met(read <= most)]


def _resources(row: Row) -> Iterator[list[str]]:
    yield [f"load of {row['arm']}, s", "<= 5", f"{row['load']:.1f}", _met(row["load"] <= 5)]
    most = (row["file"] + row["cache"] + _SPARE) / 1e6
    peak = row["peak"] / 1e6
    yield [f"peak memory of {row['arm']}, MB", f"<= {most:.0f}", f"{peak:.0f}", _met(peak <= most)]


def _faster(what: str, wanted: float, row: Row, other: Row | None, part: str) -> Iterator[list[str]]:
    if other is not None:
        measured = ratio(row, other, part)
        yield [what, f">= {_times(wanted)}", _times(measured), _met(measured >= wanted)]


def _but_cache(row: Row) -> tuple[Any, ...]:
    return row["program"], row["bits"], row["head_bits"], row["inputs"]


def _times(factor: float) -> str:
    return f"{factor:.2f}"


def _met(is_met: bool) -> str:
    return "yes" if is_met else "no"

"""Output: tables, and progress as a bar on a terminal or as plain lines elsewhere."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from subnibble.cli.streams import say, tell
from subnibble.progress import Progress
from subnibble.report import BlockReport, DistillReport

_SECONDS_BETWEEN_LINES = 15.0
# As a share of all: before these are done nothing is said of the time that is left.
_FIRST_STEPS = 0.05


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """Show how far a long step is, on stderr."""
    if not sys.stderr.isatty():
        yield _PlainLines(title)
        return
    doing = TextColumn("{task.fields[doing]}", markup=False)
    columns = (TextColumn(title, markup=False), BarColumn(), doing, TimeElapsedColumn())
    with Bar(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        yield _BarTask(bar, bar.add_task(title, total=None, doing=""))


class _BarTask:
    """A bar that starts again at each stage."""

    def __init__(self, bar: Bar, task: TaskID) -> None:
        self._bar, self._task, self._done = bar, task, 0

    def __call__(self, done: int, total: int, doing: str) -> None:
        if done < self._done:
            self._bar.reset(self._task, total=total)
        self._done = done
        self._bar.update(self._task, completed=done, total=total, doing=doing)


class _PlainLines:
    """A line every 15 seconds, and one at the end of each stage."""

    def __init__(self, title: str) -> None:
        self._title, self._done = title, 0
        self._stage = self._last = time.monotonic()

    def __call__(self, done: int, total: int, doing: str) -> None:
        now = time.monotonic()
        if done < self._done:
            self._stage = self._last
        self._done = done
        if done < total and now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        spent = now - self._stage
        # The first steps are of another kind than the rest.
        known = done >= _FIRST_STEPS * total
        left = f", about {duration(spent * (total - done) / done)} left" if known and done < total else ""
        tell(f"{self._title}: {done}/{total} ({doing}), {duration(spent)}{left}")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: columns of words to the left, of numbers to the right."""
    shown = Table(box=None, pad_edge=False)
    for index, name in enumerate(columns):
        numeric = all(row[index][:1].isdigit() or row[index] in ("", "-") for row in rows)
        shown.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    # Never cut a cell where the output goes to a file.
    widest = sum(max(len(row[index]) for row in (columns, *rows)) + 2 for index in range(len(columns)))
    Console(width=None if sys.stdout.isatty() else max(widest, 80), highlight=False, markup=False).print(shown)


def print_json(content: Any) -> None:
    """Print machine-readable output."""
    say(json.dumps(_finite(content), indent=2, allow_nan=False))


def _finite(content: Any) -> Any:
    """The same with null for numbers that JSON cannot hold (an infinite perplexity)."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def megabytes(count: float) -> str:
    """Bytes, for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds, for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def unstable(blocks: Sequence[BlockReport]) -> str | None:
    """What is said of blocks whose tuning met numbers that are not finite; None if all went well."""
    found = [block.path for block in blocks if block.left_out]
    if not found:
        return None
    return (
        f"tuning left out steps that were not finite in {len(found)} of {len(blocks)} blocks, {found[0]} the first; "
        'see "blocks" in report.json'
    )


def distilled(found: DistillReport) -> str:
    """What is said of a distillation."""
    return (
        f"distilled in {found.steps} steps: KL from the original {found.before:.3f} before, {found.after:.3f} "
        "after, on held-out text"
    )

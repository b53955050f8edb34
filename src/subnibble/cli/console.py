"""Printing: tables, JSON, and progress as a bar on a terminal or as plain lines elsewhere."""

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
from subnibble.resume.interrupt import stops_at_safe_points

_SECONDS_BETWEEN_LINES = 15.0
# Share of the steps before which no remaining time is shown: the first steps differ from the others.
_FIRST_STEPS = 0.05


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """Show the progress of a long-running call on stderr; yields the callback. title: what runs.

    Inside, the first Ctrl-C or SIGTERM waits for the next safe point of the call.
    """
    with stops_at_safe_points(_on_signal), shown_progress(title) as callback:
        yield callback


def _on_signal() -> None:
    tell("Stopping at the next safe point. A second signal stops at once; finished steps are kept in both cases.")


@contextmanager
def shown_progress(title: str) -> Iterator[Progress]:
    """Show progress like `progress`, for a call without safe points: a signal stops it at once."""
    if not sys.stderr.isatty():
        yield _PlainLines(title)
        return
    doing = TextColumn("{task.fields[doing]}", markup=False)
    columns = (TextColumn(title, markup=False), BarColumn(), doing, TimeElapsedColumn())
    with Bar(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        yield _BarTask(bar, bar.add_task(title, total=None, doing=""))


class _BarTask:
    """A `Progress` that moves a bar, which starts again at each stage."""

    def __init__(self, bar: Bar, task: TaskID) -> None:
        self._bar, self._task, self._done = bar, task, -1

    def __call__(self, done: int, total: int, doing: str) -> None:
        if self._done < 0 or done < self._done:
            # What an earlier run did must not count for the speed of this one.
            self._bar.reset(self._task, total=total, completed=done)
        self._done = done
        self._bar.update(self._task, completed=done, total=total, doing=doing)


class _PlainLines:
    """A `Progress` that prints a line every 15 seconds and at the end of each stage."""

    def __init__(self, title: str) -> None:
        self._title, self._done, self._first = title, -1, 0
        self._stage = self._last = time.monotonic()

    def __call__(self, done: int, total: int, doing: str) -> None:
        now = time.monotonic()
        if self._done < 0 or done < self._done:
            # What an earlier run did must not count for the speed of this one.
            self._stage, self._first = self._last, done if done > 1 else 0
        self._done = done
        if done < total and now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        spent = now - self._stage
        here = done - self._first
        known = here > 0 and here >= _FIRST_STEPS * total
        left = f", about {duration(spent * (total - done) / here)} left" if known and done < total else ""
        tell(f"{self._title}: {done}/{total} ({doing}), {duration(spent)}{left}")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, with columns of words aligned left and columns of numbers aligned right.

    columns: titles.
    rows: cells, as many in each row as there are columns.
    """
    shown = Table(box=None, pad_edge=False)
    for index, name in enumerate(columns):
        numeric = all(row[index][:1].isdigit() or row[index] in ("", "-") for row in rows)
        shown.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    # Wide enough that no cell is cut when the output goes to a file.
    widest = sum(max(len(row[index]) for row in (columns, *rows)) + 2 for index in range(len(columns)))
    Console(width=None if sys.stdout.isatty() else max(widest, 80), highlight=False, markup=False).print(shown)


def print_json(content: Any) -> None:
    """Print `content` as JSON; numbers that JSON cannot hold become null."""
    say(json.dumps(_finite(content), indent=2, allow_nan=False))


def _finite(content: Any) -> Any:
    """The content with None in place of numbers that JSON cannot hold, such as an infinite perplexity."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def megabytes(count: float) -> str:
    """A number of bytes as text, in MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """A number of seconds as text, in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def unstable(blocks: Sequence[BlockReport]) -> str | None:
    """A warning if the tuning of a block skipped steps with NaN or infinite numbers; None if no block did."""
    paths = [block.path for block in blocks if block.left_out]
    if not paths:
        return None
    return (
        f"tuning skipped steps that were not finite in {len(paths)} of {len(blocks)} blocks, first in {paths[0]}; "
        'see "blocks" in report.json'
    )


def distilled(report: DistillReport) -> str:
    """A sentence about the result of a distillation."""
    return (
        f"distilled in {report.steps} steps: KL from the original {report.before:.3f} before, {report.after:.3f} "
        "after, on held-out text"
    )

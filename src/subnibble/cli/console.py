"""Output: tables, and progress as a bar on a terminal or as plain lines elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

_SECONDS_BETWEEN_LINES = 15.0


class Report(Protocol):
    """What `progress` yields: call it after each step."""

    def __call__(self, done: int, total: int, doing: str) -> None:
        """done, total: steps. doing: for people."""


@contextmanager
def progress(title: str) -> Iterator[Report]:
    """Show how far a long step is, on stderr."""
    if not sys.stderr.isatty():
        yield _plain_lines(title)
        return
    columns = (TextColumn(title), BarColumn(), TextColumn("{task.fields[doing]}"), TimeElapsedColumn())
    with Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, doing="")
        yield lambda done, total, doing: bar.update(task, completed=done, total=total, doing=doing)


def _plain_lines(title: str) -> Report:
    start = time.monotonic()
    last = start

    def line(done: int, total: int, doing: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done < total and now - last < _SECONDS_BETWEEN_LINES:
            return
        last = now
        left = (now - start) * (total - done) / max(done, 1)
        typer.echo(f"{title}: {done}/{total} ({doing}), {now - start:.0f} s, about {left:.0f} s left", err=True)

    return line


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: columns of words to the left, of numbers to the right."""
    shown = Table(box=None, pad_edge=False)
    for index, name in enumerate(columns):
        numeric = all(row[index][:1].isdigit() or row[index] in ("", "-") for row in rows)
        shown.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    # Wide enough never to cut a cell where the output goes to a file.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(shown)


def print_json(content: Any) -> None:
    """Print machine-readable output."""
    typer.echo(json.dumps(content, indent=2))


def megabytes(count: float) -> str:
    """Bytes, for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds, for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"

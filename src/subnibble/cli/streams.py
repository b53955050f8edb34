"""Printing that never stops a command: on consoles without Unicode, closed pipes and terminals that go away.

`prepare` is called once, before anything is printed. Commands then print results with `say` and `stream`, and messages
and progress with `tell`.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO

# Default error handlers of streams, which raise for a character that the console lacks.
_RAISING = ("strict", "surrogateescape")


def prepare() -> None:
    """Prepare stdout and stderr, so that neither a missing character nor a lost terminal stops the command."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # The parent process closed the stream, as >&- does.
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, "w"), "utf-8", "replace"))
        elif isinstance(stream, io.TextIOWrapper) and stream.errors in _RAISING:
            stream.reconfigure(errors="replace")
    if not isinstance(sys.stderr, _Unfailing):
        sys.stderr = _Unfailing(sys.stderr)


def say(text: str) -> None:
    """Print a line of the command's result, on stdout."""
    print(text, flush=True)


def stream(text: str) -> None:
    """Print a piece of a line on stdout, at once."""
    print(text, end="", flush=True)


def tell(text: str) -> None:
    """Print a message for the user, on stderr."""
    print(text, file=sys.stderr, flush=True)


class _Unfailing:
    """A stream that ignores failed writes: a closed terminal or a full disk must not end hours of work."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text`, or drop it if that fails."""
        try:
            return self._stream.write(text)
        except (OSError, RuntimeError):
            # RuntimeError: a signal handler printed while the stream was being written to.
            return len(text)

    def flush(self) -> None:
        """Flush, or do nothing if that fails."""
        try:
            self._stream.flush()
        except (OSError, RuntimeError):
            return

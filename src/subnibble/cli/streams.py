"""What is printed always gets out: consoles that have few letters, pipes that close, terminals that go away.

`prepare` is called once, before anything is printed; commands then print by `say`, and tell of their progress by
`tell`.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO

# The handlers of a stream that nobody chose: under these a letter that the console lacks is an error.
_UNCHOSEN = ("strict", "surrogateescape")


def prepare() -> None:
    """Let no letter and no loss of the terminal stop the command."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # Closed by whoever started us, as by >&-.
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, "w"), "utf-8", "replace"))
        elif isinstance(stream, io.TextIOWrapper) and stream.errors in _UNCHOSEN:
            stream.reconfigure(errors="replace")
    if not isinstance(sys.stderr, _Unstopped):
        sys.stderr = _Unstopped(sys.stderr)


def say(text: str) -> None:
    """Print a line of the command's result."""
    print(text, flush=True)


def tell(text: str) -> None:
    """Print a line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


class _Unstopped:
    """A stream whose end stops nobody: hours of work must not end because a terminal was closed or a log's disk is
    full.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write if it can be written."""
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        """Flush if it can be flushed."""
        try:
            self._stream.flush()
        except OSError:
            return

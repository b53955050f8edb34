"""Progress callbacks of long-running calls."""

from __future__ import annotations

from typing import Any, Protocol

from subnibble.errors import BadArgument


class Progress(Protocol):
    """A callback, called after each step of a long-running call."""

    def __call__(self, done: int, total: int, doing: str) -> None:
        """Report progress.

        done: finished steps of the current stage; starts again at each stage.
        total: all steps of the current stage.
        doing: what is being done, a few words.
        """


def silent(done: int, total: int, doing: str) -> None:
    """A `Progress` that does nothing."""


def as_progress(progress: Any) -> Progress:
    """The caller's progress callback, or `silent` for None; `BadArgument` if it is not callable."""
    if progress is None:
        return silent
    if not callable(progress):
        raise BadArgument(f"progress is a {type(progress).__name__}; give a function of (done, total, doing)")
    callback: Progress = progress
    return callback


def titled(progress: Progress, title: str) -> Progress:
    """The same callback, with `title` in front of each `doing`."""
    return lambda done, total, doing: progress(done, total, f"{title}: {doing}")

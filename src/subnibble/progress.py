"""How long steps tell their caller how far they are."""

from __future__ import annotations

from typing import Any, Protocol

from subnibble.errors import BadArgument


class Progress(Protocol):
    """Called after each step."""

    def __call__(self, done: int, total: int, doing: str) -> None:
        """done, total: steps of the current stage; `done` starts anew with each stage. doing: for people."""


def silent(done: int, total: int, doing: str) -> None:
    """The `Progress` that tells nobody."""


def given_progress(given: Any) -> Progress:
    """The `Progress` that a caller gives; None tells nobody."""
    if given is None:
        return silent
    if not callable(given):
        raise BadArgument(f"progress is a {type(given).__name__}; give a function of (done, total, doing)")
    found: Progress = given
    return found


def titled(progress: Progress, title: str) -> Progress:
    """The same with `title` before what is being done."""
    return lambda done, total, doing: progress(done, total, f"{title}: {doing}")

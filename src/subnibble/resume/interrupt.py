"""Stop long work at a safe point when the user presses Ctrl-C or the system sends SIGTERM.

A command wraps its work in `stops_at_safe_points`; the work calls `safe_point` where everything finished is saved. The
first signal waits for the next safe point. The second one stops at once.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Request:
    """A signal that arrived and was not obeyed yet.

    number: the signal, None if there is none.
    waits: whether the work has come to its first safe point: until then, there is nothing to wait for.
    """

    number: int | None = None
    waits: bool = False


_REQUEST: ContextVar[_Request | None] = ContextVar("request", default=None)


def stop_requested() -> bool:
    """Whether a signal waits for the next safe point."""
    request = _REQUEST.get()
    return request is not None and request.number is not None


def safe_point() -> None:
    """Stop here if a signal arrived: raises `KeyboardInterrupt` for Ctrl-C and `SystemExit(143)` for SIGTERM."""
    request = _REQUEST.get()
    if request is None:
        return
    request.waits = True
    if request.number is not None:
        number, request.number = request.number, None
        _stop(number)


@contextmanager
def stops_at_safe_points(on_first: Callable[[], None]) -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM inside the context wait for the next safe point; a second one stops at once.

    Before the work has come to its first safe point, the first one stops at once, too.

    on_first: called when the first signal arrives, to tell the user.
    """
    request = _Request()
    token = _REQUEST.set(request)

    def handle(number: int, frame: FrameType | None) -> None:
        if request.number is not None or not request.waits:
            _stop(number)
        request.number = number
        on_first()

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
        # The work ended before it met another safe point: then it is done, and there is nothing to stop.
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _REQUEST.reset(token)


def _stop(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)

"""Where the time goes, and how much memory was held at the peak."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up seconds by step; steps may nest, an inner step's time is not counted to the outer one."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._stack: list[str] = []
        self._mark = self._start
        self._seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Count the time inside to `name`."""
        self._switch()
        self._stack.append(name)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def seconds(self) -> dict[str, float]:
        """Seconds by step, with the "total" since the clock was made."""
        self._switch()
        total = time.perf_counter() - self._start
        return {**{name: round(s, 3) for name, s in self._seconds.items()}, "total": round(total, 3)}

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self._seconds[self._stack[-1]] = self._seconds.get(self._stack[-1], 0.0) + now - self._mark
        self._mark = now


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

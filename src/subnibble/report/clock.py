"""Measure the seconds of each step, and the peak memory of the process."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_TOTAL = "total"


class Clock:
    """Adds up seconds by step. Steps may nest: the time of an inner step does not count for the outer one."""

    def __init__(self) -> None:
        self._earlier = 0.0
        self._start = time.perf_counter()
        self._stack: list[str] = []
        self._mark = self._start
        self._seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Add the time inside the `with` block to the step `name`."""
        self._switch()
        self._stack.append(name)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add the seconds of an earlier run that this one continues, as `seconds` returned them."""
        for name, count in seconds.items():
            if name == _TOTAL:
                self._earlier += count
            else:
                self._seconds[name] = self._seconds.get(name, 0.0) + count

    def seconds(self) -> dict[str, float]:
        """Seconds by step, and the "total" since the clock was created and of the runs that it continues."""
        self._switch()
        total = self._earlier + time.perf_counter() - self._start
        return {**{name: round(s, 3) for name, s in self._seconds.items()}, _TOTAL: round(total, 3)}

    def _switch(self) -> None:
        """Add the time since the last call to the innermost step."""
        now = time.perf_counter()
        if self._stack:
            self._seconds[self._stack[-1]] = self._seconds.get(self._stack[-1], 0.0) + now - self._mark
        self._mark = now


def peak_memory() -> int:
    """Peak resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

"""When to save: so that saving costs at most a fixed share of the run's time."""

from __future__ import annotations

import time
from collections.abc import Callable

# Largest share of a run's time that goes into saving.
SHARE = 0.03


class Pace:
    """Decides when enough work was done since the last save to save again.

    A save is due once the work since the last one took 1 / SHARE times as long as the last save. So a kill costs at
    most 33 times the time of a save, and the work in progress.

    first: seconds of work before the first save.
    """

    def __init__(self, first: float = 0.0) -> None:
        self._cost = first * SHARE
        self._last = time.perf_counter()

    @property
    def is_due(self) -> bool:
        """Whether to save now."""
        return time.perf_counter() - self._last >= self._cost / SHARE

    def save(self, action: Callable[[], None]) -> None:
        """Save by calling `action`, and measure its time."""
        start = time.perf_counter()
        action()
        self._last = time.perf_counter()
        self._cost = self._last - start

"""Keep the state of a long loop in a journal, so that a killed run goes on from the last state that was kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from subnibble.resume.interrupt import safe_point, stop_requested
from subnibble.resume.journal import Journal
from subnibble.resume.pace import Pace

# The state of a loop: values for JSON, and tensors.
State = tuple[Any, Sequence[Tensor]]
# Seconds of work before a state is kept: a shorter loop is faster run again.
FIRST = 5.0
_log = logging.getLogger(__name__)


class Keeper:
    """Keeps the state of one loop as one step of a journal.

    journal: None keeps nothing.
    name: name of the step.
    facts: returns further values to record with each state, such as the seconds so far.
    """

    def __init__(
        self, journal: Journal | None = None, name: str = "", facts: Callable[[], Mapping[str, Any]] = dict
    ) -> None:
        self._journal, self._name, self._facts = journal, name, facts
        self._pace = Pace(FIRST)

    def kept(self) -> tuple[Any, list[Tensor]] | None:
        """The state that an earlier run kept last, with its tensors on the CPU; None if there is none."""
        if self._journal is None or self._name not in self._journal.steps:
            return None
        return self._journal.value(self._name)["state"], self._journal.tensors(self._name)

    def keep(self, state: Callable[[], State]) -> None:
        """Keep the state if saving is due, or if the user asked to stop; stop in the latter case.

        state: returns the state; called only if it is kept.
        """
        journal = self._journal
        if journal is not None and (self._pace.is_due or stop_requested()):

            def record() -> None:
                value, tensors = state()
                journal.record({self._name: {"state": value, **self._facts()}}, tensors)

            try:
                self._pace.save(record)
            except OSError as error:
                if not journal.is_optional:
                    raise
                _log.warning("%s (%s): this command cannot be resumed from here on", journal.folder, error.strerror)
                self._journal = None
        safe_point()

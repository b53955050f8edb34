"""End a text at a stop string, which may be spread over several pieces of it."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Passes pieces of a text on, up to the first stop string; an ending that may begin one is held back.

    The result does not depend on how the text is divided: the stop string that is complete first counts, of several
    the longest.

    stops: the stop strings, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Add a piece; returns the text that can be shown, and whether a stop string was found."""
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        shown, self._held = text[: len(text) - kept], text[len(text) - kept :]
        return shown, False

    def rest(self) -> str:
        """The text that is still held back, once the text has ended otherwise."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest ending of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

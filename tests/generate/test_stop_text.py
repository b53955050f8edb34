"""Stop strings over pieces of text: however the text is divided, it ends before the one that is complete first."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from subnibble.generate.stop_text import StopText


def passed(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    """The text that is shown, and whether it ended at a stop string."""
    stopper, shown = StopText(stops), ""
    for piece in pieces:
        text, has_stopped = stopper.push(piece)
        shown += text
        if has_stopped:
            return shown, True
    return shown + stopper.rest(), False


def divided(text: str) -> list[list[str]]:
    """All divisions of a text into pieces."""
    ways = itertools.product(("", "|"), repeat=len(text))
    return ["".join(map("".join, zip(text, marks, strict=True))).split("|") for marks in ways]


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    ends = [(end, end - len(stop)) for end in range(len(text) + 1) for stop in stops if text[:end].endswith(stop)]
    return (text[: min(ends)[1]], True) if ends else (text, False)


@given(st.text("ab", max_size=7), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_the_result_does_not_depend_on_how_the_text_is_divided(text: str, stops: list[str]) -> None:
    target = expected(text, stops)
    assert all(passed(pieces, stops) == target for pieces in divided(text))


def test_nothing_of_a_stop_string_is_shown_before_it_is_known_to_be_none() -> None:
    stopper = StopText(["</end>", "ndx"])
    assert stopper.push("say </") == ("say ", False)
    assert stopper.push("en") == ("", False)
    assert stopper.push("d!") == ("</end!", False)
    assert stopper.push("</end") == ("", False)
    assert stopper.push(">more") == ("", True)
    assert stopper.rest() == ""
    assert StopText([]).push("all") == ("all", False)

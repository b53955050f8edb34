"""Settings of self-calibration: how the model itself writes the calibration windows (`--calibration self`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from subnibble.errors import BadRecipe
from subnibble.tensor.scheme_checks import known_fields
from subnibble.text_file import check_characters

# The name of the calibration data that the model writes itself.
SELF = "self"
AUTO = "auto"
# How a document may begin; several are joined by "+".
STARTS = ("bos", "vocabulary", "chat")
_JOIN = "+"


@dataclass(frozen=True)
class WindowSampling:
    """How the model writes calibration windows.

    start: what a document begins with. "bos": BOS. "vocabulary": a token drawn from the vocabulary, then the four most
        likely tokens (LLM-QAT). "chat": what the chat template writes before a user's message (Magpie). Several joined
        by "+" take turns. "auto": "bos" if the tokenizer puts BOS before texts, else "vocabulary"; with a chat
        template, "+chat".
    prompts: texts that documents begin with instead, in turn; empty for none.
    temperature: divides the logits before a token is drawn; above 0.
    top_k: number of most likely tokens that may be drawn; 0 for all.
    top_p: tokens may be drawn that are needed for this total probability; 1 for all.
    min_p: tokens may be drawn whose probability is at least this share of the largest one; 0 for all.

    Raises `BadRecipe` for a value that cannot be used.
    """

    start: str = AUTO
    prompts: tuple[str, ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        prompts = (self.prompts,) if isinstance(self.prompts, str) else self.prompts
        if not isinstance(prompts, tuple | list) or not all(isinstance(text, str) and text for text in prompts):
            raise BadRecipe(f"sampling prompts are {prompts!r}; give texts that are not empty")
        for text in prompts:
            check_characters(text, "sampling prompts", BadRecipe)
        object.__setattr__(self, "prompts", tuple(prompts))
        self._check_start()
        if self.temperature == 0:
            raise BadRecipe(
                "sampling temperature is 0, by which all windows with one beginning would be the same; give a number "
                "above 0"
            )
        self._check("temperature", "a number above 0", lambda value: 0 < value < float("inf"))
        self._check("top_p", "a number above 0 and at most 1", lambda value: 0 < value <= 1)
        self._check("min_p", "a number from 0 to 1", lambda value: 0 <= value <= 1)
        if type(self.top_k) is not int or self.top_k < 0:
            raise BadRecipe(f"sampling top_k is {self.top_k!r}; give a whole number, 0 or larger")

    @property
    def starts(self) -> tuple[str, ...]:
        """The beginnings that take turns, of `STARTS`; (AUTO,) if the tokenizer decides."""
        return tuple(self.start.split(_JOIN))

    def _check_start(self) -> None:
        known = isinstance(self.start, str) and (self.start == AUTO or {*self.starts} <= {*STARTS})
        if not known or len({*self.starts}) < len(self.starts):
            raise BadRecipe(
                f"sampling start is {self.start!r}; choose {AUTO}, one of {', '.join(STARTS)}, or several of these "
                f'joined by "{_JOIN}"'
            )
        if self.prompts and self.start != AUTO:
            raise BadRecipe(
                f"sampling has prompts, and start is {self.start!r}; documents begin with one or the other, leave one "
                "of them out"
            )

    def _check(self, name: str, target: str, fits: Any) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
            raise BadRecipe(f"sampling {name} is {value!r}; give {target}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as a plain dictionary, the inverse of `from_dict`."""
        return asdict(self) | {"prompts": list(self.prompts)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a recipe's table; an unknown key is an error."""
        return cls(**known_fields(cls, values, "unknown key {} of sampling"))


def joined(starts: list[str]) -> str:
    """The value of `start` for beginnings that take turns."""
    return _JOIN.join(starts)

"""Decode tokens to text as they come.

A character of several bytes may be spread over several tokens. Until it is complete, tokenizers decode its bytes to
U+FFFD; such an ending is held back, and dropped if the text ends with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Turns the tokens of one sequence into pieces of text; special tokens have none.

    Together the pieces are the text of all tokens, without a character that is cut off at the end.

    tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Tokens whose text is out already. The next ones are decoded after them, because many tokenizers drop a space
        # at the start of a text.
        self._before: list[int] = []
        self._new: list[int] = []
        # What is out of the text of `_before` and `_new`.
        self._out = ""

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now known, or an empty string."""
        self._new.append(token)
        text = decode(self._tokenizer, [*self._before, *self._new])
        known = text.rstrip(_REPLACEMENT)
        is_complete = known == text
        if known.startswith(self._out):
            piece = known[len(self._out) :]
        elif is_complete:
            # Bytes that are no UTF-8 changed the text of the tokens before them, which is out already.
            piece = decode(self._tokenizer, self._new)
        else:
            piece = ""
        self._out += piece
        if is_complete and piece:
            self._before, self._new = self._new, []
            self._out = decode(self._tokenizer, self._before)
        return piece


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of tokens, without special tokens. tokenizer: of transformers."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

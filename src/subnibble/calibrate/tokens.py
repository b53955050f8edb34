"""Token ids of a text: the one place that calls a tokenizer.

A tokenizer may give token types, offsets or more beside the ids; models are fed the ids alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from subnibble.errors import CalibrationError
from subnibble.text_file import check_characters


def text_ids(tokenizer: Any, text: str, where: str) -> list[int]:
    """Ids of `text` in one piece, without special tokens. where: what the text is, for an error."""
    check_characters(text, where, CalibrationError)
    return _flat(tokenizer(text, add_special_tokens=False, verbose=False), where)


def prompt_ids(tokenizer: Any, text: str, where: str) -> list[int]:
    """As `text_ids`, with the special tokens that the tokenizer adds by itself; with none if the text begins by BOS, as
    a chat template may have it.
    """
    if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        return text_ids(tokenizer, text, where)
    check_characters(text, where, CalibrationError)
    return _flat(tokenizer(text, verbose=False), where)


def bos_token(tokenizer: Any) -> int | None:
    """The BOS id if the tokenizer begins texts with it by itself, else None."""
    ids = _flat(tokenizer("a", verbose=False), "a text of one letter")
    bos = tokenizer.bos_token_id
    return int(bos) if bos is not None and ids and ids[0] == bos else None


def check_vocabulary(tokens: Tensor, vocabulary: int, where: str) -> None:
    """Raise `CalibrationError` if ids of `where` are none of the `vocabulary` that the model has rows for."""
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise CalibrationError(
            f"{where}: token ids run from {int(tokens.min())} to {int(tokens.max())}, the model knows 0 to "
            f"{vocabulary - 1}; were they made with another tokenizer, or with tokens that were added without resizing "
            "the model?"
        )


def _flat(encoded: Any, where: str) -> list[int]:
    ids = encoded["input_ids"]
    if not all(isinstance(token, int) for token in ids):
        raise CalibrationError(f"{where}: the tokenizer gave no plain list of ids; use one that transformers loads")
    return list(ids)

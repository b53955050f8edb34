"""Token ids of a text. No other file calls a tokenizer.

Tokenizers may also return token types, offsets and more; models get the ids alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from subnibble.errors import CalibrationError
from subnibble.text_file import check_characters


def text_ids(tokenizer: Any, text: str, where: str) -> list[int]:
    """Tokenize `text` in one piece, without special tokens.

    tokenizer: of transformers.
    where: what the text is, for errors.
    """
    check_characters(text, where, CalibrationError)
    return _flat(tokenizer(text, add_special_tokens=False, verbose=False), where)


def prompt_ids(tokenizer: Any, text: str, where: str) -> list[int]:
    """Tokenize a prompt with the special tokens that the tokenizer adds; with none if the text already begins with BOS.

    A chat template may have written that BOS. tokenizer, where: as in `text_ids`.
    """
    if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        return text_ids(tokenizer, text, where)
    check_characters(text, where, CalibrationError)
    return _flat(tokenizer(text, verbose=False), where)


def bos_token(tokenizer: Any) -> int | None:
    """The id of BOS if the tokenizer puts BOS before texts, else None."""
    ids = _flat(tokenizer("a", verbose=False), "a text of one letter")
    bos = tokenizer.bos_token_id
    return int(bos) if bos is not None and ids and ids[0] == bos else None


def plain_tokens(tokenizer: Any, vocabulary: int) -> list[int]:
    """The ids of all tokens that are text, sorted: those that are not special, and that the model knows.

    tokenizer: of transformers.
    vocabulary: rows of the embedding of the model.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(id for id, token in added.items() if getattr(token, "special", False))}
    return [token for token in range(min(len(tokenizer), vocabulary)) if token not in special]


def check_vocabulary(tokens: Tensor, vocabulary: int, where: str) -> None:
    """Raise `CalibrationError` if a token id has no row in the embedding of the model.

    tokens: token ids, any shape.
    vocabulary: rows of the embedding.
    where: what the tokens are, for the error.
    """
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise CalibrationError(
            f"{where}: token ids run from {int(tokens.min())} to {int(tokens.max())}, the model knows 0 to "
            f"{vocabulary - 1}; are they from another tokenizer, or were tokens added without resizing the model?"
        )


def _flat(encoded: Any, where: str) -> list[int]:
    ids = encoded["input_ids"]
    if not all(isinstance(token, int) for token in ids):
        raise CalibrationError(
            f"{where}: the tokenizer gave no plain list of ids; use a tokenizer that transformers loads"
        )
    return list(ids)

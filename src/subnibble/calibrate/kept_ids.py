"""Token ids of the last texts of this process: recipes that are compared share a text, which takes seconds to tokenize.
They also share the windows that a model wrote itself, which takes minutes.

A text is known by its hash and its tokenizer's: the same text through another tokenizer object of the same vocabulary,
merges and normalization is not tokenized again.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from subnibble.calibrate.tokens import text_ids

# Calibration and test text of two models.
_MOST_TEXTS = 4
_Key = tuple[type, bool, bytes, bytes]
# The most recently used text is last.
_kept: OrderedDict[_Key, Tensor] = OrderedDict()
# Windows of the last model: key -> (ids, backend that ran the model, why).
_windows: dict[str, tuple[Tensor, str, str]] = {}


def kept_ids(tokenizer: Any, text: str, where: str) -> Tensor:
    """Token ids of `text` in one piece, without special tokens: int32 (tokens,), not to be changed.

    tokenizer: of transformers.
    where: what the text is, for errors.
    """
    key = _key(tokenizer, text)
    ids = None if key is None else _kept.get(key)
    if ids is None:
        ids = torch.tensor(text_ids(tokenizer, text, where), dtype=torch.int32)
    if key is not None:
        _kept[key] = ids
        _kept.move_to_end(key)
        while len(_kept) > _MOST_TEXTS:
            _kept.popitem(last=False)
    return ids


def kept_windows(key: str) -> tuple[Tensor, str, str] | None:
    """The windows that were kept last, if they have this key: (ids (n, t) int64, backend, why); None otherwise.

    key: a digest of everything that the ids depend on.
    """
    return _windows.get(key)


def keep_windows(key: str, ids: Tensor, backend: str, reason: str) -> None:
    """Keep windows that a model wrote, in place of earlier ones.

    key: as in `kept_windows`.
    ids: (n, t) int64, not to be changed.
    backend, reason: what ran the model, and why.
    """
    _windows.clear()
    _windows[key] = (ids, backend, reason)


def _key(tokenizer: Any, text: str) -> _Key | None:
    """What decides the ids; None for a tokenizer that is written in Python, whose state is not known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    splits_special = bool(getattr(tokenizer, "split_special_tokens", False))
    return type(tokenizer), splits_special, _hash(backend.to_str()), _hash(text)


def _hash(text: str) -> bytes:
    # `text_ids` refuses halves of surrogate pairs; here they need no more than a hash.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()

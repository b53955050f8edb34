"""Integers packed into int32 words, as GPTQ and compressed-tensors store them.

Both are our own bit stream: the first integer has the lowest bits of the first word, and a word's bytes are stored
lowest first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subnibble.tensor.packed import unpack_codes

_WORD = 32


def word_count(count: int, bits: int) -> int:
    """Number of words that hold `count` integers of `bits` bits without gaps."""
    return -(-count * bits // _WORD)


def gapped_word_count(count: int, bits: int) -> int:
    """Number of words if no integer may lie in two words."""
    return -(-count // (_WORD // bits))


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpack words (n, word_count) int32 to (n, count) uint8."""
    stream = words.contiguous().view(torch.uint8)[:, : -(-count * bits // 8)]
    return unpack_codes(stream, bits, count)


def unpack_gapped_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpack words (n, gapped_word_count) int32 to (n, count) uint8; the highest bits of a word are unused."""
    shifts = torch.arange(_WORD // bits, dtype=torch.int32) * bits
    codes: Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(1)[:, :count]

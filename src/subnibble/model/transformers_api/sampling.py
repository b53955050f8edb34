"""How `generate` of transformers changes logits before a token is drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import LongTensor, Tensor


def logits_processors(
    repetition_penalty: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """The processors that `generate` would use for these settings, in its order, as one function.

    repetition_penalty: 1 for none.
    temperature: 0 for the most likely token; then all settings but the penalty are ignored.
    top_k: 0 for all tokens.
    top_p: 1 for all tokens.
    min_p: 0 for all tokens.
    Returns (token ids so far (b, t) int64, logits (b, vocabulary)) -> changed logits (b, vocabulary), -inf for tokens
    that must not be drawn.
    """
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    processors = LogitsProcessorList()
    if repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(repetition_penalty)))
    if temperature > 0:
        if temperature != 1:
            processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_k > 0:
            processors.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            processors.append(TopPLogitsWarper(float(top_p)))
        if min_p > 0:
            processors.append(MinPLogitsWarper(float(min_p)))
    return lambda ids, logits: processors(cast(LongTensor, ids), logits)

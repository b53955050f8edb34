"""The mean of a block's keys, which its cache codes them less (`CacheScheme.key_center`).

Some channels of a key are nearly the same for all tokens; a token's range, from its least to its largest channel, is
mostly these. Less their mean over calibration text, what is left to code is what tells tokens apart.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from subnibble.cache_scheme import CacheScheme
from subnibble.calibrate.prefix import Kept, States, behind
from subnibble.calibrate.sinks import ordinary_tokens
from subnibble.errors import NumericalFailure
from subnibble.model.skeleton import Block
from subnibble.runtime.coded_text import as_coded
from subnibble.runtime.kv_cache import Coding

# More tokens would move a mean by next to nothing.
_TOKENS = 8192


def coding_of(
    block: Block,
    scheme: CacheScheme | None,
    hidden: list[Tensor],
    arguments: Mapping[str, Any],
    states: States | None,
    dtype: torch.dtype,
) -> Coding | None:
    """How the block's cache codes by `scheme`, None for not at all.

    block: transformed, not quantized. hidden: its inputs, batches (windows, tokens, channels), none only where no mean
    is needed. arguments: of `Skeleton.block_arguments`. states: of a prefix before the windows, or None. dtype: of the
    streams.
    """
    if scheme is None:
        return None
    if scheme.key_center == "none":
        return Coding(scheme)
    twin = replace(block, module=copy.deepcopy(block.module).to(dtype))
    return Coding(scheme, _mean(twin, scheme, hidden, arguments, states))


def _mean(
    block: Block, scheme: CacheScheme, hidden: list[Tensor], arguments: Mapping[str, Any], states: States | None
) -> Tensor:
    """(heads, width) float16: of ordinary tokens' keys in the basis in which they are coded."""
    device = next(block.module.parameters()).device
    sums: list[Tensor] = []
    count = 0
    for batch in hidden:
        kept = _KeptBehind(behind(arguments, states).get("past_key_values"))
        with torch.no_grad():
            block.module(batch.to(device), **{**arguments, "past_key_values": kept})
        keys = as_coded(kept.keys, scheme, arguments["position_embeddings"]).transpose(0, 1).flatten(1, 2)
        ordinary = ordinary_tokens(batch)
        sums.append(keys[:, ordinary.to(device)].double().sum(1))
        count += int(ordinary.sum())
        if count >= _TOKENS:
            break
    mean = (sum(sums[1:], sums[0]) / max(count, 1)).to(torch.float16)
    if not bool(mean.isfinite().all()):
        raise NumericalFailure(f'{block.path}: the mean of its keys does not fit float16; use key_center = "none"')
    return mean


class _KeptBehind(Kept):
    """Keeps a text's keys and values, and gives them behind what `past`, of `behind`, holds; None for nothing."""

    def __init__(self, past: Any) -> None:
        self._past = past

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> States:
        """keys, values: (b, heads, tokens, width)."""
        super().update(keys, values)
        found: States = (keys, values) if self._past is None else self._past.update(keys, values)
        return found

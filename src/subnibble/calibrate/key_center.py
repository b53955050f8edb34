"""The mean of a block's keys, which the KV cache subtracts before it quantizes them (`CacheScheme.key_center`).

Some key channels are large and nearly the same for all tokens, and dominate the range (largest minus smallest channel)
of every token's key. Without their mean over calibration text, keys have a smaller range: what differs between tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subnibble.calibrate.sinks import ordinary_tokens
from subnibble.errors import NumericalFailure
from subnibble.model.skeleton import Block
from subnibble.model.transformers_api.blocks import BlockCache, BlockCall, run_block
from subnibble.model.transformers_api.names import never_called
from subnibble.runtime.kv_cache import CacheQuantizer
from subnibble.runtime.quantized_text import as_quantized
from subnibble.tensor.cache_scheme import CacheScheme

# More tokens would hardly move the mean.
_TOKENS = 10_240


class KeyMean:
    """Mean of the keys of ordinary tokens (no attention sinks); a `Statistic`, merged in the order of windows.

    enough: number of ordinary tokens after which no further window counts; the window that reaches it counts fully.

    Sums are kept per window, so that the value does not depend on where the text was split, not even by rounding.
    """

    def __init__(self, enough: int = _TOKENS) -> None:
        self._enough = enough
        # For each window: the sum of its keys, (heads, width) float64, and the number of tokens in that sum.
        self._windows: list[tuple[Tensor, int]] = []

    @property
    def is_full(self) -> bool:
        """Whether there are enough tokens, so that further windows do not count."""
        return sum(count for _, count in self._windows) >= self._enough

    def update(self, keys: Tensor, ordinary: Tensor) -> None:
        """Add windows.

        keys: (windows, heads, tokens, width).
        ordinary: (windows, tokens) bool, whether a token counts.
        """
        for window, mask in zip(keys, ordinary.to(keys.device), strict=True):
            if self.is_full:
                return
            self._windows.append((window[:, mask].double().sum(1), int(mask.sum())))

    def merge(self, other: KeyMean) -> None:
        """Add the windows of `other`, which come after those of this one, until there are enough tokens."""
        for total, count in other._windows:
            if self.is_full:
                return
            self._windows.append((total, count))

    @property
    def value(self) -> Tensor:
        """The mean, (heads, width) float64; at least one window must have been added."""
        (first, _), *others = self._windows
        total = sum((window_sum.to(first.device) for window_sum, _ in others), first)
        return total / max(sum(count for _, count in self._windows), 1)


def cache_quantizer_of(
    block: Block, scheme: CacheScheme | None, hidden: list[Tensor], call: BlockCall
) -> CacheQuantizer | None:
    """How the KV cache of a block is quantized, with the key mean if `scheme` subtracts one; None if not quantized.

    block: the block, in the state in which its keys are averaged.
    scheme: scheme of the KV cache, or None.
    hidden: inputs of the block, batches (windows, tokens, channels); may be empty only if `scheme` needs no mean.
    call: arguments of the block, from `Skeleton.block_calls`.
    """
    if scheme is None:
        return None
    return CacheQuantizer(scheme, _mean(block, scheme, hidden, call) if scheme.is_centered else None)


def _mean(block: Block, scheme: CacheScheme, hidden: list[Tensor], call: BlockCall) -> Tensor:
    """Mean (heads, width) float16 of the keys of ordinary tokens, in the basis in which the cache quantizes keys."""
    device = next(block.module.parameters()).device
    key_mean = KeyMean()
    for batch in hidden:
        if key_mean.is_full:
            break
        keys = _keys(block, batch.to(device), call)
        key_mean.update(as_quantized(keys, scheme, call.positions), ordinary_tokens(batch))
    mean = key_mean.value.to(torch.float16)
    if not bool(mean.isfinite().all()):
        raise NumericalFailure(
            f'{block.path}: the mean of its keys exceeds the range of float16; use key_center = "none"'
        )
    return mean


def _keys(block: Block, hidden: Tensor, call: BlockCall) -> Tensor:
    """Keys (b, heads, tokens, width) of a batch, rotary positions applied. The forward pass ends at the KV cache."""
    try:
        with torch.no_grad():
            run_block(block.module, hidden, call.with_cache(_Stop()))
    except _KeysReached as reached:
        return reached.keys
    raise never_called(f"the KV cache of {block.path}")


class _KeysReached(Exception):
    """Ends a forward pass when attention updates the KV cache; carries the keys."""

    def __init__(self, keys: Tensor) -> None:
        super().__init__()
        self.keys = keys


class _Stop(BlockCache):
    """Replaces the KV cache, and ends the forward pass at its first update."""

    def attended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """End the forward pass with `_KeysReached`. keys, values: (b, heads, tokens, width)."""
        raise _KeysReached(keys)

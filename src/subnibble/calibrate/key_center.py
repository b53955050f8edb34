"""The mean of a block's keys, which its cache subtracts before it quantizes them (`CacheScheme.key_center`).

Some channels of a key are nearly the same for all tokens; a token's range, from its least to its largest channel, is
mostly these. Less their mean over calibration text, what is left to code is what tells tokens apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subnibble.calibrate.sinks import ordinary_tokens
from subnibble.errors import NumericalFailure
from subnibble.model.skeleton import Block
from subnibble.model.transformers_api.blocks import BlockCache, BlockCall, run_block
from subnibble.model.transformers_api.names import never_called
from subnibble.runtime.kv_cache import Coding
from subnibble.runtime.quantized_text import as_quantized
from subnibble.tensor.cache_scheme import CacheScheme

# More tokens would move a mean by next to nothing.
_TOKENS = 10_240


class KeyMean:
    """Mean of ordinary tokens' keys over the first windows that hold `enough` of them: a `Statistic`, merged in order.

    The window in which the last of them comes counts whole, and none after it. Sums are kept by window: where parts
    were cut leaves no trace, not even in rounding.
    """

    def __init__(self, enough: int = _TOKENS) -> None:
        self._enough = enough
        # Of each window: the sum of its keys (heads, width) float64, and how many they are.
        self._windows: list[tuple[Tensor, int]] = []

    @property
    def is_full(self) -> bool:
        """Whether no window that comes would count."""
        return sum(count for _, count in self._windows) >= self._enough

    def update(self, keys: Tensor, ordinary: Tensor) -> None:
        """Add windows. keys: (windows, heads, tokens, width). ordinary: (windows, tokens) bool, tokens that count."""
        for window, mask in zip(keys, ordinary.to(keys.device), strict=True):
            if self.is_full:
                return
            self._windows.append((window[:, mask].double().sum(1), int(mask.sum())))

    def merge(self, other: KeyMean) -> None:
        """See `Statistic`."""
        for total, count in other._windows:
            if self.is_full:
                return
            self._windows.append((total, count))

    @property
    def value(self) -> Tensor:
        """See `Statistic`: (heads, width) float64, of one window at least."""
        (first, _), *others = self._windows
        total = sum((own.to(first.device) for own, _ in others), first)
        return total / max(sum(count for _, count in self._windows), 1)


def coding_of(block: Block, scheme: CacheScheme | None, hidden: list[Tensor], call: BlockCall) -> Coding | None:
    """How the block's cache quantizes by `scheme`, None for not at all.

    block: its keys are averaged as it is. hidden: its inputs, batches (windows, tokens, channels), none only where no
    mean is needed. call: of `Skeleton.block_calls`.
    """
    if scheme is None:
        return None
    return Coding(scheme, _mean(block, scheme, hidden, call) if scheme.is_centered else None)


def _mean(block: Block, scheme: CacheScheme, hidden: list[Tensor], call: BlockCall) -> Tensor:
    """(heads, width) float16: of ordinary tokens' keys in the basis in which they are quantized."""
    device = next(block.module.parameters()).device
    found = KeyMean()
    for batch in hidden:
        if found.is_full:
            break
        keys = _keys(block, batch.to(device), call)
        found.update(as_quantized(keys, scheme, call.positions), ordinary_tokens(batch))
    mean = found.value.to(torch.float16)
    if not bool(mean.isfinite().all()):
        raise NumericalFailure(f'{block.path}: the mean of its keys does not fit float16; use key_center = "none"')
    return mean


def _keys(block: Block, hidden: Tensor, call: BlockCall) -> Tensor:
    """Keys (b, heads, tokens, width) of a batch, positions put on. The block runs no further than to its cache."""
    try:
        with torch.no_grad():
            run_block(block.module, hidden, call.with_cache(_Stop()))
    except _KeysReached as reached:
        return reached.keys
    raise never_called(f"the KV cache of {block.path}")


class _KeysReached(Exception):
    """Ends a forward pass at the cache."""

    def __init__(self, keys: Tensor) -> None:
        super().__init__()
        self.keys = keys


class _Stop(BlockCache):
    """Stands for a cache that attention updates."""

    def see(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See `BlockCache`; ends the pass."""
        raise _KeysReached(keys)

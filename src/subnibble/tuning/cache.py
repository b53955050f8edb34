"""Keys and values of a tuned block as its attention reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.calibrate.prefix import States, after_states
from subnibble.model.transformers_api.blocks import BlockCache
from subnibble.runtime.kv_cache import CacheQuantizer
from subnibble.runtime.quantized_text import quantized_keys, quantized_values
from subnibble.tuning.linear import TunedInput


@dataclass
class TunedCache:
    """Quantizes keys and values as the KV cache does, and divides values by the smoothing factors of the sites.

    quantizer: how keys and values are quantized from now on; None keeps them at 16 bits.
    prefix: keys and values of the prompt prefix in the block without smoothing factors, or None.
    sites: site name -> the input of its readers, which has the smoothing factors.
    """

    quantizer: CacheQuantizer | None
    prefix: States | None
    sites: Mapping[str, TunedInput]

    def of_text(self, positions: tuple[Tensor, Tensor]) -> BlockCache:
        """The stand-in for the KV cache that attention updates with a text.

        positions: cosines and sines of the rotary embedding.
        """
        return _OfText(self, positions)

    def seen(self, keys: Tensor, values: Tensor, positions: tuple[Tensor, Tensor]) -> States:
        """Keys and values as attention reads them: quantized and dequantized, preceded by the unquantized prefix.

        keys, values: (b, heads, t, width) of the text.
        positions: cosines and sines of the rotary embedding.
        """
        prefix = self._smoothed_prefix()
        # Query and key norms (Qwen3) return float32, but attention needs a single dtype.
        values = self._smoothed(values).to(keys.dtype)
        if self.quantizer is not None:
            keys, values = quantized_keys(keys, self.quantizer, positions), quantized_values(values, self.quantizer)
        return (keys, values) if prefix is None else after_states(prefix, (keys, values))

    def settle_(self) -> None:
        """Divide the prefix's values by the smoothing factors, which the caller then folds into the block."""
        with torch.no_grad():
            self.prefix = self._smoothed_prefix()

    def _smoothed_prefix(self) -> States | None:
        return None if self.prefix is None else (self.prefix[0], self._smoothed(self.prefix[1]))

    def _smoothed(self, values: Tensor) -> Tensor:
        """Values (..., key-value heads, t, width) divided by their smoothing factors, as they are cached."""
        for entrance in self.sites.values():
            if entrance.smoothing is not None:
                values = entrance.smoothing.values(values)
        return values


class _OfText(BlockCache):
    """Replaces the KV cache that attention updates."""

    def __init__(self, cache: TunedCache, positions: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self._cache, self._positions = cache, positions

    def attended(self, keys: Tensor, values: Tensor) -> States:
        """Keys and values as attention reads them, (b, heads, prefix + t, width) each."""
        return self._cache.seen(keys, values, self._positions)

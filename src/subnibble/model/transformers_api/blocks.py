"""What a model calls its decoder blocks with, and a stand-in for the KV cache that a block's attention updates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from subnibble.model.transformers_api.names import CACHE_NAMES, cache_argument, never_called, unknown


class BlockCache(ABC):
    """Stands for the KV cache that a block's attention updates, and counts how often it did. updates: so far."""

    def __init__(self) -> None:
        self.updates = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As attention calls it."""
        self.updates += 1
        return self.see(key_states, value_states)

    @abstractmethod
    def see(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What attention sees of a text's keys and values, (b, heads, t, width) each, rotary positions applied."""


@dataclass(frozen=True)
class BlockCall:
    """What a model calls one of its decoder blocks with, beside hidden states.

    named: by transformers' names, without the KV cache. cache: the block's, None for none.
    """

    named: Mapping[str, Any]
    cache: BlockCache | None = None

    @property
    def positions(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the tokens' rotary positions, (1 or b, t, rotated channels) each."""
        cos, sin = self.named["position_embeddings"]
        return cos, sin

    @property
    def mask(self) -> Tensor | None:
        """Which tokens a token sees, (1 or b, 1, t, n); None for all that are not later."""
        mask: Tensor | None = self.named["attention_mask"]
        return mask

    def with_mask(self, mask: Tensor | None) -> BlockCall:
        """The same with another mask."""
        return replace(self, named={**self.named, "attention_mask": mask})

    def with_cache(self, cache: BlockCache | None) -> BlockCall:
        """The same with another cache."""
        return replace(self, cache=cache)

    def to(self, dtype: torch.dtype) -> BlockCall:
        """The same with floating-point tensors in another type."""
        return replace(self, named={name: _cast(value, dtype) for name, value in self.named.items()})


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return tuple(_cast(part, dtype) for part in value) if isinstance(value, tuple) else value


def run_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """The hidden states (b, t, d) that a decoder block makes of `hidden`.

    Raises `SilentFailure` if the call has a cache that the block's attention did not update.
    """
    cache, named = call.cache, dict(call.named)
    before = 0 if cache is None else cache.updates
    if cache is not None:
        named[cache_argument(block)] = cache
    output = block(hidden, **named)
    if cache is not None and cache.updates == before:
        raise never_called(f"the KV cache of a {type(block).__name__}")
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def record_block_calls(decoder: nn.Module, blocks: str, norm: str, hidden: Tensor, past: int) -> list[BlockCall]:
    """What a decoder calls each of its blocks with for a batch of full windows.

    blocks, norm: names in the decoder of its blocks and of the norm that follows them. hidden: (1, t, d), embedded
    windows, of no content. past: tokens before the windows, whose keys and values attention will have.
    """
    inner, last = decoder.get_submodule(blocks), decoder.get_submodule(norm)
    assert isinstance(inner, nn.ModuleList)
    recorders = [_Recorder() for _ in inner]
    setattr(decoder, blocks, nn.ModuleList(recorders))
    setattr(decoder, norm, nn.Identity())
    cache = {cache_argument(decoder): _cache_of(past, len(recorders), hidden.device)} if past else {}
    try:
        with torch.no_grad():
            decoder(inputs_embeds=hidden, use_cache=False, **cache)
    finally:
        setattr(decoder, blocks, inner)
        setattr(decoder, norm, last)
    return [recorder.call(f"block {index}") for index, recorder in enumerate(recorders)]


def _cache_of(tokens: int, layers: int, device: torch.device) -> DynamicCache:
    """A cache of so many tokens of no content: masks and positions depend on its length alone."""
    cache, empty = DynamicCache(), torch.empty(1, 1, tokens, 1, device=device)
    for layer in range(layers):
        cache.update(empty, empty, layer)
    return cache


class _Recorder(nn.Module):
    """Stands for a block: keeps its arguments, passes the hidden states on."""

    def __init__(self) -> None:
        super().__init__()
        self._named: dict[str, Any] | None = None

    def forward(self, hidden: Tensor, **named: Any) -> Tensor:
        """hidden: (1, t, d), returned as it is."""
        self._named = {name: value for name, value in named.items() if name not in CACHE_NAMES}
        return hidden

    def call(self, where: str) -> BlockCall:
        """What was recorded. where: names the block in errors."""
        if self._named is None:
            raise never_called(where)
        missing = {"position_embeddings", "attention_mask"} - self._named.keys()
        if missing:
            raise unknown(f"calls decoder blocks without {min(missing)}")
        return BlockCall(self._named)


def keys_and_values(decoder: nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of ids (1, t) in each layer, (heads, t, width) each, rotary positions applied."""
    # Without a config the cache has no sliding layers, which would keep the last tokens alone.
    cache = DynamicCache()
    with torch.no_grad():
        decoder(input_ids=ids, use_cache=True, **{cache_argument(decoder): cache})
    layers: list[Any] = list(cache.layers)
    if not layers:
        raise never_called("the KV cache of a model that was given a prefix")
    return [(layer.keys[0], layer.values[0]) for layer in layers]

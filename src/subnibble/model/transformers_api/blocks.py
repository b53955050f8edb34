"""The arguments that a model gives its decoder blocks, and a stand-in for the KV cache that a block updates."""

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
    """Base of stand-ins for the KV cache that the attention of a block updates.

    updates: number of updates so far; the caller checks it, so that a cache that is never used cannot go unnoticed.
    """

    def __init__(self) -> None:
        self.updates = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Called by attention, like `update` of a cache of transformers; counts the call."""
        self.updates += 1
        return self.attended(key_states, value_states)

    @abstractmethod
    def attended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values that attention uses for a text.

        keys, values: of the text, (b, heads, t, width) each, rotary positions applied.
        """


@dataclass(frozen=True)
class BlockCall:
    """The arguments of a decoder block, except the hidden states.

    named: arguments by transformers' names, without the KV cache.
    cache: stand-in for the KV cache, or None.
    """

    named: Mapping[str, Any]
    cache: BlockCache | None = None

    @property
    def positions(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotary positions of the tokens, (1 or b, t, rotated channels) each."""
        cos, sin = self.named["position_embeddings"]
        return cos, sin

    @property
    def mask(self) -> Tensor | None:
        """Attention mask, (1 or b, 1, t, n); None: causal attention to all earlier tokens."""
        mask: Tensor | None = self.named["attention_mask"]
        return mask

    def with_mask(self, mask: Tensor | None) -> BlockCall:
        """The same arguments with another attention mask, (1 or b, 1, t, n) or None."""
        return replace(self, named={**self.named, "attention_mask": mask})

    def with_cache(self, cache: BlockCache | None) -> BlockCall:
        """The same arguments with another KV cache, or None."""
        return replace(self, cache=cache)

    def to(self, dtype: torch.dtype) -> BlockCall:
        """The same arguments with floating-point tensors cast to `dtype`."""
        return replace(self, named={name: _cast(value, dtype) for name, value in self.named.items()})


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return tuple(_cast(item, dtype) for item in value) if isinstance(value, tuple) else value


def run_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """Run a decoder block and return its output, (b, t, d).

    block: the module.
    hidden: input, (b, t, d).
    call: the other arguments.
    Raises `SilentFailure` if `call` has a KV cache that the attention did not update.
    """
    cache, named = call.cache, dict(call.named)
    before = 0 if cache is None else cache.updates
    if cache is not None:
        named[cache_argument(block)] = cache
    output = block(hidden, **named)
    if cache is not None and cache.updates == before:
        raise never_called(f"the KV cache of a {type(block).__name__}")
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def record_block_calls(
    decoder: nn.Module, blocks: str, norm: str, hidden: Tensor, prefix_length: int
) -> list[BlockCall]:
    """The arguments that a decoder gives each of its blocks for a batch of full windows.

    decoder: the module; its blocks need not have weights.
    blocks: name in the decoder of the list of blocks.
    norm: name in the decoder of the norm after the blocks.
    hidden: embedded windows, (1, t, d); the values do not matter.
    prefix_length: number of tokens before each window, whose keys and values the attention will have.
    """
    inner, last = decoder.get_submodule(blocks), decoder.get_submodule(norm)
    assert isinstance(inner, nn.ModuleList)
    recorders = [_Recorder() for _ in inner]
    setattr(decoder, blocks, nn.ModuleList(recorders))
    setattr(decoder, norm, nn.Identity())
    cache = {cache_argument(decoder): _cache_of(prefix_length, len(recorders), hidden.device)} if prefix_length else {}
    try:
        with torch.no_grad():
            decoder(inputs_embeds=hidden, use_cache=False, **cache)
    finally:
        setattr(decoder, blocks, inner)
        setattr(decoder, norm, last)
    return [recorder.call(f"block {index}") for index, recorder in enumerate(recorders)]


def _cache_of(tokens: int, layers: int, device: torch.device) -> DynamicCache:
    """A KV cache of `tokens` tokens without meaningful values: masks and positions depend on its length alone."""
    cache, empty = DynamicCache(), torch.empty(1, 1, tokens, 1, device=device)
    for layer in range(layers):
        cache.update(empty, empty, layer)
    return cache


class _Recorder(nn.Module):
    """Replaces a block: records its arguments and returns the hidden states unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self._named: dict[str, Any] | None = None

    def forward(self, hidden: Tensor, **named: Any) -> Tensor:
        """Record the arguments. hidden: (1, t, d), returned unchanged."""
        self._named = {name: value for name, value in named.items() if name not in CACHE_NAMES}
        return hidden

    def call(self, where: str) -> BlockCall:
        """The recorded arguments. where: name of the block, for errors."""
        if self._named is None:
            raise never_called(where)
        missing = {"position_embeddings", "attention_mask"} - self._named.keys()
        if missing:
            raise unknown(f"calls decoder blocks without {min(missing)}")
        return BlockCall(self._named)


def keys_and_values(decoder: nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of a text in each layer, (heads, t, width) each, rotary positions applied.

    decoder: the module, with weights.
    ids: token ids, (1, t).
    """
    # Without a config the cache has no sliding-window layers, which would keep only the last tokens.
    cache = DynamicCache()
    with torch.no_grad():
        decoder(input_ids=ids, use_cache=True, **{cache_argument(decoder): cache})
    layers: list[Any] = list(cache.layers)
    if not layers:
        raise never_called("the KV cache of a model that was given a prefix")
    return [(layer.keys[0], layer.values[0]) for layer in layers]

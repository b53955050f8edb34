"""The backend that runs a transformers model in torch, packed or plain: the reference for faster ones.

It runs one sequence after the other, because sequences of different lengths share no cache of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from subnibble.arch import find_arch
from subnibble.arch.site import Heads
from subnibble.hf.attention import attached_cache
from subnibble.hf.cache import KVCache
from subnibble.model.transformers_api.generation import (
    logits_of,
    next_logits,
    plain_cache,
    plain_states,
    rotary_angles,
)
from subnibble.tensor.cache_scheme import CacheScheme, PrefixIds


class TorchBackend:
    """A `Backend` on a loaded transformers model, with the KV cache and the prefix that are attached to it.

    model: its attached cache and prefix must not change while slots are open.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._attached = model, attached_cache(model)
        self._caches: dict[int, Any] = {}
        self._next = 0

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self._model.config.vocab_size)

    @property
    def max_positions(self) -> int | None:
        """Largest number of tokens in a sequence, without the prefix."""
        positions = getattr(self._model.config, "max_position_embeddings", None)
        return None if positions is None else int(positions) - self._prefix_length

    @property
    def scheme(self) -> CacheScheme | None:
        """How keys and values are quantized."""
        return None if self._attached is None else self._attached.scheme

    @property
    def prefix(self) -> PrefixIds | None:
        """The prompt prefix before every sequence."""
        return None if self._attached is None else self._attached.prefix

    @property
    def _prefix_length(self) -> int:
        return 0 if self.prefix is None else len(self.prefix.ids)

    def open(self) -> int:
        """Begin an empty sequence; returns its slot."""
        return self._add(self._empty())

    def _empty(self) -> Any:
        if self._attached is None:
            return plain_cache()
        cache = self._attached.cache()
        cache.hides = False
        return cache

    def _add(self, cache: Any) -> int:
        slot, self._next = self._next, self._next + 1
        self._caches[slot] = cache
        return slot

    def close(self, slot: int) -> None:
        """End the sequence of a slot and free its keys and values."""
        del self._caches[slot]

    def length(self, slot: int) -> int:
        """Number of tokens in the sequence of a slot."""
        return int(self._caches[slot].get_seq_length())

    def forward(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to sequences; returns the logits after each one's last token, (b, vocab_size) float32."""
        rows = [
            next_logits(self._model, torch.tensor([list(new)], device=self._model.device), self._caches[slot])
            for slot, new in zip(slots, tokens, strict=True)
        ]
        return torch.stack(rows).float().cpu()

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """The logits after each token of a text, for scoring: (t, vocab_size) float32."""
        with torch.no_grad():
            return logits_of(self._model, torch.tensor([list(tokens)], device=self._model.device))[0].float().cpu()

    def crop(self, slot: int, length: int) -> None:
        """Drop the tokens of a slot after its first `length`."""
        surplus = self.length(slot) - length
        if length == 0:
            self._caches[slot] = self._empty()
        elif surplus > 0:
            self._caches[slot].crop(-surplus)

    def save(self, slot: int) -> dict[str, Tensor]:
        """Copies of a slot's keys and values on the CPU, see `Backend.save`."""
        cache = self._caches[slot]
        if isinstance(cache, KVCache):
            layers = [cache.layer(index).store.state() for index in range(len(cache.layers))]
        else:
            layers = [
                {
                    f"{kind}.exact": tensor[0].cpu().clone(memory_format=torch.contiguous_format)
                    for kind, tensor in layer
                }
                for layer in (zip(("keys", "values"), states, strict=True) for states in plain_states(cache))
            ]
        return {f"layers.{i}.{name}": tensor for i, layer in enumerate(layers) for name, tensor in layer.items()}

    def load(self, state: Mapping[str, Tensor]) -> int:
        """Begin a sequence with the keys and values that `save` returned for a slot; returns its slot."""
        if not state:
            return self.open()
        layers = [_layer(state, index) for index in range(self._model.config.num_hidden_layers)]
        cache, device, dtype = self._empty(), self._model.device, self._model.dtype
        if not isinstance(cache, KVCache):
            exact = [(layer["keys.exact"], layer["values.exact"]) for layer in layers]
            states = [
                (keys.unsqueeze(0).to(device, dtype), values.unsqueeze(0).to(device, dtype)) for keys, values in exact
            ]
            return self._add(plain_cache(states))
        width = Heads.of(self._model.config).width
        for index, layer in enumerate(layers):
            cache.layer(index).store.restore_(layer, width, dtype, device)
        if cache.scheme is not None and cache.scheme.rope == "before":
            first = self._prefix_length
            positions = torch.arange(first, first + cache.get_seq_length(), device=device).unsqueeze(0)
            decoder = self._model.get_submodule(find_arch(self._model.config.model_type).blocks.rpartition(".")[0])
            cache.positions.append(*rotary_angles(decoder, positions, dtype), batch=1)
        return self._add(cache)


def _layer(state: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    start = f"layers.{index}."
    return {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}

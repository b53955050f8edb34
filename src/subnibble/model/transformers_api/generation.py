"""Run a model: its logits, with and without a KV cache, and the cache and the defaults that `generate` uses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from subnibble.model.transformers_api.names import CACHE_NAMES, cache_argument, unknown

# The method of a model in which `generate` creates its KV cache.
_GENERATION = "_prepare_cache_for_generation"


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """The logits of a batch, (b, t, vocabulary), from a forward pass without a KV cache. ids: token ids, (b, t)."""
    logits: Tensor = model(ids, use_cache=False).logits
    return logits


def read_generation_config_(model: Any, folder: Path) -> None:
    """Load generation_config.json of `folder` into a model, if the file exists, as `from_pretrained` does."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def generation_config_of(config: Any, folder: Path) -> Any:
    """The generation config of a checkpoint, as a loaded model has it.

    config: the model's config.
    folder: with generation_config.json, if there is one.
    """
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(config)


def next_logits(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Run new tokens of a sequence and add them to its cache; returns the logits after the last one, (vocabulary,).

    ids: token ids, (1, t).
    cache: from `plain_cache`, or the KV cache that is attached to the model.
    """
    with torch.no_grad():
        output = model(ids, use_cache=True, logits_to_keep=1, **{cache_argument(model): cache})
    logits: Tensor = output.logits[0, -1]
    return logits


def plain_cache(states: Sequence[tuple[Tensor, Tensor]] = ()) -> DynamicCache:
    """A KV cache at the dtype of computation that keeps all tokens, also those that a sliding window hides.

    states: (keys, values) of each layer, (1, heads, n, width) each; without, the cache is empty.
    """
    # Without a config the cache has no sliding-window layers, which would keep only the last tokens.
    cache = DynamicCache()
    for index, (keys, values) in enumerate(states):
        cache.update(keys, values, index)
    return cache


def plain_states(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """(keys, values) of each layer of a `plain_cache`, (1, heads, n, width) each; empty before its first token."""
    layers: list[Any] = list(cache.layers)
    return [(layer.keys, layer.values) for layer in layers]


def rotary_angles(decoder: nn.Module, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions as the decoder computes them, (1, t, rotated channels) each.

    positions: (1, t).
    dtype: of the result.
    """
    rotary: Any = getattr(decoder, "rotary_emb", None)
    if rotary is None:
        raise unknown(f"has no rotary_emb in {type(decoder).__name__}")
    with torch.no_grad():
        cos, sin = rotary(torch.empty(0, dtype=dtype, device=positions.device), positions)
    return cos, sin


def set_generation_cache_(model: Any, accept: Callable[[Any], Any], check: Callable[[Any], None]) -> None:
    """Let `generate` use the KV cache that `accept` returns.

    model: changed in place.
    accept: (the caller's cache, or None) -> the cache to use.
    check: called first, with the generation config; may raise to refuse it.
    """
    if not hasattr(type(model), _GENERATION):
        raise unknown(f"has no {_GENERATION} in {type(model).__name__}")
    setattr(model, _GENERATION, _GenerationCache(accept, check))


def forget_generation_cache_(model: Any) -> None:
    """Undo `set_generation_cache_`."""
    delattr(model, _GENERATION)


@dataclass(frozen=True)
class _GenerationCache:
    """Replaces the method of a model in which `generate` creates its KV cache."""

    accept: Callable[[Any], Any]
    check: Callable[[Any], None]

    def __call__(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **named: Any) -> None:
        """Put the KV cache into `model_kwargs`."""
        self.check(generation_config)
        caches = [model_kwargs.pop(name) for name in CACHE_NAMES if name in model_kwargs]
        cache = next((cache for cache in caches if cache is not None), None)
        if generation_config.use_cache is not False or cache is not None:
            model_kwargs[_generation_name()] = self.accept(cache)


def _generation_name() -> str:
    """The name of the KV cache among the arguments that `generate` gives a model."""
    from transformers import GenerationMixin

    known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    for name in CACHE_NAMES:
        if name in known:
            return name
    raise unknown(f"calls the KV cache in generate by none of the names {', '.join(CACHE_NAMES)}")

"""Run a model: its logits, `generate`, and the KV cache that `generate` uses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subnibble.model.transformers_api.names import CACHE_NAMES, unknown

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


def continued(model: Any, ids: Tensor, settings: dict[str, Any]) -> Tensor:
    """The ids followed by the tokens that `generate` adds, (b, t + new tokens).

    The model gets token ids alone, even if the tokenizer also returned token types or more.

    ids: token ids, (b, t).
    settings: other arguments of `generate`.
    """
    output: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return output


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

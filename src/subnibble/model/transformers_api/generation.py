"""Running a model: its logits, and the cache that `generate` makes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subnibble.model.transformers_api.names import CACHE_NAMES, unknown

# The method by which `generate` makes its cache.
_GENERATION = "_prepare_cache_for_generation"


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """The logits (b, t, vocabulary) of ids (b, t), without a cache to go on with."""
    found: Tensor = model(ids, use_cache=False).logits
    return found


def read_generation_config_(model: Any, folder: Path) -> None:
    """Give a model the folder's generation_config.json, if there is one, as `from_pretrained` does."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def continued(model: Any, ids: Tensor, settings: dict[str, Any]) -> Tensor:
    """Ids (b, t) and what `generate` puts behind them: the model is fed ids alone, whatever a tokenizer gave beside.

    settings: of `generate`.
    """
    found: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return found


def set_generation_cache_(model: Any, accept: Callable[[Any], Any], check: Callable[[Any], None]) -> None:
    """Let `generate` use a cache that `accept` gives.

    accept: is given the caller's cache, or None. check: is given the generation config first, to refuse it.
    """
    if not hasattr(type(model), _GENERATION):
        raise unknown(f"has no {_GENERATION} in {type(model).__name__}")
    setattr(model, _GENERATION, _GenerationCache(accept, check))


def forget_generation_cache_(model: Any) -> None:
    """Undo `set_generation_cache_`."""
    delattr(model, _GENERATION)


@dataclass(frozen=True)
class _GenerationCache:
    """Stands for the model's method by which `generate` makes its cache."""

    accept: Callable[[Any], Any]
    check: Callable[[Any], None]

    def __call__(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **named: Any) -> None:
        """Put the cache into model_kwargs."""
        self.check(generation_config)
        given = [model_kwargs.pop(name) for name in CACHE_NAMES if name in model_kwargs]
        cache = next((cache for cache in given if cache is not None), None)
        if generation_config.use_cache is not False or cache is not None:
            model_kwargs[_generation_name()] = self.accept(cache)


def _generation_name() -> str:
    """What `generate` calls the cache among a model's arguments."""
    from transformers import GenerationMixin

    known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    for name in CACHE_NAMES:
        if name in known:
            return name
    raise unknown(f"calls the KV cache in generate by none of the names {', '.join(CACHE_NAMES)}")

"""Calls of decoders and attentions, the registries of attention functions, and the cache classes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import sdpa_mask

from subnibble.model.transformers_api.names import CACHE_NAMES, cache_argument, forward_arguments, unknown

__all__ = ["Cache", "CacheLayerMixin"]

# The argument by which an attention module hands our layer of the cache on.
_LAYER = "kv_layer"


@dataclass
class DecoderCall:
    """A call of a decoder by our names. ids: (b, t). embedded: (b, t, d), instead of ids. mask: (b, n) or deeper.

    places: (b or 1, t), positions of the tokens. cache: what the caller passes on. keeps_cache: whether the caller
    wants one back, None where the model's config says so. others: by transformers' names.
    """

    ids: Tensor | None
    embedded: Tensor | None
    mask: Any
    places: Tensor | None
    cache: Any
    keeps_cache: bool | None
    others: dict[str, Any]

    @classmethod
    def of(cls, decoder: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> Self:
        """From what a hook sees. A cache may come under an old name, since hooks run before it is renamed."""
        given = {**dict(zip(forward_arguments(type(decoder)), args, strict=False)), **named}
        caches = [given.pop(name) for name in CACHE_NAMES if name in given]
        ids, embedded, mask, places = (
            given.pop(name, None) for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
        )
        cache = next((cache for cache in caches if cache is not None), None)
        return cls(ids, embedded, mask, places, cache, given.pop("use_cache", None), given)

    def arguments(self, decoder: nn.Module) -> dict[str, Any]:
        """As the decoder takes them."""
        return {
            **self.others,
            "input_ids": self.ids,
            "inputs_embeds": self.embedded,
            "attention_mask": self.mask,
            "position_ids": self.places,
            cache_argument(decoder): self.cache,
            "use_cache": self.keeps_cache,
        }


def without_cache(output: Any) -> Any:
    """A decoder's output without the KV cache."""
    if isinstance(output, tuple):
        return tuple(part for part in output if not isinstance(part, Cache))
    names = {field.name for field in fields(output)} & set(CACHE_NAMES)
    if not names:
        raise unknown(f"calls the KV cache of {type(output).__name__} by none of the names {', '.join(CACHE_NAMES)}")
    for name in names:
        setattr(output, name, None)
    return output


@dataclass(frozen=True)
class AttentionCall:
    """A call of an attention module. hidden: (b, t, d). positions: see `BlockCall`. places: (b or 1, t), or None."""

    hidden: Tensor
    positions: tuple[Tensor, Tensor]
    places: Tensor | None
    cache: Any

    @classmethod
    def of(cls, attention: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> Self:
        """From what a hook sees."""
        given = {**dict(zip(forward_arguments(type(attention)), args, strict=False)), **named}
        missing = {"hidden_states", "position_embeddings"} - given.keys()
        if missing:
            raise unknown(f"calls {type(attention).__name__} without {min(missing)}")
        cache = given.get(cache_argument(attention))
        return cls(given["hidden_states"], given["position_embeddings"], given.get("position_ids"), cache)


def with_layer(named: Mapping[str, Any], layer: Any) -> dict[str, Any]:
    """Arguments of an attention module that hand `layer` on to the attention function."""
    return {**named, _LAYER: layer}


@dataclass(frozen=True)
class AttentionInputs:
    """What an attention function is called with. query: (b, query heads, t, width). mask: (b or 1, 1, t, n), or None.

    scaling: of the scores. window: how many tokens back a query sees, None for all. layer: see `with_layer`.
    """

    query: Tensor
    mask: Tensor | None
    scaling: float
    window: int | None
    layer: Any


def register_attention(name: str, function: Callable[[Any, AttentionInputs], Tensor]) -> None:
    """Make transformers know an attention function by `name`, with masks of truth values; safe to call again.

    function: (attention module, inputs) -> (b, t, query heads, width).
    """

    def call(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **named: Any
    ) -> tuple[Tensor, None]:
        scaling = named.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        inputs = AttentionInputs(query, attention_mask, scaling, named.get("sliding_window"), named.get(_LAYER))
        return function(module, inputs), None

    AttentionInterface.register(name, call)
    AttentionMaskInterface.register(name, sdpa_mask)


def attention_name(config: Any) -> str:
    """Under which name transformers looks for a model's attention function."""
    name: str = config._attn_implementation
    return name


def own_config_(model: Any) -> None:
    """Give a model a copy of its config: other models may share the object, and must keep their attention."""
    shared = model.config
    own = copy.deepcopy(shared)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


def set_attention_(model: Any, name: str) -> None:
    """Let a model's attentions use the function of `name`; `UnsupportedTransformers` if they do not afterwards."""
    model.set_attn_implementation(name)
    if attention_name(model.config) != name:
        raise unknown(f"does not take {name!r} for an attention function")
    # Where one of the registries does not know the name, attention would be called without masks, or not at all.
    if name not in AttentionMaskInterface() or name not in AttentionInterface():
        raise unknown(f"has no attention function, or no masks, by the name {name!r}")


def layer_index(attention: nn.Module) -> int:
    """The number of the layer that an attention module is in."""
    index: Any = attention.layer_idx
    return int(index)

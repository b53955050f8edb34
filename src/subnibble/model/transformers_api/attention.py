"""Calls of decoders and attention modules by our names, the registration of attention functions, cache classes."""

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

# The argument in which an attention module passes our layer of the KV cache on to the attention function.
_LAYER = "kv_layer"


@dataclass
class DecoderCall:
    """The arguments of a call of a decoder, by our names.

    ids: token ids, (b, t), or None.
    embedded: embedded tokens instead of ids, (b, t, d), or None.
    mask: attention mask, (b, n) or with more dimensions, or None.
    token_positions: positions of the tokens, (b or 1, t), or None.
    cache: KV cache of the caller, or None.
    keeps_cache: whether the caller wants a KV cache back; None: as the model's config says.
    others: all other arguments, by transformers' names.
    """

    ids: Tensor | None
    embedded: Tensor | None
    mask: Any
    token_positions: Tensor | None
    cache: Any
    keeps_cache: bool | None
    others: dict[str, Any]

    @classmethod
    def of(cls, decoder: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> Self:
        """From the arguments of a forward hook; the cache may have an old name, since hooks run before it is renamed.

        decoder: the module that is called.
        args: positional arguments.
        named: keyword arguments.
        """
        arguments = {**dict(zip(forward_arguments(type(decoder)), args, strict=False)), **named}
        caches = [arguments.pop(name) for name in CACHE_NAMES if name in arguments]
        ids, embedded, mask, token_positions = (
            arguments.pop(name, None) for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
        )
        cache = next((cache for cache in caches if cache is not None), None)
        return cls(ids, embedded, mask, token_positions, cache, arguments.pop("use_cache", None), arguments)

    def arguments(self, decoder: nn.Module) -> dict[str, Any]:
        """The keyword arguments of the decoder, by transformers' names."""
        return {
            **self.others,
            "input_ids": self.ids,
            "inputs_embeds": self.embedded,
            "attention_mask": self.mask,
            "position_ids": self.token_positions,
            cache_argument(decoder): self.cache,
            "use_cache": self.keeps_cache,
        }


def without_cache(output: Any) -> Any:
    """The output of a decoder, a tuple or an output object of transformers, without its KV cache."""
    if isinstance(output, tuple):
        return tuple(item for item in output if not isinstance(item, Cache))
    names = {field.name for field in fields(output)} & set(CACHE_NAMES)
    if not names:
        raise unknown(f"calls the KV cache of {type(output).__name__} by none of the names {', '.join(CACHE_NAMES)}")
    for name in names:
        setattr(output, name, None)
    return output


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of a call of an attention module, by our names.

    hidden: hidden states, (b, t, d).
    positions: cosines and sines of the rotary positions, (1 or b, t, rotated channels) each.
    token_positions: positions of the tokens, (b or 1, t), or None.
    cache: KV cache, or None.
    """

    hidden: Tensor
    positions: tuple[Tensor, Tensor]
    token_positions: Tensor | None
    cache: Any

    @classmethod
    def of(cls, attention: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> Self:
        """From the arguments of a forward hook; `UnsupportedTransformers` if hidden states or positions are missing.

        attention: the module that is called.
        args: positional arguments.
        named: keyword arguments.
        """
        arguments = {**dict(zip(forward_arguments(type(attention)), args, strict=False)), **named}
        missing = {"hidden_states", "position_embeddings"} - arguments.keys()
        if missing:
            raise unknown(f"calls {type(attention).__name__} without {min(missing)}")
        cache = arguments.get(cache_argument(attention))
        return cls(arguments["hidden_states"], arguments["position_embeddings"], arguments.get("position_ids"), cache)


def with_layer(named: Mapping[str, Any], layer: Any) -> dict[str, Any]:
    """Keyword arguments of an attention module, extended so that it passes `layer` on to the attention function.

    named: keyword arguments of the call.
    layer: our layer of the KV cache.
    """
    return {**named, _LAYER: layer}


@dataclass(frozen=True)
class AttentionInputs:
    """The arguments of an attention function, by our names.

    query: queries, (b, query heads, t, width).
    mask: attention mask, (b or 1, 1, t, n), or None.
    scaling: factor of the scores.
    window: number of tokens back that a query sees (sliding window); None: all.
    layer: what `with_layer` passed on, or None.
    """

    query: Tensor
    mask: Tensor | None
    scaling: float
    window: int | None
    layer: Any


def register_attention(name: str, function: Callable[[Any, AttentionInputs], Tensor]) -> None:
    """Register an attention function with transformers, with boolean masks; safe to call again.

    name: name of the function.
    function: (attention module, inputs) -> output, (b, t, query heads, width).
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
    """The name of a model's attention function. config: config of the model."""
    name: str = config._attn_implementation
    return name


def own_config_(model: Any) -> None:
    """Give a model its own copy of its config, because other models may share the object and must keep their attention
    function.
    """
    shared = model.config
    copied = copy.deepcopy(shared)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = copied


def set_attention_(model: Any, name: str) -> None:
    """Let all attention modules of a model use the registered function `name`.

    Raises `UnsupportedTransformers` if transformers does not use it afterwards.
    """
    model.set_attn_implementation(name)
    if attention_name(model.config) != name:
        raise unknown(f"does not accept {name!r} as an attention function")
    # If a registry did not know the name, the function would be called without masks, or not at all.
    if name not in AttentionMaskInterface() or name not in AttentionInterface():
        raise unknown(f"has no attention function, or no masks, with the name {name!r}")


def layer_index(attention: nn.Module) -> int:
    """The index of the layer that an attention module belongs to."""
    index: Any = attention.layer_idx
    return int(index)

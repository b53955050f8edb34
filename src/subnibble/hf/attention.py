"""A transformers model on a coded KV cache and behind a prefix at 16 bits: hooks, and an attention function.

No modeling file is involved. `attach_cache_` gives the model

- a hook on the decoder that makes its `KVCache`, moves positions behind the prefix, and hides what an input repeats of
  the prefix; and the same cache for `generate`;
- a hook on each attention that hands that cache's layer, which transformers gives turned keys alone, the positions, and
  the attention function the layer;
- that function, under the name `subnibble` in transformers' registry: it turns queries where keys are stored turned,
  and attends over prefix and cache (`runtime/attention.py`).

The prefix is before the text, not in it: token ids, masks and lengths of `generate` and `forward` are the text's alone.
An input that begins with the prefix's ids is taken as if it began behind them, and a BOS that the tokenizer put before
a text is dropped where the prefix begins or ends with it: these tokens stay in the ids, hidden. A row's last token is
never hidden. The first call of a text decides; what later calls bring is text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from subnibble.arch import find_arch
from subnibble.arch.site import Heads
from subnibble.checkpoint.manifest import PackedConfig
from subnibble.checkpoint.module_specs import KEY_CENTER, PREFIX, PrefixSpec, Spec
from subnibble.errors import BadRecipe
from subnibble.hf.cache import KVCache
from subnibble.model.transformers_api.attention import (
    AttentionCall,
    AttentionInputs,
    DecoderCall,
    attention_name,
    layer_index,
    own_config_,
    register_attention,
    set_attention_,
    with_layer,
    without_cache,
)
from subnibble.model.transformers_api.generation import forget_generation_cache_, set_generation_cache_
from subnibble.model.transformers_api.names import never_called
from subnibble.runtime.attention import PrefixView, attend
from subnibble.runtime.kv_cache import map_view
from subnibble.runtime.modules import PrefixStates
from subnibble.runtime.precision import as_written
from subnibble.tensor import hadamard
from subnibble.tensor.cache_scheme import CacheScheme, PrefixIds

ATTENTION = "subnibble"
_RECORD = "_subnibble_cache"


@dataclass(frozen=True)
class Attached:
    """What a model runs on. scheme: None for a cache at 16 bits. prefix: None for none. layers: of the model.

    before: its attention implementation without.
    """

    scheme: CacheScheme | None
    prefix: PrefixIds | None
    layers: int
    before: str

    def cache(self) -> KVCache:
        """A new, empty cache."""
        return KVCache(self.scheme, self.layers, self.prefix)

    def accepted(self, given: Any) -> KVCache:
        """The cache to go on with where a caller passed `given`."""
        if given is None:
            return self.cache()
        if isinstance(given, KVCache) and (given.scheme, given.prefix) == (self.scheme, self.prefix):
            return given
        kind = "KVCache of another scheme or prefix" if isinstance(given, KVCache) else type(given).__name__
        raise BadRecipe(
            f"the model keeps its cache coded, and cannot go on with a {kind}: leave the cache and "
            "cache_implementation out, or pass what the model itself returned"
        )


def attach_cache_(model: Any, scheme: CacheScheme | None, prefix: PrefixIds | None = None) -> None:
    """Let a transformers model, packed or plain, run on a `KVCache` of `scheme`, in `forward` and `generate`.

    scheme: None for a cache at 16 bits. prefix: ids of the keys and values that the model's attentions hold
    (`set_prefix_`), None for none. What was attached before is replaced.
    """
    check_cache(model, scheme)
    attentions = _attentions(model)
    detach_cache_(model)
    attached = Attached(scheme, prefix, len(attentions), attention_name(model.config))
    own_config_(model)
    decoder = _decoder(model)
    decoder.register_forward_pre_hook(_BeforeDecoder(attached), with_kwargs=True)
    decoder.register_forward_hook(_after_decoder, with_kwargs=True)
    for module in attentions:
        module.register_forward_pre_hook(_announce, with_kwargs=True)
    set_attention_(model, ATTENTION)
    setattr(model, _RECORD, attached)
    set_generation_cache_(model, attached.accepted, partial(_check_generation, attached))
    _write_config(model)


def check_cache(model: Any, scheme: CacheScheme | None) -> None:
    """Raise `BadRecipe` if a model cannot run on a cache of `scheme`."""
    if scheme is not None:
        scheme.check_width(Heads.of(model.config).width)
        _check_centers(_attentions(model), scheme)


def detach_cache_(model: Any) -> None:
    """Undo `attach_cache_`; a prefix's keys and values are dropped."""
    attached = attached_cache(model)
    if attached is None:
        return
    for module in (_decoder(model), *_attentions(model)):
        # Found by what they are: a deep copy of the model has copies of them.
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _announce or isinstance(hook, _BeforeDecoder):
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
        for key, hook in list(module._forward_hooks.items()):
            if hook is _after_decoder:
                del module._forward_hooks[key], module._forward_hooks_with_kwargs[key]
        if hasattr(module, PREFIX):
            delattr(module, PREFIX)
    set_attention_(model, attached.before)
    delattr(model, _RECORD)
    forget_generation_cache_(model)
    _write_config(model)


def attached_cache(model: Any) -> Attached | None:
    """What `attach_cache_` gave the model, None if nothing."""
    return getattr(model, _RECORD, None)


def change_scheme_(model: Any, scheme: CacheScheme | None) -> None:
    """Give a model another cache; its prefix stays."""
    attached, states = attached_cache(model), _prefix_states(model)
    attach_cache_(model, scheme, None if attached is None else attached.prefix)
    if states:
        set_prefix_(model, states)


@contextmanager
def detached(model: Any) -> Iterator[None]:
    """Without what is attached to the model; it is there again afterwards."""
    attached, states = attached_cache(model), _prefix_states(model)
    detach_cache_(model)
    try:
        yield
    finally:
        if attached is not None:
            attach_cache_(model, attached.scheme, attached.prefix)
            if states:
                set_prefix_(model, states)


def set_prefix_(model: Any, states: list[tuple[Tensor, Tensor]]) -> None:
    """Give every attention of the model its prefix's keys and values, (heads, p, width) float16 each, by layers."""
    packed = _packed_config(model) is not None
    for module, (keys, values) in zip(_attentions(model), states, strict=True):
        module.add_module(PREFIX, PrefixStates(keys, values, persistent=packed))
    _write_config(model)


def _prefix_states(model: Any) -> list[tuple[Tensor, Tensor]]:
    """What `set_prefix_` gave the model; empty if nothing."""
    held = [getattr(module, PREFIX, None) for module in _attentions(model)]
    return [states.pair() for states in held if states is not None]


def _decoder(model: Any) -> Any:
    return model.get_submodule(find_arch(model.config.model_type).blocks.rpartition(".")[0])


def _attentions(model: Any) -> list[Any]:
    arch = find_arch(model.config.model_type)
    return [block.get_submodule(arch.attention) for block in model.get_submodule(arch.blocks)]


def _check_centers(attentions: list[Any], scheme: CacheScheme) -> None:
    """Raise `BadRecipe` if keys are coded less a centre that the model does not hold."""
    if not scheme.is_centered:
        return
    centers = [getattr(module, KEY_CENTER, None) for module in attentions]
    held = {(own.rope, own.key_rotation) for own in centers if own is not None}
    if None in centers or held != {scheme.key_basis}:
        found = ", ".join(f"rope={rope}, key_rotation={rotated}" for rope, rotated in sorted(held)) or "none"
        raise BadRecipe(
            f"{scheme.name} codes keys less a centre with rope={scheme.rope}, key_rotation={scheme.key_rotation}, and "
            f"the centres that the model holds are: {found}; quantize it with key_center = mean and these settings "
            "(--method none leaves weights as they are), or use key_center = none"
        )


def _packed_config(model: Any) -> Any:
    """The `SubnibbleConfig` of a packed model, None of another."""
    found = getattr(model.config, "quantization_config", None)
    return found if isinstance(getattr(found, "packed", None), PackedConfig) else None


def _write_config(model: Any) -> None:
    """Let a packed model's config say what it runs on, so that it is saved as it is."""
    config, attached = _packed_config(model), attached_cache(model)
    if config is None:
        return
    arch = find_arch(model.config.model_type)
    modules: dict[str, Spec] = {p: e for p, e in config.packed.modules.items() if not isinstance(e, PrefixSpec)}
    for index, module in enumerate(_attentions(model)):
        if hasattr(module, PREFIX):
            modules[f"{arch.block_path(index)}.{arch.attention}"] = PrefixSpec(*module.prefix.keys.shape)
    held = any(isinstance(spec, PrefixSpec) for spec in modules.values())
    scheme, prefix = (None, None) if attached is None else (attached.scheme, attached.prefix if held else None)
    config.packed = replace(config.packed, modules=modules, cache=scheme, prefix=prefix)


def _check_generation(attached: Attached, config: Any) -> None:
    """Raise `BadRecipe` if `generate` is asked, by its config, for what an attached cache cannot do."""
    if config.cache_implementation is not None:
        raise BadRecipe("the model has a cache of its own; leave cache_implementation out")
    if config.prefill_chunk_size is not None and attached.prefix is not None:
        raise BadRecipe("a text that repeats the model's prefix must come in one piece; leave prefill_chunk_size out")


@dataclass(frozen=True)
class _BeforeDecoder:
    """A forward pre-hook that gives the decoder its cache, and positions after the prefix."""

    attached: Attached

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """As torch calls it."""
        call = DecoderCall.of(module, args, kwargs)
        prefix = self.attached.prefix
        tokens = call.embedded if call.ids is None else call.ids
        if tokens is None:
            return args, kwargs
        cache = call.cache = self.attached.accepted(call.cache)
        mask = call.mask
        flat = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
        if prefix is not None and not flat:
            raise BadRecipe("a model with a prefix takes attention masks of two dimensions, (batch, tokens)")
        if prefix is not None and call.ids is not None and cache.get_seq_length() == 0:
            cache.hidden = repeated_prefix(call.ids, mask, prefix)
        new = tokens.shape[1]
        if flat:
            call.mask = cache.visible(mask, new)
        places = call.places
        if places is None:
            places = _positions(call.mask if flat else None, cache.get_seq_length(), tokens)
        elif cache.skipped is not None:
            places = (places - cache.skipped.to(places.device)).clamp(min=0)
        call.places = places + (0 if prefix is None else len(prefix.ids))
        cache.begin(new)
        return (), call.arguments(module)


def _positions(mask: Tensor | None, past: int, tokens: Tensor) -> Tensor:
    """Places of new tokens (b, t, ...) in their texts, padding and hidden tokens not counted."""
    new = tokens.shape[1]
    if mask is None:
        return torch.arange(past, past + new, device=tokens.device).unsqueeze(0)
    return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -new:]


def repeated_prefix(ids: Tensor, mask: Tensor | None, prefix: PrefixIds) -> Tensor | None:
    """(b, t) bool: tokens at the start of each row that repeat the prefix or its BOS; None if there are none.

    ids: (b, t). mask: (b, t), 0 where a row is padded, None for no padding.
    """
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    known = torch.tensor(prefix.ids, device=ids.device)
    for row in range(ids.shape[0]):
        places = torch.arange(ids.shape[1], device=ids.device) if mask is None else mask[row].nonzero()[:, 0]
        own = ids[row, places]
        if own.shape[0] >= len(known) and torch.equal(own[: len(known)], known):
            count = len(known)
        else:
            repeats = own.shape[0] > 0 and prefix.bos == int(own[0])
            count = int(repeats and prefix.bos in (prefix.ids[0], prefix.ids[-1]))
        hidden[row, places[: min(count, own.shape[0] - 1)]] = True
    return hidden if bool(hidden.any()) else None


def _after_decoder(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook: checks that attention went through the cache, and gives none back where none was asked for, as
    some models do by themselves.
    """
    call = DecoderCall.of(module, args, kwargs)
    if isinstance(call.cache, KVCache):
        call.cache.check_read()
    elif call.ids is not None or call.embedded is not None:
        raise never_called("the hook that gives the decoder its KV cache")
    if call.keeps_cache is False:
        return without_cache(output)
    return output


def _announce(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward pre-hook of attention: hands its cache layer over."""
    call = AttentionCall.of(module, args, kwargs)
    cache = call.cache
    if not isinstance(cache, KVCache):
        raise BadRecipe(
            "an attention was called without the cache that is attached to the model, as gradient checkpointing does; "
            "switch that off, or detach the cache first (`detach_cache_`)"
        )
    if attention_name(module.config) != ATTENTION:
        raise BadRecipe(
            f"the attention implementation was set to {attention_name(module.config)!r}, which knows no coded "
            "cache; detach the cache first (`detach_cache_`)"
        )
    if cache.prefix is not None and not hasattr(module, PREFIX):
        raise BadRecipe("the model has a prefix's ids and not its keys and values; give it both (`attach_prefix_`)")
    index = layer_index(module)
    layer = cache.layer(index)
    if index == 0 and cache.scheme is not None and cache.scheme.rope == "before":
        cache.positions.append(*call.positions, call.hidden.shape[0])
    centered = cache.scheme is not None and cache.scheme.is_centered
    layer.expect(call.places, module.get_submodule(KEY_CENTER).held() if centered else None)
    return args, with_layer(kwargs, layer)


def cached_attention(module: Any, inputs: AttentionInputs) -> Tensor:
    """Attention on what a layer of the cache holds, (b, t, query heads, width)."""
    layer, query = inputs.layer, inputs.query
    if layer is None:
        raise never_called("the hook that gives an attention its layer of the KV cache")
    if inputs.mask is not None and inputs.mask.dtype != torch.bool:
        raise BadRecipe("a model on a coded cache takes masks of truth values, or of two dimensions")
    # Under autocast values may come in another type than queries and keys, which were turned by their positions.
    keys, values = (map_view(seen, lambda part: part.to(query.dtype)) for seen in layer.take())
    blocks = layer.blocks(query)
    with as_written(query.device):
        rotated = hadamard.multiply(query, blocks) if blocks else query
        prefix = None
        if hasattr(module, PREFIX):
            own, shared = module.prefix.pair()
            own = own.to(query.dtype)
            shown = _prefix_visible(query, own.shape[1], layer.queries, inputs.window)
            prefix = PrefixView(hadamard.multiply(own, blocks) if blocks else own, shared, shown)
        output = attend(rotated, keys, values, inputs.mask, inputs.scaling, prefix)
    return output.transpose(1, 2).contiguous()


def _prefix_visible(query: Tensor, length: int, positions: Tensor | None, sliding_window: int | None) -> Tensor:
    """(b or 1, 1, t, length): which tokens of the prefix are near enough to a query."""
    if sliding_window is None or positions is None:
        return torch.ones(1, 1, query.shape[2], length, dtype=torch.bool, device=query.device)
    distance = positions.unsqueeze(-1) - torch.arange(length, device=positions.device)
    return (distance < sliding_window).unsqueeze(1)


# On import, so that a model that was pickled with a cache finds them; attaching one imports this, too.
register_attention(ATTENTION, cached_attention)

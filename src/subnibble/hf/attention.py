"""Run a transformers model on a quantized KV cache and a 16-bit prompt prefix, by hooks and an attention function.

No modeling file is involved. `attach_cache_` gives the model

- a hook on the decoder. It creates the `KVCache`, shifts positions by the prefix's length, and hides input tokens that
  repeat the prefix. `generate` gets the same kind of cache;
- a hook on each attention. It passes positions to that attention's cache layer, because transformers passes the layer
  only keys to which positions are already applied. It also passes the layer to the attention function;
- the attention function, registered in transformers as `subnibble`. It rotates queries if keys are stored rotated, and
  attends over prefix and cache (`runtime/attention.py`).

The prefix comes before the text and is not part of it: token ids, masks and lengths in `generate` and `forward` are
those of the text alone. Two kinds of input tokens stay in the ids but are hidden: the prefix's ids at the start of an
input, and a BOS that the tokenizer put before a text, if the prefix begins or ends with BOS. A row's last token is
never hidden. The first call of a text decides which tokens are hidden; all tokens of later calls are text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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
    """The cache and prefix attached to a model.

    scheme: how the cache is quantized; None for 16 bits.
    prefix: the prompt prefix, None for none.
    layers: number of the model's layers.
    before: name of the attention implementation that the model had before.
    """

    scheme: CacheScheme | None
    prefix: PrefixIds | None
    layers: int
    before: str

    def cache(self) -> KVCache:
        """Create an empty cache."""
        return KVCache(self.scheme, self.layers, self.prefix)

    def accepted(self, cache: Any) -> KVCache:
        """Return the caller's `cache`, or a new one for None; `BadRecipe` if the model cannot use it."""
        if cache is None:
            return self.cache()
        if isinstance(cache, KVCache) and (cache.scheme, cache.prefix) == (self.scheme, self.prefix):
            return cache
        kind = "KVCache of another scheme or prefix" if isinstance(cache, KVCache) else type(cache).__name__
        raise BadRecipe(
            f"the model has a subnibble KV cache attached and cannot continue with a {kind}: leave the cache "
            "and cache_implementation out, or pass the cache that the model itself returned"
        )


@dataclass(frozen=True)
class _Record:
    """What a model keeps of its attached cache. A copied or pickled model has handles of its own hooks.

    attached: the cache and prefix.
    hooks: handles of the hooks on the decoder and on the attentions.
    """

    attached: Attached
    hooks: tuple[RemovableHandle, ...]


def attach_cache_(model: Any, scheme: CacheScheme | None, prefix: PrefixIds | None = None) -> None:
    """Let a transformers model run on a `KVCache` in `forward` and `generate`; replaces an attached cache and prefix.

    model: packed or plain.
    scheme: how the cache is quantized; None for 16 bits.
    prefix: ids of the prompt prefix, None for none. `set_prefix_` gives the model its keys and values.
    """
    check_cache(model, scheme)
    attentions = _attentions(model)
    detach_cache_(model)
    attached = Attached(scheme, prefix, len(attentions), attention_name(model.config))
    own_config_(model)
    decoder = _decoder(model)
    # First what may fail: a model that was refused has no hooks.
    set_attention_(model, ATTENTION)
    set_generation_cache_(model, attached.accepted, partial(_check_generation, attached))
    hooks = (
        decoder.register_forward_pre_hook(_BeforeDecoder(attached), with_kwargs=True),
        decoder.register_forward_hook(_after_decoder, with_kwargs=True),
        *(module.register_forward_pre_hook(_announce, with_kwargs=True) for module in attentions),
    )
    setattr(model, _RECORD, _Record(attached, hooks))
    _write_config(model)


def check_cache(model: Any, scheme: CacheScheme | None) -> None:
    """Raise `BadRecipe` if a model cannot run on a cache of `scheme`."""
    if scheme is not None:
        scheme.check_width(Heads.of(model.config).width)
        _check_centers(_attentions(model), scheme)


def detach_cache_(model: Any) -> None:
    """Undo `attach_cache_`, and drop the prefix's keys and values."""
    record: _Record | None = getattr(model, _RECORD, None)
    if record is None:
        return
    for hook in record.hooks:
        hook.remove()
    for module in _attentions(model):
        if hasattr(module, PREFIX):
            delattr(module, PREFIX)
    set_attention_(model, record.attached.before)
    delattr(model, _RECORD)
    forget_generation_cache_(model)
    _write_config(model)


def attached_cache(model: Any) -> Attached | None:
    """The cache and prefix that `attach_cache_` attached to the model, or None."""
    record: _Record | None = getattr(model, _RECORD, None)
    return None if record is None else record.attached


def change_scheme_(model: Any, scheme: CacheScheme | None) -> None:
    """Attach a cache of another scheme to a model, and keep its prefix."""
    attached, states = attached_cache(model), _prefix_states(model)
    attach_cache_(model, scheme, None if attached is None else attached.prefix)
    if states:
        set_prefix_(model, states)


@contextmanager
def detached(model: Any) -> Iterator[None]:
    """Context in which the model has no attached cache or prefix; both are attached again afterwards."""
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
    """Give every attention of the model the prefix's keys and values.

    states: (keys, values) of each layer, (heads, p, width) float16 each.
    """
    packed = _packed_config(model) is not None
    for module, (keys, values) in zip(_attentions(model), states, strict=True):
        module.add_module(PREFIX, PrefixStates(keys, values, persistent=packed))
    _write_config(model)


def _prefix_states(model: Any) -> list[tuple[Tensor, Tensor]]:
    """(keys, values) of each layer that `set_prefix_` gave the model; empty if there are none."""
    prefixes = [getattr(module, PREFIX, None) for module in _attentions(model)]
    return [states.pair() for states in prefixes if states is not None]


def _decoder(model: Any) -> Any:
    return model.get_submodule(find_arch(model.config.model_type).blocks.rpartition(".")[0])


def _attentions(model: Any) -> list[Any]:
    arch = find_arch(model.config.model_type)
    return [block.get_submodule(arch.attention) for block in model.get_submodule(arch.blocks)]


def _check_centers(attentions: list[Any], scheme: CacheScheme) -> None:
    """Raise `BadRecipe` if `scheme` subtracts a centre from keys and the model does not hold that centre."""
    if not scheme.is_centered:
        return
    centers = [getattr(module, KEY_CENTER, None) for module in attentions]
    bases = {(center.rope, center.key_rotation) for center in centers if center is not None}
    if None in centers or bases != {scheme.key_basis}:
        available = ", ".join(f"rope={rope}, key_rotation={rotation}" for rope, rotation in sorted(bases)) or "none"
        raise BadRecipe(
            f"{scheme.name} subtracts a centre from keys, with rope={scheme.rope}, key_rotation={scheme.key_rotation}, "
            f"but the model holds centres for: {available}; quantize the model with key_center = mean and these "
            "settings (--method none leaves weights unquantized), or use key_center = none"
        )


def _packed_config(model: Any) -> Any:
    """The `SubnibbleConfig` of a packed model; None if the model is not packed."""
    config = getattr(model.config, "quantization_config", None)
    return config if isinstance(getattr(config, "packed", None), PackedConfig) else None


def _write_config(model: Any) -> None:
    """Write the attached cache and prefix into a packed model's config, so that they are saved with it."""
    config, attached = _packed_config(model), attached_cache(model)
    if config is None:
        return
    arch = find_arch(model.config.model_type)
    modules: dict[str, Spec] = {
        path: spec for path, spec in config.packed.modules.items() if not isinstance(spec, PrefixSpec)
    }
    for index, module in enumerate(_attentions(model)):
        if hasattr(module, PREFIX):
            modules[f"{arch.block_path(index)}.{arch.attention}"] = PrefixSpec(*module.prefix.keys.shape)
    has_states = any(isinstance(spec, PrefixSpec) for spec in modules.values())
    scheme, prefix = (None, None) if attached is None else (attached.scheme, attached.prefix if has_states else None)
    config.packed = replace(config.packed, modules=modules, cache=scheme, prefix=prefix)


def _check_generation(attached: Attached, config: Any) -> None:
    """Raise `BadRecipe` if a generation config asks for something that an attached cache cannot do."""
    if config.cache_implementation is not None:
        raise BadRecipe("the model has a subnibble KV cache attached; leave cache_implementation out")
    if config.prefill_chunk_size is not None and attached.prefix is not None:
        raise BadRecipe("a model with a prefix must get the whole text in one call; leave prefill_chunk_size out")


@dataclass(frozen=True)
class _BeforeDecoder:
    """A forward pre-hook that gives the decoder its cache, and positions after the prefix."""

    attached: Attached

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the decoder's arguments with cache, mask and positions; called by torch as a forward pre-hook."""
        call = DecoderCall.of(module, args, kwargs)
        prefix = self.attached.prefix
        tokens = call.embedded if call.ids is None else call.ids
        if tokens is None:
            return args, kwargs
        cache = call.cache = self.attached.accepted(call.cache)
        mask = call.mask
        is_padding_mask = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
        if prefix is not None and not is_padding_mask:
            raise BadRecipe("a model with a prefix takes only attention masks of two dimensions, (batch, tokens)")
        if prefix is not None and cache.hides and call.ids is not None and cache.get_seq_length() == 0:
            cache.hidden = repeated_prefix(call.ids, mask, prefix)
        new = tokens.shape[1]
        if is_padding_mask:
            call.mask = cache.visible(mask, new)
        token_positions = call.token_positions
        if token_positions is None:
            token_positions = _positions(call.mask if is_padding_mask else None, cache.get_seq_length(), tokens)
        elif cache.skipped is not None:
            token_positions = (token_positions - cache.skipped.to(token_positions.device)).clamp(min=0)
        call.token_positions = token_positions + (0 if prefix is None else len(prefix.ids))
        cache.begin(new)
        return (), call.arguments(module)


def _positions(mask: Tensor | None, length: int, tokens: Tensor) -> Tensor:
    """Positions (b or 1, t) of new tokens in their texts; padding and hidden tokens do not count.

    mask: (b, n), 0 where a token does not count; None if all count.
    length: number of tokens in the cache.
    tokens: the new ones, (b, t, ...).
    """
    new = tokens.shape[1]
    if mask is None:
        return torch.arange(length, length + new, device=tokens.device).unsqueeze(0)
    return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -new:]


def repeated_prefix(ids: Tensor, mask: Tensor | None, prefix: PrefixIds) -> Tensor | None:
    """Find tokens at the start of each row that repeat the prefix or its BOS.

    ids: (b, t).
    mask: (b, t), 0 where a row is padded; None for no padding.
    Returns (b, t) bool, or None if no token repeats.
    """
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    for row in range(ids.shape[0]):
        positions = torch.arange(ids.shape[1], device=ids.device) if mask is None else mask[row].nonzero()[:, 0]
        hidden[row, positions[: prefix.repeated(ids[row, positions].tolist())]] = True
    return hidden if bool(hidden.any()) else None


def _after_decoder(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook: check that attention has read the cache, and remove the cache from the output if not asked for.

    Some models remove it themselves.
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
    """A forward pre-hook of attention: passes positions to its cache layer, and the layer to the attention function."""
    call = AttentionCall.of(module, args, kwargs)
    cache = call.cache
    if not isinstance(cache, KVCache):
        raise BadRecipe(
            "an attention was called without the cache that is attached to the model, as gradient checkpointing does; "
            "switch gradient checkpointing off, or detach the cache first (`detach_cache_`)"
        )
    if attention_name(module.config) != ATTENTION:
        raise BadRecipe(
            f"the attention implementation was set to {attention_name(module.config)!r}, which cannot read a "
            "quantized cache; detach the cache first (`detach_cache_`)"
        )
    if cache.prefix is not None and not hasattr(module, PREFIX):
        raise BadRecipe(
            "the model has the ids of a prefix but not its keys and values; attach both with "
            "`subnibble.generate.prefix.attach_prefix_`"
        )
    index = layer_index(module)
    layer = cache.layer(index)
    if index == 0 and cache.scheme is not None and cache.scheme.rope == "before":
        cache.positions.append(*call.positions, call.hidden.shape[0])
    centered = cache.scheme is not None and cache.scheme.is_centered
    layer.expect(call.token_positions, module.get_submodule(KEY_CENTER).held() if centered else None)
    return args, with_layer(kwargs, layer)


def cached_attention(module: Any, inputs: AttentionInputs) -> Tensor:
    """Attention over prefix and cache, as transformers calls it: (b, t, query heads, width)."""
    layer, query = inputs.layer, inputs.query
    if layer is None:
        raise never_called("the hook that gives an attention its layer of the KV cache")
    if inputs.mask is not None and inputs.mask.dtype != torch.bool:
        raise BadRecipe("a model with a subnibble KV cache takes only boolean or two-dimensional attention masks")
    # Under autocast, values may have another dtype than queries and keys, to which rotary positions were applied.
    keys, values = (map_view(view, lambda tensor: tensor.to(query.dtype)) for view in layer.take())
    blocks = layer.blocks(query)
    with as_written(query.device):
        rotated = hadamard.multiply(query, blocks) if blocks else query
        prefix = None
        if hasattr(module, PREFIX):
            prefix_keys, prefix_values = module.prefix.pair()
            prefix_keys = prefix_keys.to(query.dtype)
            mask = _prefix_visible(query, prefix_keys.shape[1], layer.queries, inputs.window)
            rotated_keys = hadamard.multiply(prefix_keys, blocks) if blocks else prefix_keys
            prefix = PrefixView(rotated_keys, prefix_values, mask)
        output = attend(rotated, keys, values, inputs.mask, inputs.scaling, prefix)
    return output.transpose(1, 2).contiguous()


def _prefix_visible(query: Tensor, length: int, positions: Tensor | None, sliding_window: int | None) -> Tensor:
    """Which tokens of the prefix are within each query's sliding window: (b or 1, 1, t, length) bool."""
    if sliding_window is None or positions is None:
        return torch.ones(1, 1, query.shape[2], length, dtype=torch.bool, device=query.device)
    distance = positions.unsqueeze(-1) - torch.arange(length, device=positions.device)
    return (distance < sliding_window).unsqueeze(1)


# Registered on import, so that a model that was pickled with a cache finds the function; attaching also imports this.
register_attention(ATTENTION, cached_attention)

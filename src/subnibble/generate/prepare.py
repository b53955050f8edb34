"""Change how a loaded model runs: its KV cache, its prompt prefix and the rounding of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from subnibble.errors import BadRecipe
from subnibble.generate.prefix import attach_prefix_
from subnibble.hf.attention import attached_cache, change_scheme_
from subnibble.hf.inputs import round_inputs_
from subnibble.recipe import Recipe
from subnibble.tensor.cache_scheme import CacheScheme, PrefixIds


def prepare_(
    model: Any,
    kv_bits: int | None,
    kv: Mapping[str, Any],
    prefix: PrefixIds | None,
    activations: str | None = None,
) -> None:
    """Attach a quantized KV cache and a prompt prefix to a loaded model and round its inputs, in place, where given.

    model: a transformers model.
    kv_bits: bits of the KV cache, 16 for an unquantized one; None keeps the model's.
    kv: other settings of the cache; without kv_bits they change the model's existing quantized cache.
    prefix: None keeps the model's prefix.
    activations: a name of `hf.inputs.INPUTS`, None to keep inputs as the checkpoint says.
    """
    if activations is not None:
        round_inputs_(model, activations)
    attached = attached_cache(model)
    scheme = None if attached is None else attached.scheme
    if kv_bits is not None:
        scheme = Recipe(kv_bits=kv_bits, kv=kv).cache_scheme()
    elif kv and scheme is not None:
        scheme = CacheScheme.from_dict({**scheme.to_dict(), **kv})
    elif kv:
        raise BadRecipe(f"the model's KV cache is not quantized and has no {next(iter(kv))}; set --kv-bits, too")
    if prefix is not None:
        attach_prefix_(model, scheme, prefix)
    elif kv_bits is not None or kv:
        change_scheme_(model, scheme)

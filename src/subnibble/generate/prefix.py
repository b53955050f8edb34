"""A system prompt for a model that is there already: its keys and values as the model itself makes them, at 16 bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subnibble.arch import find_arch
from subnibble.calibrate.prefix import States, half_states
from subnibble.calibrate.prompt import prefix_ids
from subnibble.calibrate.tokens import check_vocabulary
from subnibble.calibrate.windows import check_positions
from subnibble.checkpoint.edit import change_checkpoint, open_packed
from subnibble.checkpoint.module_specs import PrefixSpec, Spec, prefix_state
from subnibble.given import plain
from subnibble.hf import load_model
from subnibble.hf.attention import attach_cache_, attached_cache, check_cache, detached, set_prefix_
from subnibble.model.transformers_api.blocks import keys_and_values
from subnibble.tensor.cache_scheme import CacheScheme, PrefixIds


def attach_prefix_(model: Any, scheme: CacheScheme | None, prefix: PrefixIds | None) -> None:
    """Put a transformers model, packed or plain, on a KV cache of `scheme` and behind `prefix`.

    The prefix's keys and values are the model's own, computed here, as float16. What was attached before is replaced.
    """
    if prefix is None:
        attach_cache_(model, scheme)
        return
    # Before anything of the model is changed.
    check_cache(model, scheme)
    states = compute_prefix(model, prefix)
    attach_cache_(model, scheme, prefix)
    set_prefix_(model, states)


def compute_prefix(model: Any, prefix: PrefixIds) -> list[States]:
    """Keys and values (heads, tokens, width) float16 of each layer, as the model makes them without its own cache and
    prefix.
    """
    check_positions(1, model.config, len(prefix.ids))
    check_vocabulary(torch.tensor(prefix.ids), model.config.vocab_size, "the system prompt")
    device = next(iter((*model.parameters(), *model.buffers()))).device
    decoder = model.get_submodule(find_arch(model.config.model_type).blocks.rpartition(".")[0])
    with detached(model):
        states = keys_and_values(decoder, torch.tensor([prefix.ids], device=device))
    return [half_states(pair, f"layer {i}") for i, pair in enumerate(states)]


def add_prefix(
    folder: str | Path, prompt: str, *, dtype: str | torch.dtype = "float32", device: str | torch.device = "auto"
) -> PrefixIds:
    """Give a packed checkpoint the system prompt `prompt` (`calibrate/prompt.py`), in the place of one that it has.

    Its keys and values are those of the packed model; `quantize` with a system prompt stores the unquantized one's. The
    folder is replaced in one step; recipe.toml and whatever else is in it stays as it is.
    """
    source, packed = open_packed(folder)
    prompt = plain(prompt)
    prefix = prefix_ids(prompt, source.load_tokenizer())
    states = compute_prefix(load_model(source, dtype, device), prefix)
    arch = find_arch(source.config.model_type)
    paths = [f"{arch.block_path(index)}.{arch.attention}" for index in range(len(states))]
    modules: dict[str, Spec] = {p: spec for p, spec in packed.modules.items() if not isinstance(spec, PrefixSpec)}
    modules |= {path: PrefixSpec(*keys.shape) for path, (keys, _) in zip(paths, states, strict=True)}
    tensors: dict[str, Tensor] = {}
    for path, pair in zip(paths, states, strict=True):
        tensors |= prefix_state(path, pair)
    told = {"system_prompt_added": prompt, "prefix_tokens": len(prefix.ids)}
    change_checkpoint(source, replace(packed, modules=modules, prefix=prefix), tensors, told)
    return prefix


def same_prefix_(model: Any, other: Any) -> None:
    """Put `other` behind the prompt that `model` is behind, computed by itself, or behind none if it is behind none, so
    that the two can be compared.
    """
    attached, theirs = attached_cache(model), attached_cache(other)
    prefix = None if attached is None else attached.prefix
    if prefix != (None if theirs is None else theirs.prefix):
        attach_prefix_(other, None if theirs is None else theirs.scheme, prefix)

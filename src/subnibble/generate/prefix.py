"""Add a system prompt to an existing model; the model computes the prompt's keys and values, stored in 16 bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subnibble.arch import find_arch
from subnibble.arguments import plain
from subnibble.calibrate.prefix import States, half_states
from subnibble.calibrate.prompt import prefix_ids
from subnibble.calibrate.tokens import check_vocabulary
from subnibble.calibrate.windows import check_positions
from subnibble.checkpoint.edit import change_checkpoint, open_packed
from subnibble.checkpoint.manifest import PackedConfig
from subnibble.checkpoint.module_specs import PrefixSpec, Spec, prefix_state
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.hf import load_model
from subnibble.hf.attention import attach_cache_, attached_cache, check_cache, detached, set_prefix_
from subnibble.model.transformers_api.blocks import keys_and_values
from subnibble.resume.run import Run
from subnibble.tensor.cache_scheme import CacheScheme, PrefixIds


def attach_prefix_(model: Any, scheme: CacheScheme | None, prefix: PrefixIds | None) -> None:
    """Attach a KV cache and a prompt prefix to a transformers model, packed or plain, in place.

    The model computes the prefix's keys and values here; they are float16. An earlier cache and prefix are replaced.

    model: the model.
    scheme: how its KV cache is quantized, None for 16 bits.
    prefix: token ids of the prefix, None for none.
    """
    if prefix is None:
        attach_cache_(model, scheme)
        return
    # Check first, so that a failure leaves the model unchanged.
    check_cache(model, scheme)
    states = compute_prefix(model, prefix)
    attach_cache_(model, scheme, prefix)
    set_prefix_(model, states)


def compute_prefix(model: Any, prefix: PrefixIds) -> list[States]:
    """Keys and values of a prefix in each layer, (heads, tokens, width) float16 each.

    The model runs without its attached KV cache and prefix. Raises `CalibrationError` if the prefix does not fit the
    model's positions or vocabulary, `NumericalFailure` if its states do not fit float16.
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
    """Add a system prompt to a packed checkpoint, replacing an earlier one; returns its token ids.

    The packed model computes the prompt's keys and values; `quantize` with a system prompt stores those of the
    unquantized model. The folder is replaced in one step; recipe.toml and other files are not changed.

    folder: the packed checkpoint.
    prompt: the text, see `calibrate/prompt.py`.
    dtype, device: compute dtype and device.
    """
    source, packed = open_packed(folder)
    with Run(source.path, "prefix", {}) as run:
        return _add_prefix(source, packed, plain(prompt), run, dtype, device)


def _add_prefix(
    source: SafetensorsSource,
    packed: PackedConfig,
    prompt: str,
    run: Run,
    dtype: str | torch.dtype,
    device: str | torch.device,
) -> PrefixIds:
    prefix = prefix_ids(prompt, source.load_tokenizer())
    states = compute_prefix(load_model(source, dtype, device), prefix)
    arch = find_arch(source.config.model_type)
    paths = [f"{arch.block_path(index)}.{arch.attention}" for index in range(len(states))]
    modules: dict[str, Spec] = {path: spec for path, spec in packed.modules.items() if not isinstance(spec, PrefixSpec)}
    modules |= {path: PrefixSpec(*keys.shape) for path, (keys, _) in zip(paths, states, strict=True)}
    tensors: dict[str, Tensor] = {}
    for path, pair in zip(paths, states, strict=True):
        tensors |= prefix_state(path, pair)
    report_entries = {"system_prompt_added": prompt, "prefix_tokens": len(prefix.ids)}
    change_checkpoint(source, replace(packed, modules=modules, prefix=prefix), tensors, report_entries, run)
    return prefix


def same_prefix_(model: Any, other: Any) -> None:
    """Give `other` the prompt prefix that `model` has, or none if it has none, so that the two can be compared.

    `other` computes the prefix's keys and values itself; it is changed in place.
    """
    attached, other_attached = attached_cache(model), attached_cache(other)
    prefix = None if attached is None else attached.prefix
    if prefix != (None if other_attached is None else other_attached.prefix):
        attach_prefix_(other, None if other_attached is None else other_attached.scheme, prefix)

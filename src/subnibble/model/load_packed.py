"""Modules of a packed checkpoint put into an empty model, by what its `quantization_config` says of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from subnibble.arch import find_arch
from subnibble.arch.site import Heads
from subnibble.checkpoint.manifest import PackedConfig
from subnibble.checkpoint.module_specs import (
    KEY_CENTER,
    PREFIX,
    InputMixSpec,
    KeyCenterSpec,
    NormBiasSpec,
    PackedEmbeddingSpec,
    PackedLinearSpec,
    PrefixSpec,
    TiedHeadSpec,
    linear_of,
)
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.errors import CheckpointError
from subnibble.model.transformers_api.empty import untie_
from subnibble.runtime.modules import (
    InputMix,
    KeyCenter,
    PackedEmbedding,
    PackedLinear,
    PrefixStates,
    TiedHead,
    add_input_mix_,
    add_output_bias_,
)

# A tied head needs its table's module, a matrix in front of a head the head's, whatever the order of the JSON.
_LATER = {TiedHeadSpec: 1, InputMixSpec: 2}


def pack_modules_(model: Any, packed: PackedConfig, dtype: torch.dtype) -> None:
    """Put all packed modules into an empty transformers model, on the meta device. dtype: of what comes out of them."""
    for path, spec in sorted(packed.modules.items(), key=lambda item: _LATER.get(type(item[1]), 0)):
        try:
            # Centres and matrices are modules that what holds them does not have yet.
            own = isinstance(spec, KeyCenterSpec | InputMixSpec)
            module = model.get_submodule(path.rpartition(".")[0] if own else path)
        except AttributeError as error:
            raise CheckpointError(
                f"quantization_config packs {path}, which this model does not have; packed checkpoints load as "
                "AutoModelForCausalLM"
            ) from error
        replace_module(model, path, module, spec, dtype)
    for path, spec in packed.modules.items():
        if isinstance(spec, PackedLinearSpec) and spec.input is not None:
            model.get_submodule(path).enter_as_(model.get_submodule(spec.input))
    _check_centers(model, packed)


def _check_centers(model: Any, packed: PackedConfig) -> None:
    """Raise `CheckpointError` unless every attention has the centre that the cache codes its keys less."""
    heads, arch = Heads.of(model.config), find_arch(model.config.model_type)
    held = {path: spec for path, spec in packed.modules.items() if isinstance(spec, KeyCenterSpec)}
    for path, spec in held.items():
        if (spec.heads, spec.width) != (heads.key_value, heads.width):
            raise CheckpointError(
                f"{path} is of {spec.heads} heads of {spec.width} channels, where the model has {heads.key_value} of "
                f"{heads.width}; config.json does not belong to these weights"
            )
    if packed.cache is None or not packed.cache.is_centered:
        return
    for index in range(len(model.get_submodule(arch.blocks))):
        path = f"{arch.block_path(index)}.{arch.attention}.{KEY_CENTER}"
        if path not in held or held[path].key_basis != packed.cache.key_basis:
            raise CheckpointError(f"quantization_config has no {path} for its cache; quantize the model again")


def fill_(model: Any, source: SafetensorsSource, dtype: torch.dtype, device: torch.device) -> None:
    """Fill an empty model with a packed checkpoint's tensors: packed ones as stored, the others in `dtype`."""
    stored = set(source.names())
    for path, module in model.named_modules():
        for name, held in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            # A head that is tied has no tensor of its own.
            if held.device.type != "meta" or f"{path}.{name}" not in stored:
                continue
            found = source.load_raw(f"{path}.{name}").to(device)
            if isinstance(held, nn.Parameter):
                setattr(module, name, nn.Parameter(found.to(dtype), requires_grad=False))
            else:
                setattr(module, name, found)
    if source.config.tie_word_embeddings:
        model.tie_weights()


def replace_module(model: Any, path: str, module: nn.Module, spec: Any, dtype: torch.dtype) -> None:
    """Put the packed form of `spec` in place of `module`, on the meta device."""
    if isinstance(spec, PackedLinearSpec | PackedEmbeddingSpec):
        asked = (spec.layout.rows, spec.layout.columns)
        found = tuple(getattr(module, "weight", torch.empty(0)).shape)
        if asked != found:
            raise CheckpointError(
                f"quantization_config packs {path} as {asked[0]} x {asked[1]}, where the model has {found}; "
                "config.json does not belong to these weights"
            )
    match spec:
        case PackedLinearSpec():
            own = {name: part.to(dtype) if name == "bias" else part for name, part in spec.parts.items()}
            model.set_submodule(path, PackedLinear(linear_of(spec, own)))
        case PackedEmbeddingSpec(layout):
            model.set_submodule(path, PackedEmbedding(layout.empty(), dtype))
        case TiedHeadSpec(table):
            embedding = model.get_submodule(table)
            if not isinstance(embedding, PackedEmbedding):
                raise CheckpointError(f"quantization_config ties {path} to {table}, which it does not pack")
            model.set_submodule(path, TiedHead(embedding))
            untie_(model, path)
        case InputMixSpec(widths):
            if sum(widths) != getattr(module, "in_features", None):
                raise CheckpointError(
                    f"{path} is of {sum(widths)} channels, which is not what the model's head has; config.json does "
                    "not belong to these weights"
                )
            add_input_mix_(module, InputMix(spec.parts["matrix"], widths))
        case NormBiasSpec():
            add_output_bias_(module, spec.parts["bias"].to(dtype))
        case PrefixSpec():
            keys, values = spec.parts.values()
            module.add_module(PREFIX, PrefixStates(keys, values, persistent=True))
        case KeyCenterSpec():
            module.add_module(KEY_CENTER, KeyCenter(spec.parts["mean"], *spec.key_basis))

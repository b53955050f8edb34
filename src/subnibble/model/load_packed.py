"""Put packed modules into an empty model, as the `quantization_config` of a packed checkpoint describes them."""

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
    HeadInputSpec,
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
    HeadInputMatrix,
    KeyCenter,
    PackedEmbedding,
    PackedLinear,
    PrefixStates,
    TiedHead,
    add_head_input_,
    add_output_bias_,
)

# Order of replacement, which the JSON need not have: a tied head needs the packed embedding, and an input matrix needs
# the head that it belongs to.
_LATER = {TiedHeadSpec: 1, HeadInputSpec: 2}


def pack_modules_(model: Any, packed: PackedConfig, dtype: torch.dtype) -> None:
    """Replace all packed modules of an empty transformers model, on the meta device.

    model: from `empty_causal_lm`; changed in place.
    packed: the `quantization_config`.
    dtype: dtype of the outputs of the packed modules.
    Raises `CheckpointError` if `packed` does not fit the model.
    """
    for path, spec in sorted(packed.modules.items(), key=lambda item: _LATER.get(type(item[1]), 0)):
        try:
            # Key centres and input matrices are added to their parent module, which does not have them yet.
            added = isinstance(spec, KeyCenterSpec | HeadInputSpec)
            module = model.get_submodule(path.rpartition(".")[0] if added else path)
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
    """Raise `CheckpointError` if the key means that the KV cache subtracts are missing or do not fit the model."""
    heads, arch = Heads.of(model.config), find_arch(model.config.model_type)
    centers = {path: spec for path, spec in packed.modules.items() if isinstance(spec, KeyCenterSpec)}
    for path, spec in centers.items():
        if (spec.heads, spec.width) != (heads.key_value, heads.width):
            raise CheckpointError(
                f"{path} has {spec.heads} heads of {spec.width} channels, but the model has {heads.key_value} heads of "
                f"{heads.width}; config.json does not belong to these weights"
            )
    if packed.cache is None or not packed.cache.is_centered:
        return
    for index in range(len(model.get_submodule(arch.blocks))):
        path = f"{arch.block_path(index)}.{arch.attention}.{KEY_CENTER}"
        if path not in centers or centers[path].key_basis != packed.cache.key_basis:
            raise CheckpointError(f"quantization_config lacks {path}, which its cache needs; quantize the model again")


def fill_(model: Any, source: SafetensorsSource, dtype: torch.dtype, device: torch.device) -> None:
    """Fill an empty model with the tensors of a packed checkpoint: packed tensors as stored, parameters cast.

    model: an empty model with packed modules; changed in place.
    source: the checkpoint.
    dtype: dtype of the parameters.
    device: device of all tensors.
    """
    stored = set(source.names())
    for path, module in model.named_modules():
        for name, empty in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            # The checkpoint has no tensor for a tied head.
            if empty.device.type != "meta" or f"{path}.{name}" not in stored:
                continue
            tensor = source.load_raw(f"{path}.{name}").to(device)
            if isinstance(empty, nn.Parameter):
                setattr(module, name, nn.Parameter(tensor.to(dtype), requires_grad=False))
            else:
                setattr(module, name, tensor)
    if source.config.tie_word_embeddings:
        model.tie_weights()


def replace_module(model: Any, path: str, module: nn.Module, spec: Any, dtype: torch.dtype) -> None:
    """Put one packed module into the model, on the meta device: it replaces `module` or is added to it.

    model: changed in place.
    path: path of the packed module.
    module: the module at `path`; for a key centre or an input matrix, its parent.
    spec: what `quantization_config` says about the packed module.
    dtype: dtype of its output.
    Raises `CheckpointError` if `spec` does not fit the model.
    """
    if isinstance(spec, PackedLinearSpec | PackedEmbeddingSpec):
        packed_shape = (spec.layout.rows, spec.layout.num_columns)
        model_shape = tuple(getattr(module, "weight", torch.empty(0)).shape)
        if packed_shape != model_shape:
            raise CheckpointError(
                f"quantization_config packs {path} as {packed_shape[0]} x {packed_shape[1]}, but the model has "
                f"{model_shape}; config.json does not belong to these weights"
            )
    match spec:
        case PackedLinearSpec():
            tensors = {name: tensor.to(dtype) if name == "bias" else tensor for name, tensor in spec.parts.items()}
            model.set_submodule(path, PackedLinear(linear_of(spec, tensors)))
        case PackedEmbeddingSpec(layout):
            model.set_submodule(path, PackedEmbedding(layout.empty(), dtype))
        case TiedHeadSpec(table):
            embedding = model.get_submodule(table)
            if not isinstance(embedding, PackedEmbedding):
                raise CheckpointError(
                    f"quantization_config ties {path} to {table}, which is not packed; quantize the model again"
                )
            model.set_submodule(path, TiedHead(embedding))
            untie_(model, path)
        case HeadInputSpec(widths):
            if sum(widths) != getattr(module, "in_features", None):
                raise CheckpointError(
                    f"{path} has {sum(widths)} channels, and the model's head has another number; config.json does not "
                    "belong to these weights"
                )
            add_head_input_(module, HeadInputMatrix(spec.parts["matrix"], widths))
        case NormBiasSpec():
            add_output_bias_(module, spec.parts["bias"].to(dtype))
        case PrefixSpec():
            keys, values = spec.parts.values()
            module.add_module(PREFIX, PrefixStates(keys, values, persistent=True))
        case KeyCenterSpec():
            module.add_module(KEY_CENTER, KeyCenter(spec.parts["mean"], *spec.key_basis))

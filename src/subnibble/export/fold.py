"""Fold norm biases into the linears that read the norms, for engines whose norms have no bias.

A linear that reads a norm's output x + mu computes `W (x + mu) + b = W x + (W mu + b)`: the norm's bias mu moves into
the linear's bias, and the function is the same. W is the packed weight as it runs, including column scales.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from subnibble.arch import find_arch
from subnibble.arch.site import Arch
from subnibble.arguments import described
from subnibble.checkpoint.manifest import packed_config_of
from subnibble.checkpoint.module_specs import NormBiasSpec, PackedLinearSpec
from subnibble.errors import BadArgument, CheckpointError
from subnibble.runtime.modules import HEAD_INPUT, PackedLinear, remove_output_bias_


def fold_norm_biases_(model: Any) -> None:
    """Fold every norm bias of a packed transformers model into the linears that read the norm, in place.

    A norm keeps its bias if not all linears that read it are packed. That is the case for the final norm if the head
    shares the embedding's table, which has no bias, or is at 16 bits. `save_pretrained` writes the folded model; its
    effective bits do not count the new biases, as they count no linear's bias.

    Raises `CheckpointError` and changes nothing if linears that read such a norm quantize their inputs.
    """
    if not hasattr(model, "get_submodule"):
        raise BadArgument(
            f"model is {described(model)}; give a loaded model, as AutoModelForCausalLM.from_pretrained(folder) gives"
        )
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise BadArgument("model has modules on disk or offloaded, which cannot be changed; give one that is in memory")
    packed = packed_config_of(model.config)
    if packed is None:
        raise CheckpointError("the model is not packed; load a folder that `subnibble quantize` wrote")
    arch = find_arch(model.config.model_type)
    modules = dict(packed.modules)
    biased = [path for path, spec in packed.modules.items() if isinstance(spec, NormBiasSpec)]
    readers_of = {path: {name: model.get_submodule(name) for name in _readers(arch, path)} for path in biased}
    for path, readers in readers_of.items():
        if any(_quantizes_input(module) for module in readers.values()):
            raise CheckpointError(
                f"{path}: the linears that read it quantize their inputs, and folding would remove the bias from these "
                'inputs; quantize the model with mean_shift = "none" or activation_bits = 16'
            )
    for path, readers in readers_of.items():
        if all(isinstance(module, PackedLinear) for module in readers.values()):
            norm = model.get_submodule(path)
            for name, linear in readers.items():
                bias = norm.bias.float()
                # The matrix before a head is applied to the norm's bias, too.
                input_bias = linear.get_submodule(HEAD_INPUT)(bias) if hasattr(linear, HEAD_INPUT) else bias
                _add_(linear, linear.dequantize() @ input_bias, norm.bias.dtype)
                spec_before = modules[name]
                assert isinstance(spec_before, PackedLinearSpec)
                modules[name] = replace(spec_before, bias=True)
            remove_output_bias_(norm)
            del modules[path]
    model.config.quantization_config.packed = replace(packed, modules=modules)


def _readers(arch: Arch, norm: str) -> list[str]:
    """Paths of the linears that read the norm at path `norm`; empty for a path that is no such norm."""
    if norm == arch.final_norm:
        return [arch.head]
    for site in arch.sites:
        if site.norm is not None and norm.endswith(f".{site.norm}"):
            return [norm.removesuffix(site.norm) + reader for reader in site.readers]
    return []


def _quantizes_input(module: nn.Module) -> bool:
    return isinstance(module, PackedLinear) and module.activation is not None


def _add_(linear: Any, shift: torch.Tensor, dtype: torch.dtype) -> None:
    """Add `shift` (m,) to the linear's bias; a linear without a bias gets one in `dtype`."""
    bias = linear.bias
    total = shift.to(dtype) if bias is None else (bias.float() + shift).to(bias.dtype)
    linear.bias = nn.Parameter(total, requires_grad=False)

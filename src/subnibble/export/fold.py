"""Fold norm biases into the linears behind them, for engines whose norms have none.

A norm's output x + mu gives a linear `W (x + mu) + b = W x + (W mu + b)`: the bias moves, the function stays. W is the
packed weight as it runs, column scales included.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from subnibble.arch import find_arch
from subnibble.arch.site import Arch
from subnibble.checkpoint.manifest import packed_config_of
from subnibble.checkpoint.module_specs import NormBiasSpec, PackedLinearSpec
from subnibble.errors import BadArgument, CheckpointError
from subnibble.given import described
from subnibble.runtime.modules import MIX, PackedLinear, remove_output_bias_


def fold_norm_biases_(model: Any) -> None:
    """Fold in place every norm bias of a packed transformers model.

    A norm keeps its bias where not all linears behind it are packed: the final norm, if the head shares the embedding's
    table, which has no bias to take it, or is at 16 bits. `save_pretrained` writes the folded model, whose effective
    bits leave its biases out, as any linear's own. Raises `CheckpointError`, and changes nothing, where linears behind
    such a norm quantize their inputs.
    """
    if not hasattr(model, "get_submodule"):
        raise BadArgument(
            f"model is {described(model)}; give a loaded model, as AutoModelForCausalLM.from_pretrained(folder) gives"
        )
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise BadArgument("model has modules on disk or offloaded, which cannot be changed; give one that is in memory")
    packed = packed_config_of(model.config)
    if packed is None:
        raise CheckpointError("the model is not a packed one; load a folder that `subnibble quantize` wrote")
    arch = find_arch(model.config.model_type)
    modules = dict(packed.modules)
    biased = [path for path, spec in packed.modules.items() if isinstance(spec, NormBiasSpec)]
    behind = {path: {name: model.get_submodule(name) for name in _readers(arch, path)} for path in biased}
    for path, readers in behind.items():
        if any(_quantizes_input(module) for module in readers.values()):
            raise CheckpointError(
                f"{path}: its readers quantize their inputs, which a folded bias would no longer be part of; quantize "
                'the model without mean shift (mean_shift = "none"), or with activation_bits = 16'
            )
    for path, readers in behind.items():
        if all(isinstance(module, PackedLinear) for module in readers.values()):
            norm = model.get_submodule(path)
            for name, linear in readers.items():
                bias = norm.bias.float()
                # What stands in front of a head meets the norm's bias, too.
                seen = linear.get_submodule(MIX)(bias) if hasattr(linear, MIX) else bias
                _add_(linear, linear.dequantize() @ seen, norm.bias.dtype)
                old = modules[name]
                assert isinstance(old, PackedLinearSpec)
                modules[name] = replace(old, bias=True)
            remove_output_bias_(norm)
            del modules[path]
    model.config.quantization_config.packed = replace(packed, modules=modules)


def _readers(arch: Arch, norm: str) -> list[str]:
    """Paths of the linears that the norm at path `norm` feeds; none if it is no norm of the model's."""
    if norm == arch.final_norm:
        return [arch.head]
    for site in arch.sites:
        if site.norm is not None and norm.endswith(f".{site.norm}"):
            return [norm.removesuffix(site.norm) + reader for reader in site.readers]
    return []


def _quantizes_input(module: nn.Module) -> bool:
    return isinstance(module, PackedLinear) and module.activation is not None


def _add_(linear: Any, shift: torch.Tensor, dtype: torch.dtype) -> None:
    """Add `shift` (m,) to the linear's bias, or give it one in `dtype`."""
    bias = linear.bias
    total = shift.to(dtype) if bias is None else (bias.float() + shift).to(bias.dtype)
    linear.bias = nn.Parameter(total, requires_grad=False)

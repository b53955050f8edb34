"""Check that a packed checkpoint is what its config.json says, with the same rules for loading and for writing.

A rule looks at the header or at the values of one tensor, so that a checkpoint is checked with one tensor in memory. A
broken rule is reported as text; the caller decides what to raise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subnibble.checkpoint.checksums import check_files
from subnibble.checkpoint.manifest import PackedConfig, packed_config_of
from subnibble.checkpoint.module_specs import NormBiasSpec
from subnibble.checkpoint.safetensors_source import STORED_TYPES, SafetensorsSource
from subnibble.checkpoint.weight_files import Header, read_headers
from subnibble.errors import CheckpointError, NotLoadable
from subnibble.model.load_packed import pack_modules_
from subnibble.model.transformers_api.empty import empty_causal_lm, tied_weights
from subnibble.model.transformers_api.names import never_called
from subnibble.runtime.modules import PackedModule, StoredModule, never_ran
from subnibble.runtime.offloaded import resident
from subnibble.tensor.packed import range_key
from subnibble.tensor.scheme import E8M0

# A tensor -> what is wrong with its values, or None.
Rule = Callable[[Tensor], str | None]


def header_problem(model: Any, headers: Mapping[str, Header]) -> str | None:
    """The first mismatch between the tensors of a checkpoint and those that `model` needs, as text; None if they match.

    A missing tensor must be found here, because transformers would initialise it at random. Tensors that are not packed
    may have any dtype, since they are cast.

    model: a model with packed modules, empty or filled.
    headers: tensor name -> shape and stored dtype, of the whole checkpoint.
    """
    tied = tied_weights(model)
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    typed = {name for name, _ in _stored_buffers(model)}
    for name, tensor in expected.items():
        if name not in headers:
            return f"tensor {name} is missing"
        shape, kind = headers[name]
        if shape != tuple(tensor.shape) or (name in typed and kind != STORED_TYPES[tensor.dtype]):
            return (
                f"{name} is {kind} of shape {shape}, but config.json asks for {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}; config and weights do not belong together"
            )
    spare = sorted(set(headers) - set(expected) - tied)
    return f"tensor {spare[0]} has no place in the model that config.json describes" if spare else None


def value_rules(model: Any, packed: PackedConfig) -> dict[str, list[Rule]]:
    """Name -> rules for the values of each packed tensor.

    Codes have no rules, because every bit pattern is a valid code.

    model: a model with packed modules, empty or filled.
    packed: its `quantization_config`.
    """
    rules: dict[str, list[Rule]] = {name: [not_finite] for name, _ in _stored_buffers(model)}
    rules |= {f"{path}.bias": [not_finite] for path, spec in packed.modules.items() if isinstance(spec, NormBiasSpec)}
    for path, module in model.named_modules():
        if not isinstance(module, PackedModule):
            continue
        if f"{path}.gather" in rules:
            rules[f"{path}.gather"].append(_not_each_once)
        for index, (_, scheme) in enumerate(module.layout.ranges):
            if scheme.scale_type == E8M0:
                rules[f"{path}.{range_key('scales', index)}"].append(_no_e8m0)
    return rules


def check_values(model: Any, packed: PackedConfig) -> None:
    """Raise `CheckpointError` if a packed tensor of a filled model has values that no writer would write.

    model: a filled model with packed modules.
    packed: its `quantization_config`.
    """
    for name, rules in value_rules(model, packed).items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        with resident(module):
            problems = [problem for rule in rules if (problem := rule(getattr(module, attribute)))]
        if problems:
            raise CheckpointError(f"{name} {problems[0]}; fetch or quantize the model again")


def check_ran(model: Any) -> None:
    """Raise `SilentFailure` if a packed module, or something added to a module, took part in no forward pass so far.

    Otherwise a norm bias that is never added, for example, would give a worse model without any error.
    """
    for path in never_ran(model):
        raise never_called(f"what the packed checkpoint adds to {path}")


def check_written(folder: Path) -> None:
    """Raise `NotLoadable` if the packed checkpoint that was just written to `folder` would not load, a bug of ours.

    Reads all tensors, one at a time.
    """
    try:
        source = SafetensorsSource(folder)
        packed = packed_config_of(source.config)
        if packed is None:
            raise CheckpointError("config.json describes no packed checkpoint")
        check_files(source.shards(), source.config.quantization_config)
        config = copy.deepcopy(source.config)
        del config.quantization_config
        model = empty_causal_lm(config, torch.float32)
        pack_modules_(model, packed, torch.float32)
        problem = header_problem(model, read_headers(source.shards())) or _value_problem(
            source, value_rules(model, packed)
        )
    except CheckpointError as error:
        problem = str(error)
    if problem is not None:
        raise NotLoadable(f"the written checkpoint would not load, so nothing was kept: {problem}")


def _value_problem(source: SafetensorsSource, rules: Mapping[str, list[Rule]]) -> str | None:
    """The first tensor that breaks a rule, and how, as text; None if there is none. Unpacked tensors must be finite."""
    for names in source.shards().values():
        for name in names:
            tensor = source.load_raw(name)
            for rule in rules.get(name, [not_finite]):
                if problem := rule(tensor):
                    return f"{name} {problem}"
    return None


def _stored_buffers(model: Any) -> list[tuple[str, Tensor]]:
    """Name in the model and tensor of each buffer that keeps its stored dtype."""
    stored = [(path, module) for path, module in model.named_modules() if isinstance(module, StoredModule)]
    return [
        (f"{path}.{name}", buffer) for path, module in stored for name, buffer in module.named_buffers(recurse=False)
    ]


def not_finite(tensor: Tensor) -> str | None:
    """A `Rule`: "is not finite" for a floating-point tensor with NaN or infinite values."""
    return "is not finite" if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()) else None


def _not_each_once(gather: Tensor) -> str | None:
    channels = torch.arange(gather.shape[0], device=gather.device, dtype=gather.dtype)
    return None if torch.equal(gather.sort().values, channels) else "does not hold each channel once"


def _no_e8m0(scales: Tensor) -> str | None:
    return "holds a byte that is no E8M0 scale" if bool(((scales == 0) | (scales == 255)).any()) else None

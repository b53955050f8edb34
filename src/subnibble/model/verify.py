"""Whether a packed checkpoint is what its config.json says: one set of rules, for loading and for what was written.

A rule looks at one tensor's header or at one tensor's numbers, so that a whole checkpoint is checked with one tensor in
memory. What breaks a rule is told as text; who asks says what follows from it.
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

# What is wrong with a tensor's numbers, None for nothing.
Rule = Callable[[Tensor], str | None]


def header_problem(model: Any, headers: Mapping[str, Header]) -> str | None:
    """What keeps tensors of these headers from being just those of `model`, whose modules are packed; None for nothing.

    transformers would make up missing ones. Tensors that are not packed may have any type: they are cast.
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
                f"{name} is {kind} of shape {shape} where config.json asks for {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}; config and weights do not belong together"
            )
    spare = sorted(set(headers) - set(expected) - tied)
    return f"tensor {spare[0]} has no place in the model that config.json describes" if spare else None


def value_rules(model: Any, packed: PackedConfig) -> dict[str, list[Rule]]:
    """Name -> rules of the numbers of each tensor that `packed` describes. model: filled or empty, its modules packed.

    Every code is one of its grid, so that codes have no rule but their shape.
    """
    rules: dict[str, list[Rule]] = {name: [not_finite] for name, _ in _stored_buffers(model)}
    rules |= {f"{path}.bias": [not_finite] for path, e in packed.modules.items() if isinstance(e, NormBiasSpec)}
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
    """Raise `CheckpointError` if stored numbers of a filled model are none that a writer may write."""
    for name, rules in value_rules(model, packed).items():
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        with resident(module):
            problems = [problem for rule in rules if (problem := rule(getattr(module, own)))]
        if problems:
            raise CheckpointError(f"{name} {problems[0]}; fetch or quantize the model again")


def check_ran(model: Any) -> None:
    """Raise `SilentFailure` if something that a packed checkpoint puts into a model, or adds to its modules, took part
    in no pass so far. A norm whose bias is not added makes a worse model, not an error.
    """
    for path in never_ran(model):
        raise never_called(f"what the packed checkpoint adds to {path}")


def check_written(folder: Path) -> None:
    """Raise `NotLoadable` if a packed checkpoint that was just written to `folder` would not load: a fault of ours.

    All its tensors are read, one at a time.
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
        raise NotLoadable(f"what was written would not load, so nothing was kept: {problem}")


def _value_problem(source: SafetensorsSource, rules: Mapping[str, list[Rule]]) -> str | None:
    """The first tensor that breaks a rule, and how; None if all keep them. Unpacked tensors must be finite."""
    for names in source.shards().values():
        for name in names:
            tensor = source.load_raw(name)
            for rule in rules.get(name, [not_finite]):
                if problem := rule(tensor):
                    return f"{name} {problem}"
    return None


def _stored_buffers(model: Any) -> list[tuple[str, Tensor]]:
    """Buffers that keep their stored type, by name in the model."""
    stored = [(path, module) for path, module in model.named_modules() if isinstance(module, StoredModule)]
    return [(f"{path}.{name}", part) for path, module in stored for name, part in module.named_buffers(recurse=False)]


def not_finite(tensor: Tensor) -> str | None:
    """See `Rule`, of any tensor."""
    return "is not finite" if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()) else None


def _not_each_once(gather: Tensor) -> str | None:
    whole = torch.arange(gather.shape[0], device=gather.device, dtype=gather.dtype)
    return None if torch.equal(gather.sort().values, whole) else "does not hold each channel once"


def _no_e8m0(scales: Tensor) -> str | None:
    return "holds a byte that is no E8M0 scale" if bool(((scales == 0) | (scales == 255)).any()) else None

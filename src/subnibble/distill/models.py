"""The two models of distillation: the original, and the packed model as a function of what is learned of it.

Both run block by block. What is inside the packed model's blocks is kept for gradients where memory allows it, else
computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from subnibble.arch.site import Arch, Heads
from subnibble.calibrate.prefix import PrefixStream, States, behind
from subnibble.checkpoint.manifest import PackedConfig
from subnibble.checkpoint.module_specs import KEY_CENTER, PREFIX, NormBiasSpec, PackedLinearSpec
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.checkpoint.source import Source
from subnibble.device import free_memory
from subnibble.distill.learned_matrix import Learned
from subnibble.distill.linear import Entrance, StudentLinear
from subnibble.distill.settings import SPACES, Distillation
from subnibble.errors import SilentFailure
from subnibble.model.load_packed import fill_, pack_modules_
from subnibble.model.skeleton import Block, Skeleton
from subnibble.model.transformers_api.blocks import BlockCall, run_block
from subnibble.model.verify import check_ran, check_values
from subnibble.runtime.kv_cache import Coding
from subnibble.runtime.modules import KeyCenter, PackedLinear
from subnibble.tensor.cache_scheme import CacheScheme, PrefixIds

# Numbers, in channels of the residual stream, that a block's gradients need of a token; the share of free memory that
# may be spent on them.
_KEPT_OF_TOKEN, FREE_SHARE = 80, 0.25


def states_bytes(blocks: int, tokens: int, width: int) -> int:
    """What gradients need of so many tokens inside blocks of a residual stream of `width` channels; rough."""
    return blocks * tokens * width * _KEPT_OF_TOKEN * torch.float32.itemsize


@dataclass(frozen=True)
class WholeModel:
    """A model run block by block. calls: of each block, for windows of one length, behind its prefix."""

    model: Any
    arch: Arch
    calls: list[BlockCall]

    def keeps_states(self, tokens: int, device: torch.device) -> bool:
        """Whether there is memory for what is inside the blocks, for so many tokens."""
        needed = states_bytes(len(self.calls), tokens, self.model.config.hidden_size)
        return needed < FREE_SHARE * free_memory(device)

    def logits(self, ids: Tensor, keeps_states: bool) -> Tensor:
        """(b, t, vocabulary) float32. keeps_states: of blocks, for gradients; else they are computed again there."""
        get = self.model.get_submodule
        hidden = get(self.arch.embedding)(ids)
        for block, own in zip(get(self.arch.blocks), self.calls, strict=True):
            if keeps_states:
                hidden = run_block(block, hidden, own)
            else:
                hidden = checkpoint(run_block, block, hidden, own, use_reentrant=False)
        found: Tensor = get(self.arch.head)(get(self.arch.final_norm)(hidden)).float()
        return found


class Teacher:
    """The original."""

    def __init__(self, model: WholeModel, device: torch.device) -> None:
        self._model, self._device = model, device

    @classmethod
    def of(
        cls, source: Source, prefix: PrefixIds | None, length: int, dtype: torch.dtype, device: torch.device
    ) -> Teacher:
        """The model of `source`, behind a prefix, for windows of `length` tokens."""
        skeleton = Skeleton(source, dtype, device)
        model = skeleton.load_all()
        states: list[States | None] = [None] * skeleton.num_blocks
        if prefix is not None:
            states = [*_states(skeleton, model, prefix)]
        past = 0 if prefix is None else len(prefix.ids)
        calls = skeleton.block_calls(length, dtype, past)
        calls = [behind(own, state) for own, state in zip(calls, states, strict=True)]
        return cls(WholeModel(model, skeleton.arch, calls), device)

    def log_probs(self, ids: Tensor) -> Tensor:
        """Logarithms of the next token's probabilities, (b, t, vocabulary)."""
        with torch.no_grad():
            return self._model.logits(ids.to(self._device), keeps_states=True).log_softmax(-1)


def _states(skeleton: Skeleton, model: Any, prefix: PrefixIds) -> Iterator[States]:
    """A prefix's keys and values in each block of a whole model."""
    arch = skeleton.arch
    with torch.no_grad():
        hidden = model.get_submodule(arch.embedding)(torch.tensor([prefix.ids], device=skeleton.device))
    stream = PrefixStream(skeleton, hidden, skeleton.dtype)
    for index, block in enumerate(model.get_submodule(arch.blocks)):
        yield stream.advance(Block(index, arch.block_path(index), block, arch, Heads.of(skeleton.config)))


class Student:
    """The packed model with what is learned of it. spaces: by the names of `Distillation`'s settings.

    types: of tensors in the checkpoint, by their names; of norms' gains and biases.
    """

    def __init__(
        self,
        model: WholeModel,
        config: PackedConfig,
        settings: Distillation,
        device: torch.device,
        types: Mapping[str, torch.dtype],
    ) -> None:
        self._model, self._config, self._device, self._types = model, config, device, types
        self._keeps: bool | None = None
        modules = dict(model.model.named_modules())
        self._linears = {path: module for path, module in modules.items() if isinstance(module, StudentLinear)}
        packed = [path for path, module in modules.items() if isinstance(module, PackedLinear)]
        fixed = [path for path in packed if path.startswith(f"{model.arch.blocks}.")]
        if fixed:
            raise SilentFailure(f"{fixed[0]} is packed and would not be learned; this is a fault of subnibble's")
        self._entrances = list(dict.fromkeys(linear.entrance for linear in self._linears.values()))
        gains = dict(_gains(model)) if settings.norms else {}
        biases = dict(_biases(model, config)) if settings.norm_biases else {}
        self._norms = gains | biases
        for parameter in self._norms.values():
            parameter.requires_grad_(True)
        self.spaces = self._spaces(gains, biases)

    @classmethod
    def of(
        cls,
        source: Source,
        packed: SafetensorsSource,
        config: PackedConfig,
        settings: Distillation,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Student:
        """The checkpoint `packed`, made of `source`, which `config` describes, for windows of `length` tokens.

        dtype: that products are computed in.
        """
        skeleton = Skeleton(source, torch.float32, device)
        past = 0 if config.prefix is None else len(config.prefix.ids)
        calls = skeleton.block_calls(length, torch.float32, past)
        model, arch = skeleton.model, skeleton.arch
        pack_modules_(model, config, torch.float32)
        fill_(model, packed, torch.float32, device)
        check_values(model, config)
        for index, block in enumerate(model.get_submodule(arch.blocks)):
            _learn_(block, arch, settings, dtype)
            calls[index] = behind(calls[index], _held(block, arch), _coding(block, arch, config.cache))
        whole = WholeModel(model, arch, calls)
        types = {name: packed.load_raw(name).dtype for name, _ in (*_gains(whole), *_biases(whole, config))}
        return cls(whole, config, settings, device, types)

    def logits(self, ids: Tensor) -> Tensor:
        """(b, t, vocabulary) float32."""
        if self._keeps is None:
            self._keeps = self._model.keeps_states(ids.numel(), self._device)
        found = self._model.logits(ids.to(self._device), self._keeps or not torch.is_grad_enabled())
        # Gradients tell of what is learned alone, not of biases that stay and of the matrix in front of the head.
        check_ran(self._model.model)
        return found

    def bound_(self) -> None:
        """Bring what was learned back into its range."""
        for linear in self._linears.values():
            linear.bound_()
        for entrance in self._entrances:
            entrance.bound_()

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """What norms have, too, as the checkpoint's types hold it; what linears have always is."""
        exact = {name: parameter.detach().clone() for name, parameter in self._norms.items()}
        with torch.no_grad():
            for name, parameter in self._norms.items():
                parameter.copy_(parameter.to(self._types[name]))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._norms.items():
                    parameter.copy_(exact[name])

    def forget(self) -> None:
        """Forget what sites held."""
        for entrance in self._entrances:
            entrance.forget()

    def parameters(self) -> list[nn.Parameter]:
        """All that is learned."""
        return [one.parameter for space in self.spaces.values() for one in space]

    def tensors(self) -> dict[str, Tensor]:
        """What was learned, by its name in the checkpoint; of norms in float32."""
        found = {name: parameter.detach().clone() for name, parameter in self._norms.items()}
        for path, linear in self._linears.items():
            spec = self._config.modules[path]
            assert isinstance(spec, PackedLinearSpec)
            found |= {f"{path}.{name}": tensor for name, tensor in linear.stored().items() if name in spec.parts}
        return found

    def config(self) -> PackedConfig:
        """What config.json says now."""
        modules = dict(self._config.modules)
        for path, linear in self._linears.items():
            spec = modules[path]
            assert isinstance(spec, PackedLinearSpec)
            modules[path] = replace(spec, activation=linear.entrance.scheme)
        return replace(self._config, modules=modules)

    def _spaces(
        self, gains: Mapping[str, nn.Parameter], biases: Mapping[str, nn.Parameter]
    ) -> dict[str, list[Learned]]:
        found: dict[str, list[Learned]] = {name: [] for name in SPACES}
        named = {linear.entrance: path for path, linear in reversed(self._linears.items())}
        parts = [linear.learned(path) for path, linear in self._linears.items()]
        parts += [entrance.learned(named[entrance]) for entrance in self._entrances]
        for part in parts:
            for space, own in part.items():
                found[space] += own
        found["norms"] = [Learned(name, gain, _size(gain)) for name, gain in gains.items()]
        for name, bias in biases.items():
            # A norm's output is as large as its gain; a bias may be 0 everywhere and has no size of its own.
            gain = self._model.model.get_parameter(f"{name.removesuffix('.bias')}.weight")
            found["norm_biases"].append(Learned(name, bias, _size(gain)))
        return found


def _size(gain: Tensor) -> float:
    return float(gain.detach().abs().mean())


def _learn_(block: nn.Module, arch: Arch, settings: Distillation, dtype: torch.dtype) -> None:
    """Let a block's packed linears learn; readers of a site that take its tensor alike share what they make of it."""
    for site in arch.sites:
        shared: list[tuple[PackedLinear, Entrance]] = []
        for name in site.readers:
            linear = block.get_submodule(name)
            if not isinstance(linear, PackedLinear):
                continue
            entrance = next((own for other, own in shared if linear.linear.input.same_as(other.linear.input)), None)
            if entrance is None:
                entrance = Entrance(linear.linear.input, settings.learned, dtype, linear.codes.device)
                shared.append((linear, entrance))
            block.set_submodule(name, StudentLinear(linear.linear, entrance, settings.learned))


def _held(block: nn.Module, arch: Arch) -> States | None:
    """The prefix's keys and values that a block's attention holds."""
    attention = block.get_submodule(arch.attention)
    if not hasattr(attention, PREFIX):
        return None
    states = getattr(attention, PREFIX)
    return states.keys.float(), states.values.float()


def _coding(block: nn.Module, arch: Arch, scheme: CacheScheme | None) -> Coding | None:
    """How a block's cache codes, with the centre that its attention holds."""
    if scheme is None or not scheme.is_centered:
        return None if scheme is None else Coding(scheme)
    center = block.get_submodule(f"{arch.attention}.{KEY_CENTER}")
    assert isinstance(center, KeyCenter)
    return Coding(scheme, center.mean)


def _gains(model: WholeModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Gains of norms in blocks, and of the final one, by name."""
    arch = model.arch
    for name, parameter in model.model.named_parameters():
        inside = name.startswith((f"{arch.blocks}.", f"{arch.final_norm}."))
        if inside and name.endswith("norm.weight") and parameter.dim() == 1:
            yield name, parameter


def _biases(model: WholeModel, config: PackedConfig) -> Iterator[tuple[str, nn.Parameter]]:
    """Biases that norms got, by name."""
    for path, spec in config.modules.items():
        if isinstance(spec, NormBiasSpec):
            yield f"{path}.bias", model.model.get_parameter(f"{path}.bias")

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

from subnibble.cache_scheme import CacheScheme, PrefixIds
from subnibble.calibrate.prefix import PrefixStream, States, behind
from subnibble.checkpoint.entries import KEY_CENTER, PREFIX, PackedLinearEntry
from subnibble.checkpoint.packed import PackedConfig
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.checkpoint.source import Source
from subnibble.device import free_memory
from subnibble.model.packed import check_values, fill_, pack_modules_
from subnibble.model.site import Arch, Heads
from subnibble.model.skeleton import Block, Skeleton
from subnibble.model.transformers_api.blocks import BlockCall, run_block
from subnibble.runtime.kv_cache import Coding
from subnibble.runtime.modules import KeyCenter, PackedLinear
from subnibble.tuning.distillation import Distillation
from subnibble.tuning.student import Entrance, StudentLinear

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

    def log_shares(self, ids: Tensor) -> Tensor:
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
    """The packed model with what is learned of it. spaces: parameters, each with what a share of 1 is of it.

    types: of tensors in the checkpoint, by their names; of gains.
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
        self._linears = {p: m for p, m in model.model.named_modules() if isinstance(m, StudentLinear)}
        self._entrances = list(dict.fromkeys(linear.entrance for linear in self._linears.values()))
        self._norms = dict(_gains(model)) if settings.norms else {}
        for gain in self._norms.values():
            gain.requires_grad_(True)
        self.spaces = self._spaces()

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
        types = {name: packed.load_raw(name).dtype for name, _ in _gains(whole)}
        return cls(whole, config, settings, device, types)

    def logits(self, ids: Tensor) -> Tensor:
        """(b, t, vocabulary) float32."""
        if self._keeps is None:
            self._keeps = self._model.keeps_states(ids.numel(), self._device)
        return self._model.logits(ids.to(self._device), self._keeps or not torch.is_grad_enabled())

    def bound_(self) -> None:
        """Bring what was learned back into its range."""
        for linear in self._linears.values():
            linear.bound_()
        for entrance in self._entrances:
            entrance.bound_()

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """Gains, too, as the checkpoint's types hold them; scales and clips always are."""
        exact = {name: gain.detach().clone() for name, gain in self._norms.items()}
        with torch.no_grad():
            for name, gain in self._norms.items():
                gain.copy_(gain.to(self._types[name]))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, gain in self._norms.items():
                    gain.copy_(exact[name])

    def forget(self) -> None:
        """Forget what sites held."""
        for entrance in self._entrances:
            entrance.forget()

    def parameters(self) -> list[nn.Parameter]:
        """All that is learned."""
        return [parameter for space in self.spaces.values() for parameter, _ in space]

    def tensors(self) -> dict[str, Tensor]:
        """What was learned, by its name in the checkpoint; gains in float32."""
        found = {name: gain.detach().clone() for name, gain in self._norms.items()}
        for path, linear in self._linears.items():
            found |= {f"{path}.{name}": tensor for name, tensor in linear.stored().items()}
        return found

    def config(self) -> PackedConfig:
        """What config.json says now."""
        modules = dict(self._config.modules)
        for path, linear in self._linears.items():
            entry = modules[path]
            assert isinstance(entry, PackedLinearEntry)
            modules[path] = replace(entry, activation=linear.entrance.scheme)
        return replace(self._config, modules=modules)

    def _spaces(self) -> dict[str, list[tuple[nn.Parameter, float]]]:
        scales = [(part, 1.0) for linear in self._linears.values() for part in linear.parameters()]
        norms = [(gain, float(gain.detach().abs().mean())) for gain in self._norms.values()]
        clips = [(entrance.share, 1.0) for entrance in self._entrances]
        found = {"scales": scales, "norms": norms, "clips": clips}
        return {name: [pair for pair in space if pair[0].requires_grad] for name, space in found.items()}


def _learn_(block: nn.Module, arch: Arch, settings: Distillation, dtype: torch.dtype) -> None:
    """Let a block's packed linears learn; readers of a site that take its tensor alike share what they make of it."""
    for site in arch.sites:
        shared: list[tuple[PackedLinear, Entrance]] = []
        for name in site.readers:
            linear = block.get_submodule(name)
            if not isinstance(linear, PackedLinear):
                continue
            entrance = next((own for other, own in shared if _enter_alike(linear, other)), None)
            if entrance is None:
                entrance = Entrance(linear.terms, settings.clips, dtype)
                shared.append((linear, entrance))
            block.set_submodule(name, StudentLinear(linear.terms, entrance, settings.scales))


def _enter_alike(one: PackedLinear, other: PackedLinear) -> bool:
    if one.activation != other.activation or one.blocks != other.blocks:
        return False
    pairs = ((one.gather, other.gather), (one.column_scale, other.column_scale))
    return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


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

"""The two models of distillation: teacher (the original) and student (the packed model with learned parameters).

Both run block by block. Activations inside the student's blocks are stored for the backward pass if memory allows it,
and computed again otherwise.
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
from subnibble.calibrate.prefix import PrefixStream, States, after_prefix
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
from subnibble.runtime.kv_cache import CacheQuantizer
from subnibble.runtime.modules import KeyCenter, PackedLinear
from subnibble.tensor.cache_scheme import CacheScheme, PrefixIds

# Activations that the backward pass of a block needs per token, as a multiple of the residual stream's width; the share
# of free memory that they may take.
_STORED_PER_TOKEN, FREE_SHARE = 80, 0.25


def states_bytes(blocks: int, tokens: int, width: int) -> int:
    """Estimate the bytes of activations inside the blocks that a backward pass stores.

    blocks: number of blocks.
    tokens: number of tokens in the batch.
    width: channels of the residual stream.
    """
    return blocks * tokens * width * _STORED_PER_TOKEN * torch.float32.itemsize


@dataclass(frozen=True)
class WholeModel:
    """A model that is run block by block.

    model: a transformers causal language model.
    arch: its architecture.
    calls: call arguments of each block, for windows of one length after the prefix.
    """

    model: Any
    arch: Arch
    calls: list[BlockCall]

    def keeps_states(self, tokens: int, device: torch.device) -> bool:
        """Whether memory suffices to store the activations inside the blocks for this many tokens."""
        needed = states_bytes(len(self.calls), tokens, self.model.config.hidden_size)
        return needed < FREE_SHARE * free_memory(device)

    def logits(self, ids: Tensor, keeps_states: bool) -> Tensor:
        """Logits (b, t, vocabulary) float32.

        ids: (b, t) int64 token ids.
        keeps_states: store activations inside the blocks for the backward pass; else it computes them again.
        """
        get = self.model.get_submodule
        hidden = get(self.arch.embedding)(ids)
        for block, call in zip(get(self.arch.blocks), self.calls, strict=True):
            if keeps_states:
                hidden = run_block(block, hidden, call)
            else:
                hidden = checkpoint(run_block, block, hidden, call, use_reentrant=False)
        logits: Tensor = get(self.arch.head)(get(self.arch.final_norm)(hidden)).float()
        return logits


class Teacher:
    """The original model, whose predictions are the targets."""

    def __init__(self, model: WholeModel, device: torch.device) -> None:
        self._model, self._device = model, device

    @classmethod
    def of(
        cls, source: Source, prefix: PrefixIds | None, length: int, dtype: torch.dtype, device: torch.device
    ) -> Teacher:
        """Load the model of `source`.

        prefix: token ids of the prompt prefix that comes before every window, or None.
        length: tokens per window.
        dtype: compute dtype.
        """
        skeleton = Skeleton(source, dtype, device)
        model = skeleton.load_all()
        states: list[States | None] = [None] * skeleton.num_blocks
        if prefix is not None:
            states = [*_states(skeleton, model, prefix)]
        prefix_length = 0 if prefix is None else len(prefix.ids)
        calls = skeleton.block_calls(length, dtype, prefix_length)
        calls = [after_prefix(call, prefix_states) for call, prefix_states in zip(calls, states, strict=True)]
        return cls(WholeModel(model, skeleton.arch, calls), device)

    def log_probs(self, ids: Tensor) -> Tensor:
        """Log-probabilities of the next token, (b, t, vocabulary). ids: (b, t) int64."""
        with torch.no_grad():
            return self._model.logits(ids.to(self._device), keeps_states=True).log_softmax(-1)


def _states(skeleton: Skeleton, model: Any, prefix: PrefixIds) -> Iterator[States]:
    """Keys and values of a prefix in each block of a loaded model."""
    arch = skeleton.arch
    with torch.no_grad():
        hidden = model.get_submodule(arch.embedding)(torch.tensor([prefix.ids], device=skeleton.device))
    stream = PrefixStream(skeleton, hidden, skeleton.dtype)
    for index, block in enumerate(model.get_submodule(arch.blocks)):
        yield stream.advance(Block(index, arch.block_path(index), block, arch, Heads.of(skeleton.config)))


class Student:
    """The packed model with its learned parameters.

    model: the model, its packed linears in the blocks replaced by `StudentLinear`.
    config: the checkpoint's manifest.
    settings: what is learned.
    types: stored dtype of each norm gain and norm bias, by its name in the checkpoint.
    spaces (attribute): learned parameters by the `Distillation` setting that enables them.
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
            raise SilentFailure(
                f"{fixed[0]} is packed but has no learned parameters; this is a bug of subnibble, please report it"
            )
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
        """Load a packed checkpoint.

        source: the original model.
        packed: the checkpoint that was quantized from it.
        config: the checkpoint's manifest.
        settings: what is learned.
        length: tokens per window.
        dtype: compute dtype of the packed linears' products; everything else is float32.
        """
        skeleton = Skeleton(source, torch.float32, device)
        prefix_length = 0 if config.prefix is None else len(config.prefix.ids)
        calls = skeleton.block_calls(length, torch.float32, prefix_length)
        model, arch = skeleton.model, skeleton.arch
        pack_modules_(model, config, torch.float32)
        fill_(model, packed, torch.float32, device)
        check_values(model, config)
        for index, block in enumerate(model.get_submodule(arch.blocks)):
            _learn_(block, arch, settings, dtype)
            calls[index] = after_prefix(
                calls[index], _stored_prefix(block, arch), _cache_quantizer(block, arch, config.cache)
            )
        student_model = WholeModel(model, arch, calls)
        types = {
            name: packed.load_raw(name).dtype for name, _ in (*_gains(student_model), *_biases(student_model, config))
        }
        return cls(student_model, config, settings, device, types)

    def logits(self, ids: Tensor) -> Tensor:
        """Logits (b, t, vocabulary) float32. ids: (b, t) int64."""
        if self._keeps is None:
            self._keeps = self._model.keeps_states(ids.numel(), self._device)
        logits = self._model.logits(ids.to(self._device), self._keeps or not torch.is_grad_enabled())
        # `_check_reached` covers learned parameters only, not fixed biases and not the matrix before the head.
        check_ran(self._model.model)
        return logits

    def bound_(self) -> None:
        """Clamp learned parameters to their valid range."""
        for linear in self._linears.values():
            linear.bound_()
        for entrance in self._entrances:
            entrance.bound_()

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """Round norm gains and biases to their stored dtype inside the context; the linears' parameters always are."""
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
        """Drop the cached inputs of all sites."""
        for entrance in self._entrances:
            entrance.forget()

    def parameters(self) -> list[nn.Parameter]:
        """All learned parameters."""
        return [learned.parameter for space in self.spaces.values() for learned in space]

    def tensors(self) -> dict[str, Tensor]:
        """Learned tensors by their names in the checkpoint; norm gains and biases in float32."""
        tensors = {name: parameter.detach().clone() for name, parameter in self._norms.items()}
        for path, linear in self._linears.items():
            spec = self._config.modules[path]
            assert isinstance(spec, PackedLinearSpec)
            tensors |= {f"{path}.{name}": tensor for name, tensor in linear.stored().items() if name in spec.parts}
        return tensors

    def config(self) -> PackedConfig:
        """The manifest with the learned clips."""
        modules = dict(self._config.modules)
        for path, linear in self._linears.items():
            spec = modules[path]
            assert isinstance(spec, PackedLinearSpec)
            modules[path] = replace(spec, activation=linear.entrance.scheme)
        return replace(self._config, modules=modules)

    def _spaces(
        self, gains: Mapping[str, nn.Parameter], biases: Mapping[str, nn.Parameter]
    ) -> dict[str, list[Learned]]:
        spaces: dict[str, list[Learned]] = {name: [] for name in SPACES}
        paths = {linear.entrance: path for path, linear in reversed(self._linears.items())}
        learned = [linear.learned(path) for path, linear in self._linears.items()]
        learned += [entrance.learned(paths[entrance]) for entrance in self._entrances]
        for of_module in learned:
            for space, parameters in of_module.items():
                spaces[space] += parameters
        spaces["norms"] = [Learned(name, gain, _size(gain)) for name, gain in gains.items()]
        for name, bias in biases.items():
            # The gain gives the magnitude of the norm's output; the bias itself may be all zeros.
            gain = self._model.model.get_parameter(f"{name.removesuffix('.bias')}.weight")
            spaces["norm_biases"].append(Learned(name, bias, _size(gain)))
        return spaces


def _size(gain: Tensor) -> float:
    return float(gain.detach().abs().mean())


def _learn_(block: nn.Module, arch: Arch, settings: Distillation, dtype: torch.dtype) -> None:
    """Replace a block's packed linears by `StudentLinear`; readers with the same `SiteInput` share one `Entrance`."""
    for site in arch.sites:
        shared: list[tuple[PackedLinear, Entrance]] = []
        for name in site.readers:
            linear = block.get_submodule(name)
            if not isinstance(linear, PackedLinear):
                continue
            entrance = next(
                (candidate for other, candidate in shared if linear.linear.input.same_as(other.linear.input)),
                None,
            )
            if entrance is None:
                entrance = Entrance(linear.linear.input, settings.learned, dtype, linear.codes.device)
                shared.append((linear, entrance))
            block.set_submodule(name, StudentLinear(linear.linear, entrance, settings.learned))


def _stored_prefix(block: nn.Module, arch: Arch) -> States | None:
    """Keys and values (float32) of the prefix that a block's attention stores; None without a prefix."""
    attention = block.get_submodule(arch.attention)
    if not hasattr(attention, PREFIX):
        return None
    states = getattr(attention, PREFIX)
    return states.keys.float(), states.values.float()


def _cache_quantizer(block: nn.Module, arch: Arch, scheme: CacheScheme | None) -> CacheQuantizer | None:
    """How a block's KV cache is quantized, with the key center that its attention stores; None for 16 bits."""
    if scheme is None or not scheme.is_centered:
        return None if scheme is None else CacheQuantizer(scheme)
    center = block.get_submodule(f"{arch.attention}.{KEY_CENTER}")
    assert isinstance(center, KeyCenter)
    return CacheQuantizer(scheme, center.mean)


def _gains(model: WholeModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Gains of the norms in blocks and of the final norm, by name."""
    arch = model.arch
    for name, parameter in model.model.named_parameters():
        inside = name.startswith((f"{arch.blocks}.", f"{arch.final_norm}."))
        if inside and name.endswith("norm.weight") and parameter.dim() == 1:
            yield name, parameter


def _biases(model: WholeModel, config: PackedConfig) -> Iterator[tuple[str, nn.Parameter]]:
    """Biases that quantization added to norms, by name."""
    for path, spec in config.modules.items():
        if isinstance(spec, NormBiasSpec):
            yield f"{path}.bias", model.model.get_parameter(f"{path}.bias")

"""Tune a packed model as a whole towards the original's predictions: its codes stay, its scales move.

    L = mean over tokens KL(p || q),   p, q: the next token's probabilities, of the original and of the packed model

Learned are what costs no bits: scales of weights, gains of norms, clips of inputs (`tuning/student.py`). Blocks that
were quantized one by one each answer for their own output; here they answer together for what the model says. The step
is EfficientQAT's end-to-end one (arXiv 2407.11062, section 3.3), the original in the place of the text as teacher. The
packed model runs as it will: inputs quantized, keys and values through the cache's codes, behind the prompt.

AdamW, warmed up, a cosine; steps are shares of the numbers they change, so that one rate fits all. Some windows are
held out and looked at now and then: where the loss on them is no less than before, or where it or a gradient is not
finite, training goes back to the best state, the start among them, at a quarter of the rate. The original is held
beside the packed model; what is inside the latter's blocks is kept for gradients where memory allows it, else computed
twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from subnibble.cache_scheme import CacheScheme, PrefixIds
from subnibble.calibrate.prefix import PrefixStream, States, behind
from subnibble.checkpoint.packed import KEY_CENTER, PREFIX, PackedConfig, PackedLinearEntry
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.checkpoint.source import Source
from subnibble.device import free_memory
from subnibble.errors import NumericalFailure
from subnibble.model.packed import fill_, pack_modules_
from subnibble.model.site import Arch, Heads
from subnibble.model.skeleton import Block, Skeleton
from subnibble.progress import Progress
from subnibble.report import DistillReport
from subnibble.runtime.kv_cache import Coding
from subnibble.runtime.modules import KeyCenter, PackedLinear
from subnibble.tuning.distillation import Distillation
from subnibble.tuning.student import Entrance, StudentLinear

_WARM_UP, _LAST_RATE, _BETAS = 0.1, 0.05, (0.9, 0.95)
_LARGEST_GRADIENT = 1.0
# Numbers, in channels of the residual stream, that a block's gradients need of a token; the share of free memory that
# may be spent on them.
_KEPT_OF_TOKEN, FREE_SHARE = 80, 0.25
# One window in so many is held out, up to so many tokens.
_HELD_OUT, _HELD_OUT_TOKENS = 8, 4096
# When held-out windows are looked at, as shares of all steps; and what the rate is divided by where they got worse.
_LOOKS, _SLOWER = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1), 4


@dataclass(frozen=True)
class Distilled:
    """What changed. tensors: by their names in the checkpoint. config: with the clips as learned."""

    tensors: Mapping[str, Tensor]
    config: PackedConfig
    report: DistillReport


def distill(
    source: Source,
    packed: SafetensorsSource,
    config: PackedConfig,
    settings: Distillation,
    windows: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    progress: Progress,
) -> Distilled:
    """Tune the checkpoint `packed`, which was made of `source` and says `config` of itself.

    windows: (n, t) ids of calibration text. dtype: that products are computed in. seed: draws the order of windows.
    """
    samples = _Samples.of(windows, settings)
    length = samples.trained.shape[1]
    teacher = _Teacher.of(source, config.prefix, length, dtype, device)
    student = _Student.of(source, packed, config, settings, length, dtype, device)
    training = _Training(teacher, student, samples, settings, seed)
    training.run(progress)
    return Distilled(student.tensors(), student.config(), training.report())


def states_bytes(blocks: int, tokens: int, width: int) -> int:
    """What gradients need of so many tokens inside blocks of a residual stream of `width` channels; rough."""
    return blocks * tokens * width * _KEPT_OF_TOKEN * torch.float32.itemsize


@dataclass(frozen=True)
class _Samples:
    """Ids (n, t) to train on and to look at, and how many of them a step takes."""

    trained: Tensor
    held_out: Tensor
    together: int

    @classmethod
    def of(cls, windows: Tensor, settings: Distillation) -> _Samples:
        """Windows longer than a step are cut into several."""
        count, length = settings.pieces(*windows.shape)
        pieces = windows[:, : windows.shape[1] // length * length].reshape(count, length)
        held = max(1, min(count // _HELD_OUT, _HELD_OUT_TOKENS // length))
        return cls(pieces[: count - held], pieces[count - held :], max(1, settings.tokens // length))

    def order(self, steps: int, seed: int) -> Iterator[Tensor]:
        """Batches of ids: all windows in some order, then in another."""
        generator, waiting = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
        for _ in range(steps):
            while waiting.shape[0] < self.together:
                waiting = torch.cat([waiting, torch.randperm(self.trained.shape[0], generator=generator)])
            yield self.trained[waiting[: self.together]]
            waiting = waiting[self.together :]


@dataclass(frozen=True)
class _Model:
    """A model run block by block. arguments: of each block, for windows of one length, its prefix among them."""

    model: Any
    arch: Arch
    arguments: list[dict[str, Any]]

    def keeps_states(self, tokens: int, device: torch.device) -> bool:
        """Whether there is memory for what is inside the blocks, for so many tokens."""
        needed = states_bytes(len(self.arguments), tokens, self.model.config.hidden_size)
        return needed < FREE_SHARE * free_memory(device)

    def logits(self, ids: Tensor, keeps_states: bool) -> Tensor:
        """(b, t, vocabulary) float32. keeps_states: of blocks, for gradients; else they are computed again there."""
        get = self.model.get_submodule
        hidden = get(self.arch.embedding)(ids)
        for block, own in zip(get(self.arch.blocks), self.arguments, strict=True):
            if keeps_states:
                hidden = _run(block, hidden, own)
            else:
                hidden = checkpoint(_run, block, hidden, own, use_reentrant=False)
        found: Tensor = get(self.arch.head)(get(self.arch.final_norm)(hidden)).float()
        return found


def _run(block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    output = block(hidden, **arguments)
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


class _Teacher:
    """The original."""

    def __init__(self, model: _Model, device: torch.device) -> None:
        self._model, self._device = model, device

    @classmethod
    def of(
        cls, source: Source, prefix: PrefixIds | None, length: int, dtype: torch.dtype, device: torch.device
    ) -> _Teacher:
        skeleton = Skeleton(source, dtype, device)
        model = skeleton.load_all()
        states: list[States | None] = [None] * skeleton.num_blocks
        if prefix is not None:
            states = [*_states(skeleton, model, prefix)]
        past = 0 if prefix is None else len(prefix.ids)
        arguments = skeleton.block_arguments(length, dtype, past)
        arguments = [behind(own, state) for own, state in zip(arguments, states, strict=True)]
        return cls(_Model(model, skeleton.arch, arguments), device)

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


class _Student:
    """The packed model with what is learned of it. spaces: parameters, each with what a share of 1 is of it."""

    def __init__(self, model: _Model, config: PackedConfig, settings: Distillation, device: torch.device) -> None:
        self._model, self._config, self._device = model, config, device
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
    ) -> _Student:
        skeleton = Skeleton(source, torch.float32, device)
        past = 0 if config.prefix is None else len(config.prefix.ids)
        arguments = skeleton.block_arguments(length, torch.float32, past)
        model, arch = skeleton.model, skeleton.arch
        pack_modules_(model, config, torch.float32)
        fill_(model, packed, torch.float32, device)
        for index, block in enumerate(model.get_submodule(arch.blocks)):
            _learn_(block, arch, settings, dtype)
            arguments[index] = behind(arguments[index], _held(block, arch), _coding(block, arch, config.cache))
        return cls(_Model(model, arch, arguments), config, settings, device)

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
    if scheme is None or scheme.key_center == "none":
        return None if scheme is None else Coding(scheme)
    center = block.get_submodule(f"{arch.attention}.{KEY_CENTER}")
    assert isinstance(center, KeyCenter)
    return Coding(scheme, center.mean)


def _gains(model: _Model) -> Iterator[tuple[str, nn.Parameter]]:
    """Gains of norms in blocks, and of the final one, by name."""
    arch = model.arch
    for name, parameter in model.model.named_parameters():
        inside = name.startswith((f"{arch.blocks}.", f"{arch.final_norm}."))
        if inside and name.endswith("norm.weight") and parameter.dim() == 1:
            yield name, parameter


@dataclass
class _Training:
    """The loop. before, best: losses on held-out windows."""

    teacher: _Teacher
    student: _Student
    samples: _Samples
    settings: Distillation
    seed: int
    before: float = math.nan
    best: float = math.nan
    rollbacks: int = 0
    _state: list[Tensor] = field(default_factory=list)

    def run(self, progress: Progress) -> None:
        """Train in place."""
        steps = self.settings.steps
        self.before = self.best = self._look()
        if not math.isfinite(self.before):
            raise NumericalFailure(
                "what the packed model says is not finite, so it cannot be distilled; use more bits, or leave "
                "distill_steps out"
            )
        self._keep()
        optimizer, rate = self._optimizer(), self.settings.rate
        looks = {max(1, round(steps * share)) for share in _LOOKS}
        for step, ids in enumerate(self.samples.order(steps, self.seed)):
            self._set_rates_(optimizer, rate, step)
            loss = self._step(ids, optimizer)
            finite = math.isfinite(loss)
            if step + 1 in looks or not finite:
                seen = self._look() if finite else math.inf
                if seen < self.best:
                    self.best = seen
                    self._keep()
                else:
                    self._restore()
                    optimizer, rate = self._optimizer(), rate / _SLOWER
                    self.rollbacks += 1
            progress(step + 1, steps, f"distilled to a held-out loss of {self.best:.4f}")
        self._restore()

    def report(self) -> DistillReport:
        """What the report says of it."""
        return DistillReport(self.before, self.best, self.settings.steps, self.rollbacks)

    def _look(self) -> float:
        """The loss on held-out windows."""
        # What the original says of all of them would be large to keep: a number for each token and word.
        with torch.no_grad():
            losses = [
                float(_divergence(self.teacher.log_shares(ids), self.student.logits(ids))) * ids.shape[0]
                for ids in self.samples.held_out.split(self.samples.together)
            ]
        self.student.forget()
        return math.fsum(losses) / len(self.samples.held_out)

    def _step(self, ids: Tensor, optimizer: torch.optim.Optimizer) -> float:
        """One step; its loss, or nan, and no step, where it is not finite."""
        optimizer.zero_grad(set_to_none=True)
        loss = _divergence(self.teacher.log_shares(ids), self.student.logits(ids))
        loss.backward()
        self.student.forget()
        norms = [
            torch.nn.utils.clip_grad_norm_([parameter for parameter, _ in space], _LARGEST_GRADIENT)
            for space in self.student.spaces.values()
            if space
        ]
        if not all(bool(norm.isfinite()) for norm in (loss, *norms)):
            return math.nan
        optimizer.step()
        self.student.bound_()
        return float(loss.detach())

    def _optimizer(self) -> torch.optim.Optimizer:
        # A norm's gains take steps of their own size.
        groups = [
            {"params": [parameter], "unit": unit} for space in self.student.spaces.values() for parameter, unit in space
        ]
        return torch.optim.AdamW(groups, lr=0.0, betas=_BETAS, weight_decay=0.0)

    def _set_rates_(self, optimizer: torch.optim.Optimizer, rate: float, step: int) -> None:
        done = step / self.settings.steps
        cosine = _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * done)) / 2
        warm = min(1.0, (step + 1) / max(1.0, _WARM_UP * self.settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["unit"] * cosine * warm

    def _keep(self) -> None:
        self._state = [parameter.detach().clone() for parameter in self.student.parameters()]

    def _restore(self) -> None:
        with torch.no_grad():
            for parameter, kept in zip(self.student.parameters(), self._state, strict=True):
                parameter.copy_(kept)


def _divergence(wanted: Tensor, logits: Tensor) -> Tensor:
    """Mean KL(p || q) over tokens. wanted: log p; logits: of q; both (b, t, vocabulary)."""
    found = nn.functional.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="none")
    return found.sum(-1).mean()

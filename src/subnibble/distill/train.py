"""Tune a packed model as a whole towards the original's predictions: its codes stay, its scales move.

    L = mean over tokens KL(p || q),   p, q: the next token's probabilities, of the original and of the packed model

Learned are what costs no bits: scales and real zero-points of weights, stored column scales, gains and biases of norms,
clips of inputs (`learned_matrix.py`, `linear.py`, `tuning/input_clip.py`). Blocks that were quantized
one by one each answer for their own output; here they answer together for what the model says. The step is
EfficientQAT's end-to-end one (arXiv 2407.11062, section 3.3), the original in the place of the text as teacher. The
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
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from subnibble.calibrate.stats import WeightedMean
from subnibble.checkpoint.manifest import PackedConfig
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.checkpoint.source import Source
from subnibble.distill.learned_matrix import Learned
from subnibble.distill.models import Student, Teacher
from subnibble.distill.settings import Distillation
from subnibble.errors import NumericalFailure, SilentFailure
from subnibble.progress import Progress
from subnibble.report import DistillReport

_WARM_UP, _LAST_RATE, _BETAS = 0.1, 0.05, (0.9, 0.95)
_LARGEST_GRADIENT = 1.0
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

    settings: that let something of it be learned. windows: (n, t) ids of calibration text. dtype: that products are
    computed in. seed: draws the order of windows.
    """
    samples = _Samples.of(windows, settings)
    length = samples.trained.shape[1]
    teacher = Teacher.of(source, config.prefix, length, dtype, device)
    student = Student.of(source, packed, config, settings, length, dtype, device)
    training = _Training(teacher, student, samples, settings, seed)
    training.run(progress)
    return Distilled(student.tensors(), student.config(), training.report())


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


@dataclass
class _Training:
    """The loop. before, best: losses on held-out windows."""

    teacher: Teacher
    student: Student
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
        """The loss on held-out windows, of the model as it would be stored."""
        # What the original says of all of them would be large to keep: a number for each token and word.
        with torch.no_grad(), self.student.as_stored():
            loss = WeightedMean()
            for ids in self.samples.held_out.split(self.samples.together):
                loss.update(float(_divergence(self.teacher.log_probs(ids), self.student.logits(ids))), ids.shape[0])
        self.student.forget()
        return loss.value

    def _step(self, ids: Tensor, optimizer: torch.optim.Optimizer) -> float:
        """One step; its loss, or nan, and no step, where it is not finite."""
        optimizer.zero_grad(set_to_none=True)
        loss = _divergence(self.teacher.log_probs(ids), self.student.logits(ids))
        loss.backward()
        self.student.forget()
        _check_reached(self.student.spaces)
        norms = [
            torch.nn.utils.clip_grad_norm_([one.parameter for one in space], _LARGEST_GRADIENT)
            for space in self.student.spaces.values()
            if space
        ]
        if not all(bool(norm.isfinite()) for norm in (loss, *norms)):
            return math.nan
        optimizer.step()
        self.student.bound_()
        return float(loss.detach())

    def _optimizer(self) -> torch.optim.Optimizer:
        # What is no share takes steps of its own size.
        groups = [
            {"params": [one.parameter], "unit": one.unit} for space in self.student.spaces.values() for one in space
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


def _check_reached(spaces: Mapping[str, list[Learned]]) -> None:
    """Raise `SilentFailure` if a gradient did not reach something that is to be learned: the model never called it."""
    lost = [one.name for space in spaces.values() for one in space if one.parameter.grad is None]
    if lost:
        raise SilentFailure(
            f"{lost[0]} is to be learned and no gradient reaches it ({len(lost)} in all): the model was run without "
            "it. This is a fault of subnibble's; please report it, with the releases of torch and transformers"
        )


def _divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Mean KL(p || q) over tokens. target: log p; logits: of q; both (b, t, vocabulary)."""
    found = nn.functional.kl_div(logits.log_softmax(-1), target, log_target=True, reduction="none")
    return found.sum(-1).mean()

"""Tune a packed model as a whole towards the original's predictions, with fixed codes and learned scales.

    L = mean over tokens KL(p || q),   p, q: next-token probabilities of the original and of the packed model

Only parameters that cost no further bits are learned: scales and real zero-points of weights, stored column scales,
gains and biases of norms, clips of inputs (`learned_matrix.py`, `linear.py`, `tuning/input_clip.py`). Quantization fits
each block to its own output; distillation fits all blocks together to the model's output. It is EfficientQAT's
end-to-end step (arXiv 2407.11062, section 3.3) with the original model instead of the text as teacher. The packed model
runs as at inference: with quantized inputs, a quantized KV cache and the prompt prefix.

AdamW with warm-up and a cosine schedule. Steps are relative to the parameters' magnitudes, so that one rate fits all.
Some windows are held out and evaluated a few times. If their loss has not improved, or if it or a gradient is not
finite, training returns to the best state so far (possibly the start) at a quarter of the rate. Both models are in
memory. Activations inside the packed model's blocks are stored for the backward pass if memory allows it, and computed
again otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any

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
from subnibble.resume.interrupt import safe_point
from subnibble.resume.keeper import Keeper, State

# Names of the steps that a run records: the state of the training, and its result.
DISTILLING, DISTILLED = "distilling", "distilled"
_WARM_UP, _LAST_RATE, _BETAS = 0.1, 0.05, (0.9, 0.95)
_LARGEST_GRADIENT = 1.0
# One window in _HELD_OUT is held out, up to _HELD_OUT_TOKENS tokens in all.
_HELD_OUT, _HELD_OUT_TOKENS = 8, 4096
# When the held-out loss is computed, as shares of all steps; the divisor of the rate if it has not improved.
_EVALUATE_AT, _RATE_DIVISOR = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1), 4


@dataclass(frozen=True)
class Distilled:
    """Result of distillation.

    tensors: learned tensors by their names in the checkpoint.
    config: the checkpoint's manifest with the learned clips.
    report: losses and step counts.
    """

    tensors: Mapping[str, Tensor]
    config: PackedConfig
    report: DistillReport

    def state(self) -> State:
        """The result for a journal: values for JSON, and tensors."""
        values = {
            "names": list(self.tensors), "config": self.config.to_dict(), "report": asdict(self.report),
        }  # fmt: skip
        return values, list(self.tensors.values())

    @classmethod
    def of_state(cls, values: Mapping[str, Any], tensors: Sequence[Tensor]) -> Distilled:
        """Read what `state` returned."""
        named = dict(zip(values["names"], tensors, strict=True))
        return cls(named, PackedConfig.from_dict(values["config"]), DistillReport(**values["report"]))


def distill(
    source: Source,
    packed: SafetensorsSource,
    config: PackedConfig,
    settings: Distillation,
    windows: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    keeper: Keeper,
    progress: Progress,
) -> Distilled:
    """Tune a packed checkpoint; nothing is written.

    source: the original model.
    packed: the checkpoint that was quantized from it.
    config: the checkpoint's manifest.
    settings: what is learned; at least one enabled parameter space must exist in the checkpoint.
    windows: (n, t) int64 token ids of calibration text.
    dtype: compute dtype of matrix products.
    seed: draws the order of windows.
    keeper: keeps the state of the training, and has that of an earlier run to continue.
    progress: called after each step.
    """
    samples = _Samples.of(windows, settings)
    length = samples.trained.shape[1]
    teacher = Teacher.of(source, config.prefix, length, dtype, device)
    student = Student.of(source, packed, config, settings, length, dtype, device)
    training = _Training(teacher, student, samples, settings, seed)
    training.run(keeper, progress)
    return Distilled(student.tensors(), student.config(), training.report())


@dataclass(frozen=True)
class _Samples:
    """Token ids (n, t) to train on and to hold out, and the number of windows per step."""

    trained: Tensor
    held_out: Tensor
    together: int

    @classmethod
    def of(cls, windows: Tensor, settings: Distillation) -> _Samples:
        """Split windows (n, t) into training and held-out pieces; windows longer than a step are cut into several."""
        count, length = settings.pieces(*windows.shape)
        pieces = windows[:, : windows.shape[1] // length * length].reshape(count, length)
        held_out = max(1, min(count // _HELD_OUT, _HELD_OUT_TOKENS // length))
        return cls(pieces[: count - held_out], pieces[count - held_out :], max(1, settings.tokens // length))

    def order(self, steps: int, seed: int) -> Iterator[Tensor]:
        """Yield batches of ids: all windows in random order, in a new order for each pass."""
        generator, waiting = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
        for _ in range(steps):
            while waiting.shape[0] < self.together:
                waiting = torch.cat([waiting, torch.randperm(self.trained.shape[0], generator=generator)])
            yield self.trained[waiting[: self.together]]
            waiting = waiting[self.together :]


@dataclass
class _Training:
    """The training loop. before, best: held-out loss at the start and of the best state."""

    teacher: Teacher
    student: Student
    samples: _Samples
    settings: Distillation
    seed: int
    before: float = math.nan
    best: float = math.nan
    rollbacks: int = 0
    _state: list[Tensor] = field(default_factory=list)

    def run(self, keeper: Keeper, progress: Progress) -> None:
        """Train in place. keeper: keeps the state after each step, and has that of an earlier run to continue."""
        steps, done = self.settings.steps, 0
        optimizer, rate = self._optimizer(), self.settings.rate
        kept = keeper.kept()
        if kept is None:
            self._begin()
        else:
            done, rate = self._restore_from(*kept, optimizer)
            progress(done, steps, f"resumed after step {done}")
        safe_point()
        evaluations = {max(1, round(steps * share)) for share in _EVALUATE_AT}
        for step, ids in islice(enumerate(self.samples.order(steps, self.seed)), done, None):
            self._set_rates_(optimizer, rate, step)
            loss = self._step(ids, optimizer)
            finite = math.isfinite(loss)
            if step + 1 in evaluations or not finite:
                held_out = self._look() if finite else math.inf
                if held_out < self.best:
                    self.best = held_out
                    self._keep()
                else:
                    self._restore()
                    optimizer, rate = self._optimizer(), rate / _RATE_DIVISOR
                    self.rollbacks += 1
            progress(step + 1, steps, f"distilled to a held-out loss of {self.best:.4f}")
            keeper.keep(partial(self._state_after, step + 1, rate, optimizer))
        self._restore()

    def _begin(self) -> None:
        self.before = self.best = self._look()
        if not math.isfinite(self.before):
            raise NumericalFailure(
                "the packed model's predictions are not finite, so it cannot be distilled; use more bits, or leave "
                "distill_steps out"
            )
        self._keep()

    def _state_after(self, step: int, rate: float, optimizer: torch.optim.Optimizer) -> State:
        """Everything that the steps after `step` depend on: values for JSON, and tensors."""
        # The optimizer has no moments for a parameter that no step has changed since it was built.
        moments = [optimizer.state.get(parameter, {}) for parameter in self.student.parameters()]
        tensors = [parameter.detach() for parameter in self.student.parameters()] + self._state
        tensors += [moment[key] for moment in moments for key in sorted(moment)]
        values = {
            "step": step, "rate": rate, "before": self.before, "best": self.best, "rollbacks": self.rollbacks,
            "moments": [sorted(moment) for moment in moments],
        }  # fmt: skip
        return values, tensors

    def _restore_from(
        self, values: Mapping[str, Any], tensors: Sequence[Tensor], optimizer: torch.optim.Optimizer
    ) -> tuple[int, float]:
        """Go on from what `_state_after` returned; return the number of finished steps and the learning rate."""
        parameters, waiting = self.student.parameters(), iter(tensors)
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(next(waiting))
        self._state = [next(waiting).to(parameter.device) for parameter in parameters]
        for parameter, keys in zip(parameters, values["moments"], strict=True):
            moments = {key: next(waiting) for key in keys}
            # AdamW keeps the number of steps on the CPU.
            optimizer.state[parameter] = {
                key: moment if key == "step" else moment.to(parameter.device) for key, moment in moments.items()
            }
        self.before, self.best, self.rollbacks = values["before"], values["best"], values["rollbacks"]
        return values["step"], values["rate"]

    def report(self) -> DistillReport:
        """The part of the report about distillation."""
        return DistillReport(self.before, self.best, self.settings.steps, self.rollbacks)

    def _look(self) -> float:
        """The held-out loss of the model as it would be stored."""
        # The teacher's predictions are computed again; storing them would take a number per token and vocabulary entry.
        with torch.no_grad(), self.student.as_stored():
            loss = WeightedMean()
            for ids in self.samples.held_out.split(self.samples.together):
                loss.update(float(_divergence(self.teacher.log_probs(ids), self.student.logits(ids))), ids.shape[0])
        self.student.forget()
        return loss.value

    def _step(self, ids: Tensor, optimizer: torch.optim.Optimizer) -> float:
        """Take one step and return its loss; if loss or gradient is not finite, take none and return nan."""
        optimizer.zero_grad(set_to_none=True)
        loss = _divergence(self.teacher.log_probs(ids), self.student.logits(ids))
        loss.backward()
        self.student.forget()
        _check_reached(self.student.spaces)
        norms = [
            torch.nn.utils.clip_grad_norm_([learned.parameter for learned in space], _LARGEST_GRADIENT)
            for space in self.student.spaces.values()
            if space
        ]
        if not all(bool(norm.isfinite()) for norm in (loss, *norms)):
            return math.nan
        optimizer.step()
        self.student.bound_()
        return float(loss.detach())

    def _optimizer(self) -> torch.optim.Optimizer:
        # `unit` scales the steps of parameters that do not stand for relative changes.
        groups = [
            {"params": [learned.parameter], "unit": learned.unit}
            for space in self.student.spaces.values()
            for learned in space
        ]
        return torch.optim.AdamW(groups, lr=0.0, betas=_BETAS, weight_decay=0.0)

    def _set_rates_(self, optimizer: torch.optim.Optimizer, rate: float, step: int) -> None:
        done = step / self.settings.steps
        cosine = _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * done)) / 2
        warm_up = min(1.0, (step + 1) / max(1.0, _WARM_UP * self.settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["unit"] * cosine * warm_up

    def _keep(self) -> None:
        self._state = [parameter.detach().clone() for parameter in self.student.parameters()]

    def _restore(self) -> None:
        with torch.no_grad():
            for parameter, best in zip(self.student.parameters(), self._state, strict=True):
                parameter.copy_(best)


def _check_reached(spaces: Mapping[str, list[Learned]]) -> None:
    """Raise `SilentFailure` if a learned parameter has no gradient: the model never used it."""
    unreached = [learned.name for space in spaces.values() for learned in space if learned.parameter.grad is None]
    if unreached:
        raise SilentFailure(
            f"no gradient reaches the learned parameter {unreached[0]} ({len(unreached)} in all): the model ran "
            "without it. This is a bug of subnibble; please report it, with the releases of torch and transformers"
        )


def _divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Mean KL(p || q) over tokens. target: log p. logits: of q. Both are (b, t, vocabulary)."""
    divergence = nn.functional.kl_div(logits.log_softmax(-1), target, log_target=True, reduction="none")
    return divergence.sum(-1).mean()

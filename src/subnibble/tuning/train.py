"""Train a block's learned parameters on the quantized chain's inputs towards the full-precision chain's outputs.

    L = mean over ordinary tokens ||F^q(h^q) - F(h)||² / mean over the same ||F(h) - h||²  +  λ mean(d²)

h^q is the block's input in the model as quantized so far, h its input in the full-precision model, as in OmniQuant
(arXiv 2308.13137, eq. 1). Attention sinks, whose hidden states are huge, and the first token of each window do not
count. Stage 1 trains ranges and smoothing factors, stage 2 everything, with a warm-up for low-rank terms. AdamW, a
cosine schedule over each stage, gradients clipped to norm 1.

Training keeps the state with the lowest held-out loss over all epochs, including the start. Stage 2 begins from it. A
stage ends early after several epochs without a better state. A step whose loss or gradient is not finite is skipped.
After several such steps in a row, or if the held-out loss is not finite, training returns to the best state at half
the learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.calibrate.stats import WeightedMean
from subnibble.model.transformers_api.blocks import BlockCall
from subnibble.model.transformers_api.names import never_called
from subnibble.tuning.block import TunedBlock
from subnibble.tuning.samples import Samples
from subnibble.tuning.tuning import Effort

# AdamW learning rates by parameter space; `Tuning.low_rank_rate` gives the one of low-rank terms.
_RATES = {"clipping": 3e-2, "input_clipping": 1e-2, "smoothing": 1e-2}
_LAST_RATE = 0.05
_WARM_UP = 0.1
_LARGEST_GRADIENT = 1.0
# Held-out tokens per forward pass: large, because each pass rounds the weights anew.
_HELD_OUT_BATCH = 2048
# A stage ends after this many epochs without a better state.
_PATIENCE = 5
# After this many consecutive non-finite steps, roll back: the parameters are bad, not one window.
_LOST = 4


@dataclass(frozen=True)
class Trained:
    """Outcome of training a block.

    before, after: held-out loss.
    epochs: number of epochs that were run.
    rollbacks: how often training returned to the best state.
    left_out: number of skipped (non-finite) steps.
    """

    before: float
    after: float
    epochs: int
    rollbacks: int
    left_out: int


def train_(
    block: TunedBlock, samples: Samples, effort: Effort, generator: torch.Generator, on_loss: Callable[[float], None]
) -> Trained:
    """Train a block's parameters in place.

    block: its `parameters` are trained.
    samples: training and held-out windows.
    effort: epochs of each stage and tokens per step.
    generator: draws the order of windows.
    on_loss: called with the best held-out loss so far, before training and after each epoch.
    """
    best = before = held_out_loss(block, samples)
    on_loss(before)
    parameters = block.parameters()
    state = _copied(parameters)
    rate, epochs, rollbacks, left_out = 1.0, 0, 0, 0
    rates = {**_RATES, "low_rank": block.tuning.low_rank_rate}
    stages = ((effort.first, tuple(_RATES)), (effort.second, tuple(rates)))
    for count, spaces in stages:
        learned = {name: value for name, value in parameters.items() if name.startswith(spaces)}
        if not learned:
            continue
        for name, value in parameters.items():
            value.requires_grad_(name in learned)
        _restore_(parameters, state)
        optimizer = _optimizer(learned, rates)
        total = count * math.ceil(samples.trained / _per_step(samples, effort))
        step = bad_steps = epochs_without_gain = 0
        for _ in range(count):
            for batch in _batches(samples, effort, generator):
                _set_rates_(optimizer, rate, step / max(total, 1))
                step += 1
                finite = _step_(block, samples, batch, optimizer, learned)
                bad_steps = 0 if finite else bad_steps + 1
                left_out += not finite
                if bad_steps == _LOST:
                    break
            loss = held_out_loss(block, samples) if bad_steps < _LOST else math.nan
            epochs, epochs_without_gain = epochs + 1, epochs_without_gain + 1
            if loss < best:
                best, state, epochs_without_gain = loss, _copied(parameters), 0
            elif not math.isfinite(loss):
                _restore_(parameters, state)
                optimizer = _optimizer(learned, rates)
                rate, rollbacks, bad_steps = rate / 2, rollbacks + 1, 0
            on_loss(best)
            if epochs_without_gain == _PATIENCE:
                break
    _restore_(parameters, state)
    return Trained(before, best, epochs, rollbacks, left_out)


def held_out_loss(block: Callable[[Tensor, BlockCall], Tensor], samples: Samples) -> float:
    """Mean loss on the held-out windows, without the penalty.

    block: function of hidden states (b, t, d) float32 and the call arguments; returns the output (b, t, d).
    samples: its held-out windows are used.
    """
    batch_size = max(1, _HELD_OUT_BATCH // samples.inputs.shape[1])
    loss = WeightedMean()
    with torch.no_grad():
        for batch in torch.tensor(samples.held_out).split(batch_size):
            loss.update(float(_loss(block, samples, batch)), int(samples.ordinary[batch].sum()))
    return loss.value


def _step_(
    block: TunedBlock,
    samples: Samples,
    batch: Tensor,
    optimizer: torch.optim.Optimizer,
    learned: Mapping[str, Tensor],
) -> bool:
    """Take one step; if loss or gradient is not finite, take none and return False."""
    optimizer.zero_grad(set_to_none=True)
    loss = _loss(block, samples, batch) + block.penalty()
    loss.backward()
    unreached = [name for name, value in learned.items() if value.grad is None]
    if unreached:
        raise never_called(f"the module that uses the learned parameter {unreached[0]} of a tuned block")
    norm = torch.nn.utils.clip_grad_norm_(list(learned.values()), _LARGEST_GRADIENT)
    if not bool(torch.isfinite(norm)):
        return False
    optimizer.step()
    block.bound_()
    return True


def _loss(block: Callable[[Tensor, BlockCall], Tensor], samples: Samples, batch: Tensor) -> Tensor:
    output = block(samples.inputs[batch].float(), samples.call)
    error = (output.float() - samples.target[batch].float()).square().sum(-1)
    ordinary = samples.ordinary[batch]
    return (error * ordinary).sum() / (samples.energy * ordinary.sum().clamp(min=1))


def _per_step(samples: Samples, effort: Effort) -> int:
    return max(1, effort.batch // samples.inputs.shape[1])


def _batches(samples: Samples, effort: Effort, generator: torch.Generator) -> list[Tensor]:
    order = torch.randperm(samples.trained, generator=generator)
    return list(order.split(_per_step(samples, effort)))


def _optimizer(learned: Mapping[str, Tensor], rates: Mapping[str, float]) -> torch.optim.Optimizer:
    groups = [
        {"params": [value for name, value in learned.items() if name.startswith(space)], "rate": rate, "space": space}
        for space, rate in rates.items()
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, weight_decay=0.0)


def _set_rates_(optimizer: torch.optim.Optimizer, rate: float, done: float) -> None:
    """Set the learning rates for the fraction `done` of a stage."""
    cosine = _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * done)) / 2
    for group in optimizer.param_groups:
        warm_up = min(1.0, (done + _WARM_UP / 10) / _WARM_UP) if group["space"] == "low_rank" else 1.0
        group["lr"] = rate * group["rate"] * cosine * warm_up


def _copied(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in parameters.items()}


def _restore_(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(state[name])

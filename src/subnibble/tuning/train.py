"""Train what is learned of a block on the quantized chain's inputs towards the full-precision chain's outputs.

    L = mean over ordinary tokens ||F^q(h^q) - F(h)||² / mean over the same ||F(h) - h||²  +  λ mean(d²)

h^q, h: the block's inputs in the model as quantized so far and in the full-precision model, as in OmniQuant (arXiv
2308.13137, eq. 1). Sink tokens, whose states are huge, and the first token of each window are left out. Two stages:
ranges and factors, then everything, low-rank parts warmed up. AdamW; a cosine over each stage; gradients clipped to
norm 1. Of all epochs the state with the least loss on held-out windows is kept, the start among them; the second stage
begins with it, and a stage ends early where some epochs found none better. A step whose loss or gradient is not finite
is left out; where so many are that none is taken any more, or where held-out windows are not finite, training goes back
to the best state at half the step.
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

# Of AdamW, by parameter space; that of low-rank parts is the tuning's own.
_RATES = {"clipping": 3e-2, "input_clipping": 1e-2, "smoothing": 1e-2}
_LAST_RATE = 0.05
_WARM_UP = 0.1
_LARGEST_GRADIENT = 1.0
# Tokens of held-out windows that are run together: weights are rounded anew each time.
_LOOKED_AT_TOGETHER = 2048
# Epochs without a better state after which a stage ends.
_PATIENCE = 5
# Steps on end that are not finite after which what is learned must be at fault, not a window.
_LOST = 4


@dataclass(frozen=True)
class Trained:
    """How it went. before, after: held-out loss. epochs: that were run. rollbacks: to the best state. left_out: steps
    that were not finite.
    """

    before: float
    after: float
    epochs: int
    rollbacks: int
    left_out: int


def train_(
    block: TunedBlock, samples: Samples, effort: Effort, generator: torch.Generator, told: Callable[[float], None]
) -> Trained:
    """Train in place. generator: draws the order of windows. told: is called with the held-out loss, epoch by epoch."""
    best = before = held_out_loss(block, samples)
    told(before)
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
        step = lost = worse = 0
        for _ in range(count):
            for batch in _batches(samples, effort, generator):
                _set_rates_(optimizer, rate, step / max(total, 1))
                step += 1
                finite = _step_(block, samples, batch, optimizer, learned)
                lost = 0 if finite else lost + 1
                left_out += not finite
                if lost == _LOST:
                    break
            loss = held_out_loss(block, samples) if lost < _LOST else math.nan
            epochs, worse = epochs + 1, worse + 1
            if loss < best:
                best, state, worse = loss, _copied(parameters), 0
            elif not math.isfinite(loss):
                _restore_(parameters, state)
                optimizer = _optimizer(learned, rates)
                rate, rollbacks, lost = rate / 2, rollbacks + 1, 0
            told(best)
            if worse == _PATIENCE:
                break
    _restore_(parameters, state)
    return Trained(before, best, epochs, rollbacks, left_out)


def held_out_loss(block: Callable[[Tensor, BlockCall], Tensor], samples: Samples) -> float:
    """The loss on held-out windows, without penalty. block: hidden states (b, t, d) and a call, to the output."""
    together = max(1, _LOOKED_AT_TOGETHER // samples.inputs.shape[1])
    loss = WeightedMean()
    with torch.no_grad():
        for batch in torch.tensor(samples.held_out).split(together):
            loss.update(float(_loss(block, samples, batch)), int(samples.ordinary[batch].sum()))
    return loss.value


def _step_(
    block: TunedBlock,
    samples: Samples,
    batch: Tensor,
    optimizer: torch.optim.Optimizer,
    learned: Mapping[str, Tensor],
) -> bool:
    """One step; False, and none, if it is not finite."""
    optimizer.zero_grad(set_to_none=True)
    loss = _loss(block, samples, batch) + block.penalty()
    loss.backward()
    idle = [name for name, value in learned.items() if value.grad is None]
    if idle:
        raise never_called(f"what {idle[0]} of a tuned block is learned for")
    norm = torch.nn.utils.clip_grad_norm_(list(learned.values()), _LARGEST_GRADIENT)
    if not bool(torch.isfinite(norm)):
        return False
    optimizer.step()
    block.bound_()
    return True


def _loss(block: Callable[[Tensor, BlockCall], Tensor], samples: Samples, batch: Tensor) -> Tensor:
    found = block(samples.inputs[batch].float(), samples.call)
    error = (found.float() - samples.target[batch].float()).square().sum(-1)
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
    """Step sizes where so much of a stage is done."""
    cosine = _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * done)) / 2
    for group in optimizer.param_groups:
        warm = min(1.0, (done + _WARM_UP / 10) / _WARM_UP) if group["space"] == "low_rank" else 1.0
        group["lr"] = rate * group["rate"] * cosine * warm


def _copied(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in parameters.items()}


def _restore_(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(state[name])

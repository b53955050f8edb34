"""Perplexity in one fixed way, and the distance to a reference model on the same windows.

The whole text is tokenized once without special tokens and cut into windows that do not overlap; the first token of
each is not scored, the tail is dropped. Where the model's tokenizer begins texts with BOS, it is put before each
window, and the same tokens are scored. Logits and sums are float32 or wider.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subnibble.errors import CalibrationError, NumericalFailure
from subnibble.model.transformers_api.generation import logits_of
from subnibble.progress import Progress, silent

# Positions whose full logits are compared at once: bounds memory at vocabulary x this x 4 bytes, a few times.
_POSITIONS = 512
_REMEDY = "; are the weights intact, and is the type wide enough (--dtype float32)?"


@dataclass(frozen=True)
class Scores:
    """What a model scored. kl_divergence: mean over tokens of KL(reference || model), in nats.

    top1_agreement: share of tokens at which both find the same token likeliest; both None without a reference.
    """

    perplexity: float
    windows: int
    window: int
    bos: bool
    kl_divergence: float | None = None
    top1_agreement: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary without the comparisons that were not made."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def score(
    models: Mapping[str, nn.Module],
    windows: Tensor,
    bos: int | None,
    reference: nn.Module | None = None,
    progress: Progress = silent,
) -> dict[str, Scores]:
    """Score several models on the same windows; the reference is run once a window for all of them.

    models: transformers causal language models. windows: (count, length) int64 token ids. bos: token to put before
    each window, or None. `CalibrationError` if the windows are too short to score.
    """
    if windows.shape[1] < 2:
        raise CalibrationError("a window of 1 token leaves nothing to score; use --window 2 or more")
    totals = {name: Totals() for name in models}
    for number, window in enumerate(windows):
        target = None if reference is None else _log_probabilities(reference, window, bos)
        if target is not None and math.isnan(float(target.amax())):
            raise NumericalFailure(f"the reference predicts no numbers on window {number}{_REMEDY}")
        for name, model in models.items():
            known = target if model is reference else None
            predicted = _log_probabilities(model, window, bos) if known is None else known
            totals[name].update(predicted, window, target)
            if not totals[name].is_finite:
                raise NumericalFailure(f"{name}: the loss on window {number} is not finite{_REMEDY}")
        progress(number + 1, len(windows), "windows")
    (count, length), found = windows.shape, {}
    for name, total in totals.items():
        perplexity, divergence, agreement = total.value
        found[name] = Scores(perplexity, count, length, bos is not None, divergence, agreement)
    return found


class Totals:
    """Sums over tokens, in float64: a `Statistic` of perplexity, mean divergence and agreement."""

    def __init__(self) -> None:
        self._loss = self._divergence = 0.0
        self._tokens = self._compared = self._agreed = 0

    def update(self, predicted: Tensor, window: Tensor, target: Tensor | None = None) -> None:
        """Add a window. predicted, target: log probabilities (length - 1, vocabulary) of its tokens 1.. ."""
        truth = window[1:].to(predicted.device)
        self._loss -= float(predicted.gather(1, truth.unsqueeze(1)).sum(dtype=torch.float64))
        self._tokens += truth.shape[0]
        if target is None:
            return
        self._compared += truth.shape[0]
        for p, q in zip(target.split(_POSITIONS), predicted.split(_POSITIONS), strict=True):
            # A token that the reference rules out (-inf) adds nothing.
            distance = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
            self._divergence += float(distance.sum(dtype=torch.float64))
            self._agreed += int((p.argmax(1) == q.argmax(1)).sum())

    def merge(self, other: Totals) -> None:
        """See `Statistic`."""
        self._loss += other._loss
        self._divergence += other._divergence
        self._tokens += other._tokens
        self._compared += other._compared
        self._agreed += other._agreed

    @property
    def is_finite(self) -> bool:
        """Whether all that was seen predicted numbers. A divergence may be infinite."""
        return math.isfinite(self._loss) and not math.isnan(self._divergence)

    @property
    def value(self) -> tuple[float, float | None, float | None]:
        """Perplexity, infinite where it overflows; mean divergence and agreement, None without targets."""
        mean = self._loss / self._tokens
        perplexity = math.exp(mean) if mean < 700 else math.inf
        if not self._compared:
            return perplexity, None, None
        return perplexity, self._divergence / self._compared, self._agreed / self._compared


def _log_probabilities(model: nn.Module, window: Tensor, bos: int | None) -> Tensor:
    """Log probabilities (length - 1, vocabulary) float32 of tokens 1.. of the window, given those before."""
    ids = window if bos is None else torch.cat([window.new_tensor([bos]), window])
    device = next(iter((*model.parameters(), *model.buffers()))).device
    with torch.inference_mode():
        logits = logits_of(model, ids.unsqueeze(0).to(device))[0]
        logits = logits[ids.shape[0] - window.shape[0] : -1].float()
        for part in logits.split(_POSITIONS):
            part.sub_(part.logsumexp(1, keepdim=True))
    assert isinstance(logits, Tensor)
    return logits


def check_vocabularies(model: Any, reference: Any) -> None:
    """Raise `CalibrationError` if the two do not predict over the same vocabulary."""
    ours, theirs = model.config.vocab_size, reference.config.vocab_size
    if ours != theirs:
        raise CalibrationError(
            f"the model predicts {ours} tokens and the reference {theirs}; --reference must be its original"
        )

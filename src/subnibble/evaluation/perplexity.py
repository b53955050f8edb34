"""Perplexity by one fixed protocol, and the distance from a reference model on the same windows.

The whole text is tokenized once without special tokens and cut into windows that do not overlap; the incomplete last
window is dropped. The first token of each window is not scored. If the model's tokenizer begins texts with BOS, BOS is
put before each window; the scored tokens are the same. Logits and sums are float32 or wider.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from subnibble.errors import CalibrationError, NumericalFailure
from subnibble.evaluation.runners import Runner, torch_runner
from subnibble.progress import Progress, silent
from subnibble.resume.interrupt import safe_point
from subnibble.resume.keeper import Keeper, State

# Positions whose logits are compared at once; bounds memory to a few times vocabulary x _POSITIONS x 4 bytes.
_POSITIONS = 512
_REMEDY = "; use an intact copy of the weights, or a wider type (--dtype float32)"


@dataclass(frozen=True)
class Scores:
    """Scores of a model on a text.

    perplexity: exp of the mean loss over scored tokens.
    windows: number of windows.
    window: tokens per window.
    bos: whether BOS was put before each window.
    kl_divergence: mean over tokens of KL(reference || model) in nats, None without a reference.
    top1_agreement: share of tokens at which model and reference predict the same most likely token, None without a
        reference.
    """

    perplexity: float
    windows: int
    window: int
    bos: bool
    kl_divergence: float | None = None
    top1_agreement: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The scores as a dictionary, without those that are None."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def score(
    models: Mapping[str, nn.Module | Runner],
    windows: Tensor,
    bos: int | None,
    reference: nn.Module | Runner | None = None,
    progress: Progress = silent,
    keeper: Keeper | None = None,
) -> dict[str, Scores]:
    """Score several models on the same windows; the reference runs once per window for all of them.

    models: by name, transformers models, which run in torch, or what runs them (`runners.py`).
    windows: (count, length) int64 token ids.
    bos: id of the token to put before each window, or None.
    reference: the model that the others are compared with, one of `models` or another, or None.
    progress: called after each window.
    keeper: keeps the sums after each window, and has those of an earlier run to continue; None keeps nothing.

    Raises `CalibrationError` if windows have fewer than two tokens.
    """
    if windows.shape[1] < 2:
        raise CalibrationError("a window of 1 token leaves nothing to score; use --window 2 or more")
    keeper = keeper or Keeper()
    totals, done = {name: Totals() for name in models}, 0
    if (kept := keeper.kept()) is not None:
        done = kept[0]["windows"]
        totals = {name: Totals.of_sums(kept[0]["totals"][name]) for name in models}
        progress(done, len(windows), f"resumed after window {done}")
    safe_point()
    for number, window in islice(enumerate(windows), done, None):
        target = None if reference is None else _log_probabilities(reference, window, bos)
        if target is not None and math.isnan(float(target.amax())):
            raise NumericalFailure(f"the reference's predictions on window {number} are NaN{_REMEDY}")
        for name, model in models.items():
            of_reference = target if model is reference else None
            predicted = _log_probabilities(model, window, bos) if of_reference is None else of_reference
            totals[name].update(predicted, window, target)
            if not totals[name].is_finite:
                raise NumericalFailure(f"{name}: the loss on window {number} is not finite{_REMEDY}")
        progress(number + 1, len(windows), "windows")
        keeper.keep(partial(_state, number + 1, totals))
    (count, length), scores = windows.shape, {}
    for name, total in totals.items():
        perplexity, divergence, agreement = total.value
        scores[name] = Scores(perplexity, count, length, bos is not None, divergence, agreement)
    return scores


def _state(done: int, totals: Mapping[str, Totals]) -> State:
    return {"windows": done, "totals": {name: of_model.sums() for name, of_model in totals.items()}}, []


class Totals:
    """A `Statistic` of perplexity, mean divergence and agreement; sums are float64."""

    def __init__(self) -> None:
        self._loss = self._divergence = 0.0
        self._tokens = self._compared = self._agreed = 0

    def update(self, predicted: Tensor, window: Tensor, target: Tensor | None = None) -> None:
        """Add a window.

        predicted: the model's log-probabilities of tokens 1.., (length - 1, vocabulary) float32.
        window: (length,) int64 token ids.
        target: the reference's log-probabilities, as `predicted`, or None.
        """
        truth = window[1:].to(predicted.device)
        self._loss -= float(predicted.gather(1, truth.unsqueeze(1)).sum(dtype=torch.float64))
        self._tokens += truth.shape[0]
        if target is None:
            return
        self._compared += truth.shape[0]
        for p, q in zip(target.split(_POSITIONS), predicted.split(_POSITIONS), strict=True):
            # A token with probability 0 (-inf) in the reference contributes 0 to KL.
            distance = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
            self._divergence += float(distance.sum(dtype=torch.float64))
            self._agreed += int((p.argmax(1) == q.argmax(1)).sum())

    def sums(self) -> dict[str, float]:
        """The sums over all windows so far, for JSON."""
        return {
            "loss": self._loss, "divergence": self._divergence, "tokens": self._tokens, "compared": self._compared,
            "agreed": self._agreed,
        }  # fmt: skip

    @classmethod
    def of_sums(cls, sums: Mapping[str, Any]) -> Totals:
        """Read what `sums` returned."""
        totals = cls()
        totals._loss, totals._divergence = sums["loss"], sums["divergence"]
        totals._tokens, totals._compared, totals._agreed = sums["tokens"], sums["compared"], sums["agreed"]
        return totals

    def merge(self, other: Totals) -> None:
        """Add the sums of `other`."""
        self._loss += other._loss
        self._divergence += other._divergence
        self._tokens += other._tokens
        self._compared += other._compared
        self._agreed += other._agreed

    @property
    def is_finite(self) -> bool:
        """Whether all losses so far are finite and no divergence is NaN; a divergence may be infinite."""
        return math.isfinite(self._loss) and not math.isnan(self._divergence)

    @property
    def value(self) -> tuple[float, float | None, float | None]:
        """Perplexity (infinite if it overflows), mean divergence and agreement (None without a reference)."""
        mean = self._loss / self._tokens
        perplexity = math.exp(mean) if mean < 700 else math.inf
        if not self._compared:
            return perplexity, None, None
        return perplexity, self._divergence / self._compared, self._agreed / self._compared


def _log_probabilities(model: nn.Module | Runner, window: Tensor, bos: int | None) -> Tensor:
    """Log-probabilities of the window's tokens 1.. given the tokens before, (length - 1, vocabulary) float32."""
    ids = window if bos is None else torch.cat([window.new_tensor([bos]), window])
    run = torch_runner(model) if isinstance(model, nn.Module) else model
    with torch.inference_mode():
        logits = run(ids)[ids.shape[0] - window.shape[0] : -1].float()
        for rows in logits.split(_POSITIONS):
            rows.sub_(rows.logsumexp(1, keepdim=True))
    assert isinstance(logits, Tensor)
    return logits


def check_vocabularies(model: Any, reference: Any) -> None:
    """Raise `CalibrationError` if the vocabularies of a model and its reference differ in size."""
    size, reference_size = model.config.vocab_size, reference.config.vocab_size
    if size != reference_size:
        raise CalibrationError(
            f"the model's vocabulary has {size} tokens and the reference's {reference_size}; set --reference to the "
            "original model"
        )

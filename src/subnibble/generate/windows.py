"""Let a model write calibration windows: many sequences at once, one token a step.

All windows have one length, so that each step runs one token of every window. A token is given (the beginning of a
document), or drawn from the model's probabilities p by a number u from [0, 1): the first token k with p_0 + ... + p_k
above u. The numbers of a window are drawn before it begins, by a generator of its own, so that a window depends neither
on the others nor on how many run at once. After an end-of-text token, the next document begins in the same window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from subnibble.calibrate.openings import Opening, Openings
from subnibble.calibrate.sampling import WindowSampling
from subnibble.generate.backend import Backend
from subnibble.generate.sampler import Sampler
from subnibble.generate.settings import Sampling

# Most likely tokens after one that is drawn from the vocabulary; LLM-QAT takes 3 to 5.
_LIKELY = 4


@dataclass(frozen=True)
class Order:
    """Windows that a model is to write.

    openings: how documents begin and end.
    sampling: how tokens are drawn.
    length: tokens of a window.
    seed: seed of the draws; each window has its own, made from this one and its number.
    """

    openings: Openings
    sampling: WindowSampling
    length: int
    seed: int


def write_windows(
    backend: Backend, order: Order, numbers: Sequence[int], on_step: Callable[[int], None] = lambda step: None
) -> Tensor:
    """Let a model write some windows at once; returns their token ids, (len(numbers), order.length) int64.

    backend: runs the model, without a prefix of its own.
    numbers: numbers of the windows, 0 or larger; a window depends on its number alone.
    on_step: called after each step with the number of tokens that every window has.
    Raises `NumericalFailure` for NaN in the model's logits.
    """
    windows, slots = [_Window(order, number) for number in numbers], [backend.open() for _ in numbers]
    try:
        prefix = order.openings.prefix
        logits = None if prefix is None else backend.forward(slots, [prefix.ids] * len(slots))
        for step in range(1, order.length + 1):
            for row, window in enumerate(windows):
                window.add(None if logits is None else logits[row])
            if step < order.length:
                logits = backend.forward(slots, [window.ids[-1:] for window in windows])
            on_step(step)
    finally:
        for slot in slots:
            backend.close(slot)
    return torch.tensor([window.ids for window in windows], dtype=torch.int64)


class _Window:
    """A window that is being written.

    order: of all windows.
    number: of this window.
    """

    def __init__(self, order: Order, number: int) -> None:
        self._openings, self._number = order.openings, number
        generator = torch.Generator().manual_seed(_seed(order.seed, number))
        self._draws = torch.rand(order.length, generator=generator, dtype=torch.float64).tolist()
        sampling = order.sampling
        # Only `scores` is called, which draws nothing.
        self._sampler = Sampler(
            Sampling(float(sampling.temperature), sampling.top_k, sampling.top_p, sampling.min_p, 1.0, seed=0)
        )
        self.ids: list[int] = []
        self._documents = 0
        self._given: list[int] = []
        self._answer: tuple[int, ...] = ()
        self._draws_plain, self._likely, self._is_fresh = False, 0, True
        self._begin()
        if order.openings.prefix is not None:
            # No token is the placeholder, so that a beginning that repeats the whole prefix is found.
            self._given = self._given[order.openings.prefix.repeated((*self._given, -1)) :]

    def add(self, logits: Tensor | None) -> None:
        """Add the next token. logits: after the tokens so far, (vocabulary,); None before the first one."""
        u = self._draws[len(self.ids)]
        if self._given:
            self.ids.append(self._given.pop(0))
            return
        if self._draws_plain:
            plain = self._openings.plain
            self.ids.append(plain[int(u * len(plain))])
            self._draws_plain, self._likely, self._is_fresh = False, _LIKELY, False
            return
        assert logits is not None
        token = self._chosen(logits, u)
        self.ids.append(token)
        self._is_fresh = False
        if token in self._openings.ends:
            self._end(token)

    def _chosen(self, logits: Tensor, u: float) -> int:
        if self._is_fresh:
            # An empty document or turn would leave a window of nothing but beginnings.
            logits = logits.clone()
            logits[sorted(self._openings.ends)] = -torch.inf
        if self._likely:
            self._likely -= 1
            return int(logits.argmax())
        # In numpy: threads of torch would cost more than they save on one row.
        scores = self._sampler.scores(logits, ()).numpy().astype(np.float64)
        return drawn(np.exp(scores - scores.max()), u)

    def _end(self, token: int) -> None:
        """Go on after an end-of-text token: with the answer to a user's message, or with the next document."""
        if self._answer:
            self._given, self._answer = list(self._answer), ()
        else:
            self._begin()
        self._likely, self._is_fresh = 0, True
        if self._given[:1] == [token]:
            del self._given[0]

    def _begin(self) -> None:
        kinds = self._openings.kinds
        kind: Opening = kinds[(self._number + self._documents) % len(kinds)]
        self._documents += 1
        self._given, self._answer, self._draws_plain = list(kind.ids), kind.answer, kind.draws


def drawn(weights: NDArray[np.float64], u: float) -> int:
    """The token that a number draws: the first whose weight, added to those before it, is above u times their sum.

    weights: (vocabulary,), probabilities times any number above 0.
    u: from 0 to 1, without 1.
    """
    sums = weights.cumsum()
    token = int(np.searchsorted(sums, u * sums[-1], side="right"))
    # Reached only if the product is rounded up to the sum itself.
    return token if token < len(sums) else int(weights.nonzero()[0][-1])


def _seed(seed: int, number: int) -> int:
    """The seed of one window: windows of neighbouring seeds have nothing in common."""
    return int.from_bytes(hashlib.sha256(f"window {number} of seed {seed}".encode()).digest()[:7], "big")

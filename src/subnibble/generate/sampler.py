"""Choose the next token of one sequence from its logits, as `generate` of transformers does.

transformers' own processors change the logits, in its order: repetition penalty, temperature, top_k, top_p, min_p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subnibble.errors import NumericalFailure
from subnibble.generate.settings import Sampling
from subnibble.model.transformers_api.sampling import logits_processors


class Sampler:
    """Chooses the tokens of one sequence, with random numbers of its own.

    sampling: how tokens are chosen.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._draws = sampling.temperature > 0
        self._penalizes = sampling.repetition_penalty != 1
        self._process = logits_processors(
            sampling.repetition_penalty, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
        )
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def scores(self, logits: Tensor, ids: Sequence[int]) -> Tensor:
        """The changed logits, (vocabulary,) float32: -inf for tokens that must not be drawn.

        logits: after the last token, (vocabulary,).
        ids: all tokens of the sequence so far.
        Raises `NumericalFailure` for NaN.
        """
        if bool(logits.isnan().any()):
            raise NumericalFailure("the model's logits are NaN; compute in float32, or quantize the model again")
        # Only the repetition penalty reads the tokens.
        text = torch.tensor([list(ids) if self._penalizes else []], dtype=torch.int64)
        return self._process(text, logits.float().unsqueeze(0))[0]

    def pick(self, logits: Tensor, ids: Sequence[int]) -> int:
        """Choose the next token; arguments as in `scores`."""
        scores = self.scores(logits, ids)
        if not self._draws:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))

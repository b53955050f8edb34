"""Deviation-aware correction (DAC; D2Quant, arXiv 2602.02546): a bias on a norm that undoes the mean shift behind it.

With y_t the norm's output before the linears in front of it were quantized and y_s after, both on the same inputs,

    mu = mean over tokens of (y_t - y_s)       argmin_b E||y_s + b - y_t||²

`published` takes all tokens and all channels. `gated` leaves sink tokens out of the mean and corrects only channels in
which the mean of either half of the windows lowers the squared error on the other half: with means a and b of the
halves, b (2 a - b) > 0 and a (2 b - a) > 0; that is, both have one sign and neither is twice the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.calibrate.stats import Mean
from subnibble.errors import BadRecipe, NumericalFailure

FORMS = ("none", "published", "gated")
_LARGEST = 10.0
_FEWEST_WINDOWS = 2


@dataclass(frozen=True)
class MeanShift:
    """form: see the module. The bias is kept within -10 .. 10, as in the released program."""

    form: str = "published"

    def __post_init__(self) -> None:
        if self.form not in FORMS[1:]:
            raise BadRecipe(f"mean_shift is {self.form!r}; choose one of {', '.join(FORMS)}")

    def check(self, windows: int) -> None:
        """Raise `BadRecipe` if the form needs more calibration windows."""
        if self.form == "gated" and windows < _FEWEST_WINDOWS:
            raise BadRecipe(
                f"mean_shift gated compares halves of the calibration windows and there is {windows}; use at least "
                f'{_FEWEST_WINDOWS} windows, or mean_shift = "published"'
            )

    def __call__(self, outputs: Iterable[tuple[Tensor, Tensor, Tensor]], window: int) -> Tensor:
        """The bias (channels,) float32.

        outputs: batches of (wanted, found, ordinary): the norm's outputs (tokens, channels) before and after
        quantization, and which tokens are no sinks (tokens,) bool. window: tokens of a window. Raises
        `NumericalFailure` where they are not finite.
        """
        halves: list[Mean] = []
        number = 0
        for wanted, found, ordinary in outputs:
            shift = wanted.float() - found.float()
            halves = halves or [Mean(shift.shape[1], shift.device) for _ in range(2)]
            for part, usual in zip(shift.split(window), ordinary.to(shift.device).split(window), strict=True):
                self._add_(halves, part, usual, number)
                number += 1
        a, b = (half.value for half in halves)
        tokens = [half.tokens for half in halves]
        mean = (a * tokens[0] + b * tokens[1]) / max(sum(tokens), 1)
        if not bool(torch.isfinite(mean).all()):
            raise NumericalFailure(
                "the mean shift of a norm is not finite: hidden states left the range of the type they are computed "
                'in; use dtype = "bfloat16" or "float32"'
            )
        if self.form == "gated":
            self.check(number)
            helps = (b * (2 * a - b) > 0) & (a * (2 * b - a) > 0)
            mean = torch.where(helps, mean, 0.0)
        return mean.clamp(-_LARGEST, _LARGEST)

    def _add_(self, halves: list[Mean], shift: Tensor, ordinary: Tensor, number: int) -> None:
        """Add one window to its half."""
        halves[number % 2].update(shift if self.form == "published" else shift[ordinary])

"""Deviation-aware correction (DAC; D2Quant, arXiv 2602.02546): a bias on a norm that undoes the mean shift behind it.

With y_t the norm's output before the linears in front of it were quantized and y_s after, both on the same inputs,

    mu = mean over tokens of (y_t - y_s)       argmin_b E||y_s + b - y_t||²
"""

from __future__ import annotations

import torch
from torch import Tensor

from subnibble.calibrate.stats import Mean
from subnibble.errors import BadRecipe, NumericalFailure

FORMS = ("none", "published")
_LARGEST = 10.0


def check_mean_shift(form: str) -> None:
    """Raise `BadRecipe` for an unknown form."""
    if form not in FORMS:
        raise BadRecipe(f"mean_shift is {form!r}; choose one of {', '.join(FORMS)}")


class MeanShift:
    """The bias (channels,) float32, kept within -10 .. 10, as in the released program: a `Statistic`."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self._mean = Mean(channels, device)

    def update(self, target: Tensor, found: Tensor) -> None:
        """Add tokens: the norm's outputs (tokens, channels) before and after quantization."""
        self._mean.update(target.float() - found.float())

    def merge(self, other: MeanShift) -> None:
        """See `Statistic`."""
        self._mean.merge(other._mean)

    @property
    def value(self) -> Tensor:
        """See `Statistic`: (channels,). Raises `NumericalFailure` where outputs were not finite."""
        mean = self._mean.value
        if not bool(torch.isfinite(mean).all()):
            raise NumericalFailure(
                "the mean shift of a norm is not finite: hidden states left the range of the type they are computed "
                'in; use dtype = "bfloat16" or "float32"'
            )
        return mean.clamp(-_LARGEST, _LARGEST)

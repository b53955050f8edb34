"""Deviation-aware correction (DAC; D2Quant, arXiv 2602.02546): a bias on a norm that cancels its output's mean shift.

y_t is the norm's output before, y_s after the linears that feed it are quantized, both for the same block inputs:

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
    """Raise `BadRecipe` if `form` is not one of `FORMS`."""
    if form not in FORMS:
        raise BadRecipe(f"mean_shift is {form!r}; choose one of {', '.join(FORMS)}")


class MeanShift:
    """A `Statistic`: the bias mu (channels,) float32, clamped to -10 .. 10 as in the released program."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self._mean = Mean(channels, device)

    def update(self, target: Tensor, quantized: Tensor) -> None:
        """Add the norm's outputs (tokens, channels) for a batch.

        target: y_t, before quantization.
        quantized: y_s, after quantization.
        """
        self._mean.update(target.float() - quantized.float())

    def merge(self, other: MeanShift) -> None:
        """Add all tokens that `other` has seen."""
        self._mean.merge(other._mean)

    @property
    def value(self) -> Tensor:
        """The bias (channels,). Raises `NumericalFailure` if outputs were not finite."""
        mean = self._mean.value
        if not bool(torch.isfinite(mean).all()):
            raise NumericalFailure(
                "the mean shift of a norm is not finite: hidden states left the range of the dtype they are computed "
                'in; use dtype = "bfloat16" or "float32"'
            )
        return mean.clamp(-_LARGEST, _LARGEST)

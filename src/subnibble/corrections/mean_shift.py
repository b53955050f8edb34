"""Deviation-aware correction (DAC; D2Quant, arXiv 2602.02546): a bias on a norm that undoes the mean shift behind it.

With y_t the norm's output before the linears in front of it were quantized and y_s after, both on the same inputs,

    mu = mean over tokens of (y_t - y_s)       argmin_b E||y_s + b - y_t||²
"""

from __future__ import annotations

from collections.abc import Iterable

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


def mean_shift(outputs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The bias (channels,) float32, kept within -10 .. 10, as in the released program.

    outputs: batches of (wanted, found): the norm's outputs (tokens, channels) before and after quantization. Raises
    `NumericalFailure` where they are not finite.
    """
    mean: Mean | None = None
    for wanted, found in outputs:
        mean = mean or Mean(wanted.shape[1], wanted.device)
        mean.update(wanted.float() - found.float())
    assert mean is not None
    if not bool(torch.isfinite(mean.value).all()):
        raise NumericalFailure(
            "the mean shift of a norm is not finite: hidden states left the range of the type they are computed "
            'in; use dtype = "bfloat16" or "float32"'
        )
    return mean.value.clamp(-_LARGEST, _LARGEST)

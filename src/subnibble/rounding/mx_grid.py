"""Fit the scales of MXFP4 grids: powers of two (`tensor/mxfp4.py` has the number format).

`minmax` is the specification's scale, `2^(floor(log2 max|w|) - 2)`; weights beyond 6 scales saturate. `mse` also tries
twice and half that scale and keeps, per row, the scale with the least sum of `|error| ** power`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.errors import NumericalFailure
from subnibble.tensor.mxfp4 import LARGEST_SCALE, SMALLEST_SCALE, decode_e2m1, encode_e2m1, shared_scale


@dataclass(frozen=True)
class MxLevels:
    """The MXFP4 grid of one group of m rows; see `Levels`.

    scales: (m, 1), powers of two.
    """

    scales: Tensor
    zeros: None = None

    def encode(self, weight: Tensor) -> Tensor:
        """Nearest codes (m, n) of `weight` (m, n)."""
        return encode_e2m1(weight / self.scales).to(weight.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """Weights (m, n) of `codes` (m, n)."""
        return decode_e2m1(codes).to(codes.dtype) * self.scales


def fit(group: Tensor, clip: str, power: float, weights: Tensor | None) -> MxLevels:
    """Fit the scale of each row.

    group: (m, g) float32, g at most 32.
    clip: "minmax" or "mse"; see the module.
    power: exponent of |error| in the "mse" search.
    weights: (g,), weight of each column's error, or None for 1.
    """
    if not bool(torch.isfinite(group).all()):
        raise NumericalFailure("the weights to round are not finite; raise the damping or use more calibration text")
    standard = shared_scale(group.abs().amax(1, keepdim=True))
    if clip == "minmax":
        return MxLevels(standard)
    best, least = standard, torch.full_like(standard, torch.inf)
    for factor in (1.0, 2.0, 0.5):
        levels = MxLevels((standard * factor).clamp(SMALLEST_SCALE, LARGEST_SCALE))
        errors = (levels.decode(levels.encode(group)) - group).abs().pow(power)
        loss = (errors if weights is None else errors * weights).sum(1, keepdim=True)
        better = loss < least
        best, least = torch.where(better, levels.scales, best), torch.where(better, loss, least)
    return MxLevels(best)

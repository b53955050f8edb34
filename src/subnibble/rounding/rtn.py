"""Round to nearest: each weight to the closest level of its group's grid, no data needed."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from subnibble.rounding import grid
from subnibble.rounding.levels import Fitter
from subnibble.rounding.rounder import Rounding
from subnibble.scheme import Scheme


@dataclass(frozen=True)
class RTN:
    """Rounder that fits a grid per group and rounds to nearest."""

    fitter: Fitter = field(default_factory=grid.Clip)
    needs_gram = False
    needs_drift = False

    def __call__(
        self, weight: Tensor, gram: Tensor | None, scheme: Scheme, where: str, drift: Tensor | None = None
    ) -> Rounding:
        """See `Rounder`; statistics are not used."""
        return Rounding(grid.coded(weight, scheme, self.fitter))

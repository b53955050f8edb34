"""Round to nearest: each weight to the closest level of its group's grid, no data needed."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from subnibble.rounding import grid
from subnibble.rounding.rounder import Rounding
from subnibble.scheme import Scheme


@dataclass(frozen=True)
class RTN:
    """Rounder that fits a grid per group and rounds to nearest."""

    clip: grid.Clip = field(default_factory=grid.Clip)
    needs_gram = False

    def __call__(self, weight: Tensor, gram: Tensor | None, scheme: Scheme, where: str) -> Rounding:
        """See `Rounder`; `gram` is not used."""
        return Rounding(grid.coded(weight, scheme, self.clip))

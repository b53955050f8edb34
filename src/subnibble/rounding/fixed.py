"""Grids that are fixed before rounding: the ranges that `tuning/` learned, one grid per group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from subnibble.rounding.grid import UniformLevels
from subnibble.rounding.levels import Fitted, Fitter
from subnibble.tensor.scheme import Scheme


@dataclass(frozen=True)
class FixedGrids(Fitter):
    """Fitter that returns given grids.

    grids: one per group of a row, in order.
    """

    grids: tuple[Fitted, ...]

    @classmethod
    def stacked(cls, linears: Sequence[Sequence[Fitted]]) -> Self:
        """Join the grids of linears that are rounded as one stack of rows.

        linears: the grids of each linear, one per group; all have the same number of groups.
        """
        return cls(tuple(_joined([linear[index] for linear in linears]) for index in range(len(linears[0]))))

    def fit(self, group: Tensor, scheme: Scheme, weights: Tensor | None, index: int = 0) -> Fitted:
        """Return the grid of group `index`; the other arguments are not used."""
        return self.grids[index]


def _joined(grids: Sequence[Fitted]) -> Fitted:
    levels = [grid.levels for grid in grids]
    first = levels[0]
    assert isinstance(first, UniformLevels)
    scale = torch.cat([level.scales for level in levels])
    zero = torch.cat([level.zero for level in levels if isinstance(level, UniformLevels)])
    return Fitted(replace(first, scale=scale, zero=zero))

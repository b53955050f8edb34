"""Grids that are known before a weight is rounded, group by group: learned ranges (`tuning/`)."""

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
    """Fitter that fits nothing. grids: of each group of a row."""

    grids: tuple[Fitted, ...]

    @classmethod
    def stacked(cls, linears: Sequence[Sequence[Fitted]]) -> Self:
        """Grids of linears whose rows come on top of each other; each gives as many groups."""
        return cls(tuple(_joined([linear[index] for linear in linears]) for index in range(len(linears[0]))))

    def fit(self, group: Tensor, scheme: Scheme, weights: Tensor | None, index: int = 0) -> Fitted:
        """See `Fitter`."""
        return self.grids[index]


def _joined(grids: Sequence[Fitted]) -> Fitted:
    levels = [grid.levels for grid in grids]
    first = levels[0]
    assert isinstance(first, UniformLevels)
    scale = torch.cat([part.scales for part in levels])
    zero = torch.cat([part.zero for part in levels if isinstance(part, UniformLevels)])
    return Fitted(replace(first, scale=scale, zero=zero))

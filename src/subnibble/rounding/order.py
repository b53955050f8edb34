"""The order in which GPTQ visits input columns. Groups stay whole, so inference needs no index.

`natural` goes from left to right. `gar` (group-aware reordering, Gafni et al., arXiv 2505.14638) sorts the columns
of each group by falling diagonal of the Gram matrix, and the groups by their largest diagonal entry: columns that
matter are rounded first, while many columns remain that can make up for their error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.errors import BadRecipe
from subnibble.tensor.scheme import Scheme

ORDERS = ("natural", "gar")


@dataclass(frozen=True)
class ColumnPlan:
    """Groups in the order of their visit: (index of the group, its columns in the order of their visit)."""

    groups: tuple[tuple[int, Tensor], ...]

    @property
    def columns(self) -> Tensor:
        """All columns in the order of their visit, int64 (k,)."""
        return torch.cat([columns for _, columns in self.groups])


def plan_columns(name: str, diagonal: Tensor, scheme: Scheme) -> ColumnPlan:
    """Plan the visit. diagonal: (k,), the Gram matrix's, in the columns' natural order."""
    bounds = scheme.group_bounds(diagonal.shape[0])
    natural = [(g, torch.arange(a, b, device=diagonal.device)) for g, (a, b) in enumerate(bounds)]
    if name == "natural":
        return ColumnPlan(tuple(natural))
    if name == "gar":
        inside = [(g, c[torch.sort(diagonal[c], descending=True, stable=True).indices]) for g, c in natural]
        by_peak = sorted(inside, key=lambda group: -float(diagonal[group[1][0]]))
        return ColumnPlan(tuple(by_peak))
    raise BadRecipe(f"order is {name!r}; choose one of {', '.join(ORDERS)}")

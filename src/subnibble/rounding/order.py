"""The order in which GPTQ visits input columns. Groups stay whole, so inference needs no group index.

`natural` goes from left to right. `gar` (group-aware reordering, Gafni et al., arXiv 2505.14638) sorts the columns of
each group by descending diagonal entry of the Gram matrix, and the groups by their largest entry: the columns that
matter most are rounded first, while many columns remain to compensate for their error.
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
    """The visiting order.

    groups: (index of the group, int64 indices of its columns), groups and columns in visiting order.
    """

    groups: tuple[tuple[int, Tensor], ...]

    @property
    def order(self) -> Tensor:
        """Indices of all columns in visiting order, int64 (k,)."""
        return torch.cat([indices for _, indices in self.groups])


def plan_columns(name: str, diagonal: Tensor, scheme: Scheme) -> ColumnPlan:
    """Plan the visiting order.

    name: one of `ORDERS`.
    diagonal: (k,), diagonal of the Gram matrix, in natural order.
    scheme: gives the groups.
    """
    bounds = scheme.group_bounds(diagonal.shape[0])
    natural = [(g, torch.arange(a, b, device=diagonal.device)) for g, (a, b) in enumerate(bounds)]
    if name == "natural":
        return ColumnPlan(tuple(natural))
    if name == "gar":
        inside = [(g, c[torch.sort(diagonal[c], descending=True, stable=True).indices]) for g, c in natural]
        by_peak = sorted(inside, key=lambda group: -float(diagonal[group[1][0]]))
        return ColumnPlan(tuple(by_peak))
    raise BadRecipe(f"order is {name!r}; choose one of {', '.join(ORDERS)}")

"""The fitted grid of one group: the interface between rounders and all kinds of grids and fitters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from subnibble.tensor.scheme import Scheme

# Weight of each column's error in a grid fit: 1, or the column's diagonal entry of the Gram matrix.
WEIGHTINGS = ("none", "hessian")


class Levels(Protocol):
    """The levels of one group of m rows. Scales and zero-points are exact in the type in which they are stored."""

    @property
    def scales(self) -> Tensor:
        """Scales (m, scales_per_group) float32."""

    @property
    def zeros(self) -> Tensor | None:
        """Zero-points (m, 1) float32, or None if the grid has none."""

    def encode(self, weight: Tensor) -> Tensor:
        """Codes (m, n) of the levels nearest to `weight` (m, n), as whole numbers in float32."""

    def decode(self, codes: Tensor) -> Tensor:
        """Levels (m, n) of `codes` (m, n)."""


@dataclass(frozen=True)
class Fitted:
    """The grid of one group: a dequantized weight in column j is `column_scales[j] * level`.

    levels: the levels of each row.
    column_scales: (g,) float32, positive, or None if all are 1.
    """

    levels: Levels
    column_scales: Tensor | None = None

    def encode(self, weight: Tensor, first: int = 0) -> Tensor:
        """Codes (m, n) of `weight` (m, n), which holds the group's columns from `first` on."""
        if self.column_scales is None:
            return self.levels.encode(weight)
        return self.levels.encode(weight / self.column_scales[first : first + weight.shape[1]])

    def decode(self, codes: Tensor, first: int = 0) -> Tensor:
        """Weights (m, n) of `codes` (m, n), which belong to the group's columns from `first` on."""
        values = self.levels.decode(codes)
        return values if self.column_scales is None else values * self.column_scales[first : first + codes.shape[1]]


class Fitter:
    """Fits the grid of a group.

    scales_columns: whether `fit` also gives column scales.
    """

    has_column_scales: ClassVar[bool] = False

    def check(self, scheme: Scheme, where: str) -> None:
        """Raise `BadRecipe` if it cannot fit the grid of `scheme`. where: the linear, for the message."""

    def fit(self, group: Tensor, scheme: Scheme, weights: Tensor | None, index: int = 0) -> Fitted:
        """Fit the grid of one group.

        group: (m, g) float32.
        weights: (g,), nonnegative, weight of each column's error, or None for 1.
        index: index of the group in its row.
        """
        raise NotImplementedError

"""The fitted grid of one group: what rounders see of a grid, whatever its kind and whoever fits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from subnibble.tensor.scheme import Scheme

# Of columns' errors in the fit of a grid: none, or the diagonal of the inputs' Gram matrix.
WEIGHTINGS = ("none", "hessian")


class Levels(Protocol):
    """Levels of each of m rows, for the columns of one group. Scales and zeros are exact in their stored type."""

    @property
    def scales(self) -> Tensor:
        """(m, scales_per_group) float32."""

    @property
    def zeros(self) -> Tensor | None:
        """(m, 1) float32, or None if the grid has none."""

    def encode(self, weight: Tensor) -> Tensor:
        """Codes of the levels nearest to `weight` (m, n): whole numbers in float32, (m, n)."""

    def decode(self, codes: Tensor) -> Tensor:
        """The levels that codes (m, n) stand for: (m, n)."""


@dataclass(frozen=True)
class Fitted:
    """A group's levels, and the scale of each of its columns: a weight is `columns[j] * level`.

    columns: (g,) float32, positive, or None where every column's is 1.
    """

    levels: Levels
    columns: Tensor | None = None

    def encode(self, weight: Tensor, first: int = 0) -> Tensor:
        """Codes of `weight` (m, n), the group's columns from `first` on."""
        if self.columns is None:
            return self.levels.encode(weight)
        return self.levels.encode(weight / self.columns[first : first + weight.shape[1]])

    def decode(self, codes: Tensor, first: int = 0) -> Tensor:
        """What codes (m, n) of the columns from `first` on stand for."""
        values = self.levels.decode(codes)
        return values if self.columns is None else values * self.columns[first : first + codes.shape[1]]


class Fitter:
    """Fits the grid of a group. scales_columns: whether columns get scales of their own."""

    scales_columns: ClassVar[bool] = False

    def check(self, scheme: Scheme, where: str) -> None:
        """Raise `BadRecipe` if it cannot fit the grid of the linear `where`."""

    def fit(self, group: Tensor, scheme: Scheme, weights: Tensor | None, index: int = 0) -> Fitted:
        """Fit `group` (m, g) float32, the row's `index`-th.

        weights: (g,) not negative, of each column's squared error, or None for 1.
        """
        raise NotImplementedError

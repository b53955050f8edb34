"""Round-to-nearest (RTN): each weight goes to the nearest level of its group's grid. Needs no data by default."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from subnibble.errors import BadRecipe
from subnibble.rounding import grid
from subnibble.rounding.levels import WEIGHTINGS
from subnibble.rounding.rounder import OnGrids, Rounding
from subnibble.tensor.scheme import Scheme


@dataclass(frozen=True)
class RTN(OnGrids):
    """Rounder that fits a grid per group and rounds to nearest.

    weighting: weight of each column's error in the grid fits: "none" for 1, "hessian" for its diagonal Gram entry. Use
        "hessian" if columns were scaled by their inputs (AWQ): otherwise the clip search clips the most important ones.
    """

    weighting: str = "none"

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise BadRecipe(f"weighting is {self.weighting!r}; choose one of {', '.join(WEIGHTINGS)}")

    @property
    def needs_gram(self) -> bool:
        """True if the fits are weighted."""
        return self.weighting == "hessian"

    def __call__(
        self, weight: Tensor, gram: Tensor | None, scheme: Scheme, where: str, drift: Tensor | None = None
    ) -> Rounding:
        """Round `weight` (m, k); see `Rounder`. Uses the diagonal of `gram`, and only if fits are weighted."""
        if not self.needs_gram:
            return Rounding(grid.quantized(weight, scheme, self.fitter))
        if gram is None:
            raise ValueError(f"weighted rounding needs the Gram matrix of {where}'s inputs; pass `gram`")
        return Rounding(grid.quantized(weight, scheme, self.fitter, grid.diagonal_weights(gram)))

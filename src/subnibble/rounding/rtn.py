"""Round to nearest: each weight to the closest level of its group's grid, no data needed."""

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

    weighting: "none" fits grids to the weights as they are, "hessian" weights each column's error by its diagonal Gram
    entry: needed where columns were scaled by their inputs, lest a clip search cuts off those that matter most.
    """

    weighting: str = "none"

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise BadRecipe(f"weighting is {self.weighting!r}; choose one of {', '.join(WEIGHTINGS)}")

    @property
    def needs_gram(self) -> bool:
        """See `Rounder`."""
        return self.weighting == "hessian"

    def __call__(
        self, weight: Tensor, gram: Tensor | None, scheme: Scheme, where: str, drift: Tensor | None = None
    ) -> Rounding:
        """See `Rounder`; of the statistics, the Gram matrix's diagonal is used at most."""
        if not self.needs_gram:
            return Rounding(grid.quantized(weight, scheme, self.fitter))
        if gram is None:
            raise ValueError(f"weighted rounding needs the Gram matrix of {where}'s inputs")
        return Rounding(grid.quantized(weight, scheme, self.fitter, grid.diagonal_weights(gram)))

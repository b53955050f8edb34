"""The base class of rounders: a callable from a weight and its statistics to codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from subnibble.rounding.grid import Clip
from subnibble.rounding.levels import Fitter
from subnibble.tensor.packed import QuantizedMatrix
from subnibble.tensor.scheme import Scheme


@dataclass(frozen=True)
class Rounding:
    """The codes of a weight.

    quantized: codes, scales and zero-points.
    notes: numbers for the report, by name (damping, retries).
    """

    quantized: QuantizedMatrix
    notes: Mapping[str, float] = field(default_factory=dict)


class Rounder:
    """Rounds the stacked weights of all linears that read one input; rows are independent of each other.

    The defaults here suit a rounder that needs nothing but the weight; subclasses override what differs.
    """

    @property
    def needs_gram(self) -> bool:
        """Whether it needs the Gram matrix of the inputs."""
        return False

    @property
    def needs_drift(self) -> bool:
        """Whether it needs the drift: how far the inputs are from those of the full-precision model."""
        return False

    @property
    def has_column_scales(self) -> bool:
        """Whether its codes come with column scales, by which the dequantized columns are multiplied."""
        return False

    def check(self, scheme: Scheme, where: str) -> None:
        """Raise `BadRecipe` if it cannot round to the grid of `scheme`. where: the linear, for the message."""

    def with_fitter(self, fitter: Fitter) -> Rounder | None:
        """A copy of this rounder that fits its grids with `fitter`; None if it cannot take another fitter."""
        return None

    def __call__(
        self, weight: Tensor, gram: Tensor | None, scheme: Scheme, where: str, drift: Tensor | None = None
    ) -> Rounding:
        """Round a weight.

        weight: (m, k) float32, the stacked linears.
        gram: (k, k) float32 or better, sum of x xᵀ over the inputs x, or None if not needed.
        scheme: the same for all rows.
        where: the linears, for error messages.
        drift: (k, k), sum of (x~ - x) xᵀ with x~ the full-precision model's input at the same token, or None if not
            needed.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class OnGrids(Rounder):
    """A rounder that fits a grid to each group.

    fitter: fits the grids.
    """

    fitter: Fitter = field(default_factory=Clip)

    @property
    def has_column_scales(self) -> bool:
        """Whether the fitter gives column scales."""
        return self.fitter.has_column_scales

    def check(self, scheme: Scheme, where: str) -> None:
        """Raise `BadRecipe` if the fitter cannot fit the grid of `scheme` for the linear `where`."""
        self.fitter.check(scheme, where)

    def with_fitter(self, fitter: Fitter) -> Rounder:
        """A copy of this rounder that fits its grids with `fitter`."""
        return replace(self, fitter=fitter)

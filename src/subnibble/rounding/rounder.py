"""What every rounder is: a callable from weights and statistics to codes. The only place where codes are made."""

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
    """Codes, and what the report should say of how they were made (damping, retries)."""

    quantized: QuantizedMatrix
    notes: Mapping[str, float] = field(default_factory=dict)


class Rounder:
    """Rounds the stacked linears of a site: rows are independent, so linears that share inputs go together.

    What is said here holds of a rounder that looks at nothing but the weight; others override what differs.
    """

    @property
    def needs_gram(self) -> bool:
        """Whether the Gram matrix of the inputs must be gathered first."""
        return False

    @property
    def needs_drift(self) -> bool:
        """Whether it must be known how far the inputs are from the full-precision model's."""
        return False

    @property
    def scales_columns(self) -> bool:
        """Whether what it codes is to be multiplied by column scales."""
        return False

    def check(self, scheme: Scheme, where: str) -> None:
        """Raise `BadRecipe` if it cannot round the linear `where` on its grid."""

    def on(self, fitter: Fitter) -> Rounder | None:
        """The same with grids by another fitter; None where it fits them in a way of its own."""
        return None

    def __call__(
        self, weight: Tensor, gram: Tensor | None, scheme: Scheme, where: str, drift: Tensor | None = None
    ) -> Rounding:
        """Round.

        weight: (m, k) float32. gram: (k, k) float32 or better, sum of x xᵀ over the inputs x, or None if not
        needed. scheme: one grid for all rows. where: names the linears in errors. drift: (k, k), sum of
        (x~ - x) xᵀ with x~ the full-precision model's input of the same token, or None if not needed.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class OnGrids(Rounder):
    """A rounder whose grids another object fits, group by group. fitter: that object."""

    fitter: Fitter = field(default_factory=Clip)

    @property
    def scales_columns(self) -> bool:
        """See `Rounder`."""
        return self.fitter.scales_columns

    def check(self, scheme: Scheme, where: str) -> None:
        """See `Rounder`."""
        self.fitter.check(scheme, where)

    def on(self, fitter: Fitter) -> Rounder:
        """See `Rounder`."""
        return replace(self, fitter=fitter)

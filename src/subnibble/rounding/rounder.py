"""What every rounder is: a callable from weights and statistics to codes. The only place where codes are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from subnibble.scheme import Scheme
from subnibble.tensor import CodedMatrix


@dataclass(frozen=True)
class Rounding:
    """Codes, and what the report should say of how they were made (damping, retries)."""

    coded: CodedMatrix
    notes: Mapping[str, float] = field(default_factory=dict)


class Rounder(Protocol):
    """Rounds the stacked linears of a site: rows are independent, so linears that share inputs go together."""

    @property
    def needs_gram(self) -> bool:
        """Whether the Gram matrix of the inputs must be gathered first."""

    @property
    def needs_drift(self) -> bool:
        """Whether it must be known how far the inputs are from the full-precision model's."""

    def __call__(
        self, weight: Tensor, gram: Tensor | None, scheme: Scheme, where: str, drift: Tensor | None = None
    ) -> Rounding:
        """Round.

        weight: (m, k) float32. gram: (k, k) float32 or better, sum of x xᵀ over the inputs x, or None if not
        needed. scheme: one grid for all rows. where: names the linears in errors. drift: (k, k), sum of
        (x~ - x) xᵀ with x~ the full-precision model's input of the same token, or None if not needed.
        """

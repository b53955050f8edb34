"""The fitted grid of one group: what rounders see of a grid, whatever its kind."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


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

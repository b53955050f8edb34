"""The basis in which a linear meets its input: channels in another order, and mixed by an online Hadamard transform.

An input x becomes `x' = x[order] H`; a weight `W' = W[:, order] H` gives the same product, so that the function stays
whatever the order and H. Codes are made in that basis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.tensor import hadamard


@dataclass(frozen=True)
class InputBasis:
    """order: (k,) int64, channel order[j] becomes channel j, or None. blocks: widths of H's blocks, () for no H."""

    order: Tensor | None = None
    blocks: tuple[int, ...] = ()

    def columns(self, matrix: Tensor) -> Tensor:
        """A weight (m, k), or tokens (t, k), in this basis."""
        ordered = matrix if self.order is None else matrix[:, self.order]
        return hadamard.multiply(ordered, self.blocks) if self.blocks else ordered

    def both(self, matrix: Tensor) -> Tensor:
        """A Gram matrix, or another sum of y xᵀ over tokens, (k, k), in this basis."""
        return self.columns(self.columns(matrix.T).T)

    def natural(self, matrix: Tensor) -> Tensor:
        """A matrix (m, k) of this basis in the input's own; inverse of `columns`."""
        mixed = hadamard.multiply_transposed(matrix, self.blocks) if self.blocks else matrix
        return mixed if self.order is None else torch.empty_like(mixed).index_copy_(1, self.order, mixed)

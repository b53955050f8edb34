"""The basis of a linear's input at run time: its channels are reordered, then mixed by an online Hadamard transform.

An input x becomes `x' = x[order] H`. The weight `W' = W[:, order] H` gives the same product, whatever the order and H,
so the function is unchanged. Weights are quantized in this basis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.tensor import hadamard


@dataclass(frozen=True)
class InputBasis:
    """The order and the transform of one input. The natural basis has neither.

    order: (k,) int64, channel order[j] becomes channel j; None for the natural order, which is that of the model.
    blocks: widths of H's blocks; () for no H.
    """

    order: Tensor | None = None
    blocks: tuple[int, ...] = ()

    def to_basis(self, matrix: Tensor) -> Tensor:
        """Bring a weight (m, k), or tokens (t, k), into this basis."""
        ordered = matrix if self.order is None else matrix[:, self.order]
        return hadamard.multiply(ordered, self.blocks) if self.blocks else ordered

    def both_to_basis(self, matrix: Tensor) -> Tensor:
        """Bring a Gram matrix, or another sum of y xᵀ over tokens, (k, k), into this basis."""
        return self.to_basis(self.to_basis(matrix.T).T)

    def natural(self, matrix: Tensor) -> Tensor:
        """Bring a matrix (m, k) from this basis back to the natural one; inverse of `to_basis`."""
        mixed = hadamard.multiply_transposed(matrix, self.blocks) if self.blocks else matrix
        return mixed if self.order is None else torch.empty_like(mixed).index_copy_(1, self.order, mixed)

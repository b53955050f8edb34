"""How far rounded linears are from what they were, on weights and on outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.calibrate.stats import product_dtype

# Guards the quotients of linears that are all zero.
_TINY = 1e-300


@dataclass(frozen=True)
class RelativeError:
    """weight: ||W - Q||² / ||W||². output: ||(W - Q) X||² / ||W X||² over the inputs X, None if they are not known."""

    weight: float
    output: float | None


def relative_errors(weight: Tensor, quantized: Tensor, gram: Tensor | None, rows: Sequence[int]) -> list[RelativeError]:
    """The error of each of several stacked linears.

    weight, quantized: (m, k) float32, the linears' weights on top of each other. gram: (k, k) sum of x xᵀ over their
    common inputs, or None. rows: the height of each linear, m in all.
    """
    if product_dtype(weight) == torch.float64:
        weight, quantized = weight.double(), quantized.double()
    delta = weight - quantized
    squares = zip(_energies(delta, rows), _energies(weight, rows), strict=True)
    weights = [part / max(whole, _TINY) for part, whole in squares]
    if gram is None:
        return [RelativeError(error, None) for error in weights]
    energies = zip(output_energy(delta, gram, rows), output_energy(weight, gram, rows), strict=True)
    outputs = [part / max(whole, _TINY) for part, whole in energies]
    return [RelativeError(*pair) for pair in zip(weights, outputs, strict=True)]


def output_energy(matrix: Tensor, gram: Tensor, rows: Sequence[int]) -> list[float]:
    """tr(M G Mᵀ), the squared norm of the outputs of each of the linears that are stacked in M (m, k)."""
    matrix = matrix.to(torch.promote_types(matrix.dtype, gram.dtype))
    found = (matrix @ gram.to(matrix.dtype)) * matrix
    return [max(float(part.sum(dtype=torch.float64)), 0.0) for part in found.split(list(rows))]


def _energies(matrix: Tensor, rows: Sequence[int]) -> list[float]:
    """Sums of squares, which may leave float32."""
    parts = matrix.split(list(rows))
    return [float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2 for part in parts]

"""Relative squared error of rounded linears, on weights and on outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.calibrate.stats import product_dtype

# Avoids 0 / 0 for a linear that is all zero.
_TINY = 1e-300


@dataclass(frozen=True)
class RelativeError:
    """Relative squared errors of one linear.

    weight: ||W - Q||² / ||W||².
    output: ||(W - Q) X||² / ||W X||² over the calibration inputs X, or None without them.
    """

    weight: float
    output: float | None


def relative_errors(weight: Tensor, quantized: Tensor, gram: Tensor | None, rows: Sequence[int]) -> list[RelativeError]:
    """Relative errors of each linear in a stack.

    weight, quantized: (m, k) float32, the linears' weights before and after rounding, stacked by rows.
    gram: (k, k), sum of x xᵀ over their common inputs, or None.
    rows: number of rows of each linear; they add up to m.
    """
    if product_dtype(weight) == torch.float64:
        weight, quantized = weight.double(), quantized.double()
    delta = weight - quantized
    squares = zip(_energies(delta, rows), _energies(weight, rows), strict=True)
    weights = [error / max(energy, _TINY) for error, energy in squares]
    if gram is None:
        return [RelativeError(error, None) for error in weights]
    energies = zip(output_energy(delta, gram, rows), output_energy(weight, gram, rows), strict=True)
    outputs = [error / max(energy, _TINY) for error, energy in energies]
    return [RelativeError(*pair) for pair in zip(weights, outputs, strict=True)]


def output_energy(matrix: Tensor, gram: Tensor, rows: Sequence[int]) -> list[float]:
    """tr(M G Mᵀ) of each linear in a stack: the squared norm of its outputs.

    matrix: M (m, k), the stacked linears.
    gram: G (k, k), sum of x xᵀ over the inputs.
    rows: number of rows of each linear.
    """
    matrix = matrix.to(torch.promote_types(matrix.dtype, gram.dtype))
    terms = (matrix @ gram.to(matrix.dtype)) * matrix
    return [max(float(linear.sum(dtype=torch.float64)), 0.0) for linear in terms.split(list(rows))]


def _energies(matrix: Tensor, rows: Sequence[int]) -> list[float]:
    """Sum of squares of each linear in a stack, in float64: it may exceed float32."""
    linears = matrix.split(list(rows))
    return [float(torch.linalg.vector_norm(linear, dtype=torch.float64)) ** 2 for linear in linears]

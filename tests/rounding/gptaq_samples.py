"""Weights, inputs that drift from their full-precision ones, and what GPTAQ makes of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from subnibble.rounding import grid
from subnibble.rounding.gptaq import Asymmetry
from subnibble.rounding.gptq import GPTQ
from subnibble.rounding.order import ORDERS
from subnibble.tensor.packed import PackedRange, QuantizedMatrix
from subnibble.tensor.scheme import Scheme

K = 53
DAMPING = 0.01
MINMAX, MSE = grid.Clip("minmax"), grid.Clip("mse")
IN_LOOP = ("released", "corrected")
ACTIVE = (*IN_LOOP, "shifted")
every_form = pytest.mark.parametrize("form", ACTIVE)
every_order = pytest.mark.parametrize("order", ORDERS)
SCHEMES = [
    Scheme(2, 16, "integer"),
    Scheme(3, 7, "real"),
    Scheme(4, -1, "none", "bfloat16"),
    Scheme(3, 16, "none", "float32", grid="sign"),
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(rows: int = 9, columns: int = K, seed: int = 0) -> Tensor:
    """Signed, with outliers; row 1 constant, columns 16..31 of row 2 zero."""
    w = normal(rows, columns, seed=seed) * 0.1
    w[0, 5], w[3, columns - 2] = 1.9, -1.3
    w[1] = 0.37
    w[2, 16:32] = 0
    return w


def inputs(tokens: int = 400, columns: int = K, seed: int = 1) -> Tensor:
    """Correlated through a few directions they share, signed, with an outlier channel and a quiet one."""
    x = normal(tokens, 6, seed=seed) @ normal(6, columns, seed=seed + 50)
    x += 0.3 * normal(tokens, columns, seed=seed + 100)
    x[:, 7] *= 12
    x[:, 11] *= 0.1
    return x


def linear_map(columns: int = K, size: float = 0.3, seed: int = 3) -> Tensor:
    """Near the identity."""
    return torch.eye(columns, dtype=torch.float64) + size / columns**0.5 * normal(columns, columns, seed=seed)


def drifted(x: Tensor, seed: int = 3) -> Tensor:
    """Full-precision inputs: a linear function of x, and noise."""
    return x @ linear_map(x.shape[1], seed=seed) + 0.05 * normal(*x.shape, seed=seed + 1)


def statistics(x: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrix sum x xᵀ and drift sum (x~ - x) xᵀ."""
    return x.T @ x, (full - x).T @ x


def dense(quantized: QuantizedMatrix, scheme: Scheme) -> Tensor:
    return PackedRange.pack(quantized, scheme).dequantize().double()


def same(a: QuantizedMatrix, b: QuantizedMatrix) -> bool:
    zeros = a.zeros is b.zeros if a.zeros is None or b.zeros is None else torch.equal(a.zeros, b.zeros)
    return torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales) and zeros


def pushed(form: str, alpha: float = 1.0, clip: grid.Clip = MINMAX, **settings: object) -> GPTQ:
    return GPTQ(clip, DAMPING, asymmetry=Asymmetry(form, alpha), **settings)  # type: ignore[arg-type]


def damped(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """With what GPTQ adds to the diagonal, columns that are never fed included."""
    h, live = gram.clone(), gram.diagonal() > 0
    mean = h.diagonal()[live].mean()
    h.diagonal()[~live] = mean
    h.diagonal().add_(damping * mean)
    return h


def dead_inputs(dead: list[int]) -> tuple[Tensor, Tensor]:
    x = inputs()
    full = drifted(x)
    x[:, dead] = 0
    return x, full

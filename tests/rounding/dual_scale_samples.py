"""Groups of weights whose columns are of many sizes, grids for them, and what a fit makes of both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from subnibble.rounding.levels import Fitted
from subnibble.tensor.scheme import Scheme

KINDS = ("sign", "integer", "real", "none")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_bits = pytest.mark.parametrize("bits", [2, 3])
either_weighting = pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])


def scheme_of(kind: str, bits: int = 2, group_size: int = -1, scale_type: str = "float32") -> Scheme:
    if kind == "sign":
        return Scheme(bits, group_size, "none", scale_type, grid="sign")
    return Scheme(bits, group_size, kind, scale_type)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(columns: int, seed: int = 1, sigma: float = 0.35) -> Tensor:
    """Log-normal column scales."""
    return (sigma * normal(columns, seed=seed)).exp()


def awkward(rows: int = 24, columns: int = 45, seed: int = 0) -> Tensor:
    """Signed, columns of many sizes, with outliers, a zero row, a constant row and a zero column."""
    w = normal(rows, columns, seed=seed) * spread(columns, seed + 1) * 0.1
    w[3, 5], w[5, columns - 2] = 1.9, -1.3
    w[0], w[1] = 0, -0.07
    w[:, 9] = 0
    return w


def column_weights(columns: int, seed: int = 2) -> Tensor:
    return normal(columns, seed=seed).exp()


def rounded(fitted: Fitted, w: Tensor) -> Tensor:
    return fitted.decode(fitted.encode(w))


def columns_of(fitted: Fitted) -> Tensor:
    assert fitted.column_scales is not None
    return fitted.column_scales

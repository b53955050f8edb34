"""The operations of a running packed model, each with one name.

These are the plain torch references that every faster kernel must agree with. They hold no dense copy of a weight
beyond the call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subnibble.tensor import PackedTensor


def linear(x: Tensor, weight: PackedTensor, bias: Tensor | None, column_scale: Tensor | None = None) -> Tensor:
    """`(x * column_scale) @ weight.T + bias`.

    x: (..., k). weight: packed (m, k). bias: (m,) or None. column_scale: (k,) or None for 1.
    Result (..., m), x's dtype.
    """
    if column_scale is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        x = (x.to(wide) * column_scale.to(wide)).to(x.dtype)
    return torch.nn.functional.linear(x, weight.dequantize(x.dtype), bias)


def embedding(ids: Tensor, weight: PackedTensor, dtype: torch.dtype) -> Tensor:
    """Rows of a packed table. ids: any shape, integer. weight: packed (n, d). Result (*ids.shape, d) in `dtype`."""
    return weight.rows(ids.reshape(-1)).dequantize(dtype).view(*ids.shape, weight.shape[1])

"""Rounded values with the gradient of the values before rounding (Bengio et al., arXiv 1308.3432)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """Return `rounded` in x's dtype; its gradient goes to x unchanged.

    x, rounded: tensors of the same shape.
    """
    output: Tensor = _StraightThrough.apply(x, rounded)  # type: ignore[no-untyped-call]
    return output


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None

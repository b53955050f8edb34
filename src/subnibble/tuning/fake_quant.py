"""Quantization that lets gradients pass: straight through rounding, and to the range that weights are rounded in.

For y = s (q - z), q = clamp(round(w / s + z), 0, n - 1), with round's derivative taken as 1 (Bengio et al.,
arXiv 1308.3432; of the scale as in LSQ, arXiv 1902.08153):

    dy/dw = 1 inside the range, 0 outside;   dy/ds = q - z - w / s inside, q - z outside;   dy/dz = 0 inside, -s outside
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subnibble.runtime.straight_through import straight_through


def fake_quantize(weight: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """What `weight` becomes on grids of so many levels. scale, zero: broadcast against it along its last dimension."""
    found: Tensor = _FakeQuantize.apply(weight, scale, zero, levels)  # type: ignore[no-untyped-call]
    return found


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """X as a number type holds it."""
    return straight_through(x, x.detach().to(dtype).to(x.dtype))


class _FakeQuantize(torch.autograd.Function):
    """One node for what would be nine."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
        place = weight / scale
        codes = (place + zero).round_().clamp_(0, levels - 1)
        ctx.save_for_backward(place, codes, scale, zero)
        ctx.levels = levels
        return (codes - zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad,) = grads
        place, codes, scale, zero = ctx.saved_tensors
        nearest = place + zero
        inside = ((nearest >= -0.5) & (nearest <= ctx.levels - 0.5)).to(grad.dtype)
        to_weight = grad * inside
        to_scale = (grad * (codes - zero) - to_weight * place).sum(-1, keepdim=True)
        to_zero = ((to_weight - grad) * scale).sum(-1, keepdim=True)
        return to_weight, to_scale, to_zero, None

"""Fake quantization with gradients: straight-through for rounding, and towards scale and zero-point.

For y = s (q - z), q = clamp(round(w / s + z), 0, n - 1), with the derivative of round taken as 1 (Bengio et al.,
arXiv 1308.3432; the derivative by the scale as in LSQ, arXiv 1902.08153):

    dy/dw = 1 inside the range, 0 outside;   dy/ds = q - z - w / s inside, q - z outside;   dy/dz = 0 inside, -s outside
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subnibble.runtime.straight_through import straight_through


def fake_quantize(weight: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """Quantize and dequantize `weight`, with gradients to it, `scale` and `zero`; returns its shape.

    weight: (..., width).
    scale, zero: (..., 1), broadcast along the last dimension.
    levels: number of grid levels n.
    """
    dequantized: Tensor = _FakeQuantize.apply(weight, scale, zero, levels)  # type: ignore[no-untyped-call]
    return dequantized


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round x to `dtype`, with the straight-through gradient; returns x's own dtype."""
    return straight_through(x, x.detach().to(dtype).to(x.dtype))


class _FakeQuantize(torch.autograd.Function):
    """A single autograd node; composed from torch operations it would be nine."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
        scaled = weight / scale
        codes = (scaled + zero).round_().clamp_(0, levels - 1)
        ctx.save_for_backward(scaled, codes, scale, zero)
        ctx.levels = levels
        return (codes - zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad,) = grads
        scaled, codes, scale, zero = ctx.saved_tensors
        position = scaled + zero
        inside = ((position >= -0.5) & (position <= ctx.levels - 0.5)).to(grad.dtype)
        to_weight = grad * inside
        to_scale = (grad * (codes - zero) - to_weight * scaled).sum(-1, keepdim=True)
        to_zero = ((to_weight - grad) * scale).sum(-1, keepdim=True)
        return to_weight, to_scale, to_zero, None

"""Learned activation clipping: the share c of an input's range that its grid covers, one static number per site.

Scales stay dynamic; c multiplies each of them. Inputs are quantized by the runtime's own operation. Gradients pass
straight through to inputs inside the range and are 0 for clipped ones. The gradient by c is

    d x̂ / d c = (x̂ - x) / c inside the range, x̂ / c outside

(learned activation clipping as in FlatQuant, arXiv 2410.09426; the gradient as for LSQ's scale, arXiv 1902.08153).
The learned parameter is σ in c = c₀ (1 + σ).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from subnibble.errors import BadRecipe
from subnibble.runtime import activations
from subnibble.tensor.activation_scheme import ActivationScheme

_SMALLEST_CLIP = 0.05
# An input with a larger error, in steps of the grid, was clipped; the factor allows for scales rounded to bfloat16.
_HALF_STEP = 0.5 * (1 + 2**-8)


def check_inputs(schemes: Iterable[ActivationScheme | None]) -> None:
    """Raise `BadRecipe` if no linear's input has a clip that could be learned.

    schemes: the activation scheme of each linear; None if its input is not quantized.
    """
    if not any(scheme is not None and can_clip(scheme) for scheme in schemes):
        raise BadRecipe(
            'input_clipping = "site" learns clips of inputs quantized on a uniform grid, but no linear has such an '
            'input; set activation_bits, or input_clipping = "none"'
        )


def can_clip(scheme: ActivationScheme) -> bool:
    """Whether the scheme has a range that can be clipped."""
    return scheme.grid == "uniform"


def clipped(x: Tensor, share: Tensor, scheme: ActivationScheme) -> Tensor:
    """Quantize and dequantize tokens with the clip c₀ (1 + share), with gradients to both; returns (t, k) float32.

    x: (t, k) float32.
    share: scalar, σ of the module docstring.
    scheme: its clip is c₀.
    """
    dequantized: Tensor = _Clipped.apply(x, share, scheme)  # type: ignore[no-untyped-call]
    return dequantized


def with_share(scheme: ActivationScheme, share: Tensor) -> ActivationScheme:
    """The scheme with the clip c₀ (1 + share), at most 1; a changed clip is rounded to three decimals, as stored."""
    value = float(share)
    return scheme if value == 0 else replace(scheme, clip=min(1.0, round(scheme.clip * (1 + value), 3)))


def bound_(share: Tensor, scheme: ActivationScheme) -> None:
    """Clamp a share in place so that the clip c₀ (1 + share) is between 0.05 and 1."""
    with torch.no_grad():
        share.clamp_(_SMALLEST_CLIP / scheme.clip - 1, 1 / scheme.clip - 1)


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Tensor, scheme: ActivationScheme) -> Tensor:
        clipped_scheme = with_share(scheme, share)
        quantized = activations.quantize(x, clipped_scheme)
        values = quantized.values()
        widths = torch.tensor([stop - start for start, stop in quantized.bounds], device=x.device)
        inside = (x - values).abs() <= _HALF_STEP * quantized.scales.repeat_interleave(widths, dim=1)
        # Outlier channels come last and are never clipped.
        clippable = x.shape[1] - scheme.outliers
        by_share = torch.where(inside, values - x, values)[:, :clippable]
        ctx.save_for_backward(inside, by_share)
        ctx.factor = scheme.clip / clipped_scheme.clip
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (inside, by_share) = grads, ctx.saved_tensors
        to_share = None
        if ctx.needs_input_grad[1]:
            to_share = (grad[:, : by_share.shape[1]] * by_share).sum() * ctx.factor
        return grad * inside, to_share, None

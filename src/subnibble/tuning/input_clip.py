"""The share of an input's range that is kept, as a number that is learned: one a site, static, of any dynamic scale.

Inputs are quantized by the runtime's own operation. Gradients pass straight through, and stop where an input was
clipped, whose share of the clip's gradient is

    d x̂ / d c = (x̂ - x) / c inside the range, x̂ / c outside

(learned activation clipping as in FlatQuant, arXiv 2410.09426; the gradient as LSQ's of a scale, arXiv 1902.08153).
Learned is σ in c = c₀ (1 + σ).
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
# Over half a step an input was clipped; scales are rounded to bfloat16.
_HALF_STEP = 0.5 * (1 + 2**-8)


def check_inputs(found: Iterable[ActivationScheme | None]) -> None:
    """Raise `BadRecipe` if none of the linears' inputs has a clip that could be learned."""
    if not any(scheme is not None and can_clip(scheme) for scheme in found):
        raise BadRecipe(
            'input_clipping = "site" learns clips of inputs quantized on a uniform grid, and there are none; set '
            'activation_bits, or input_clipping = "none"'
        )


def can_clip(scheme: ActivationScheme) -> bool:
    """Whether inputs have a range that a share can be kept of."""
    return scheme.grid == "uniform"


def clipped(x: Tensor, share: Tensor, scheme: ActivationScheme) -> Tensor:
    """Tokens (t, k) float32 as `scheme`, its clip moved by `share` of it, quantizes them."""
    found: Tensor = _Clipped.apply(x, share, scheme)  # type: ignore[no-untyped-call]
    return found


def with_share(scheme: ActivationScheme, share: Tensor) -> ActivationScheme:
    """A scheme whose clip was moved by a share of it; what is moved has three decimals, as it is stored."""
    moved = float(share)
    return scheme if moved == 0 else replace(scheme, clip=min(1.0, round(scheme.clip * (1 + moved), 3)))


def bound_(share: Tensor, scheme: ActivationScheme) -> None:
    """Bring a share back to where its clip is one."""
    with torch.no_grad():
        share.clamp_(_SMALLEST_CLIP / scheme.clip - 1, 1 / scheme.clip - 1)


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Tensor, scheme: ActivationScheme) -> Tensor:
        own = with_share(scheme, share)
        found = activations.quantize(x, own)
        values = found.values()
        widths = torch.tensor([stop - start for start, stop in found.bounds], device=x.device)
        inside = (x - values).abs() <= _HALF_STEP * found.scales.repeat_interleave(widths, dim=1)
        # Outliers have a range that nothing clips.
        usual = x.shape[1] - scheme.outliers
        moved = torch.where(inside, values - x, values)[:, :usual]
        ctx.save_for_backward(inside, moved)
        ctx.factor = scheme.clip / own.clip
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (inside, moved) = grads, ctx.saved_tensors
        to_share = None
        if ctx.needs_input_grad[1]:
            to_share = (grad[:, : moved.shape[1]] * moved).sum() * ctx.factor
        return grad * inside, to_share, None

"""Quantize a linear's input while it runs: each token by itself, group by group (`ActivationScheme`).

What leaves here are whole numbers with their zero-points already taken off, so that

    x = scale * number        number in -255 .. 255 (8 bits), -15 .. 15 (4), -7 .. 7 (3); of MXFP4, -12 .. 12

Outlier channels, if the scheme has any, are the last group. Kept in float32, whose sums of products with weight numbers
are those of int32 (`integer.py`). What is not finite stays so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.tensor import mxfp4
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.packed import grouped_views

# Below this a scale is raised, so that a group of zeros has one; bfloat16 holds it as a normal number.
_SMALLEST_SCALE = 2.0**-120


@dataclass(frozen=True)
class Quantized:
    """numbers: (t, k) whole, float32. scales: (t, groups) float32. bounds: first and stop channel of each group.

    largest: of each group, what no number is beyond.
    """

    numbers: Tensor
    scales: Tensor
    bounds: list[tuple[int, int]]
    largest: list[int]

    def values(self) -> Tensor:
        """What the numbers stand for: (t, k) float32."""
        widths = torch.tensor([stop - start for start, stop in self.bounds], device=self.scales.device)
        return self.numbers * self.scales.repeat_interleave(widths, dim=1)


def quantize(x: Tensor, scheme: ActivationScheme) -> Quantized:
    """Quantize tokens. x: (t, k) of any float type, computed in float32."""
    wide, bounds = x.float(), scheme.group_bounds(x.shape[1])
    if scheme.outliers:
        usual, outliers = wide.split([x.shape[1] - scheme.outliers, scheme.outliers], 1)
        parts = quantize(usual, scheme.without_outliers), quantize(outliers, scheme.of_outliers)
        numbers, scales = torch.cat([p.numbers for p in parts], 1), torch.cat([p.scales for p in parts], 1)
        return Quantized(numbers, scales, bounds, [*parts[0].largest, *parts[1].largest])
    found = [_groups(view, scheme) for view, _ in grouped_views(wide, scheme)]
    numbers, scales = (torch.cat([one[i].flatten(1) for one in found], 1) for i in range(2))
    return Quantized(numbers, scales, bounds, [_largest(scheme)] * len(bounds))


def quantize_values(x: Tensor, scheme: ActivationScheme) -> Tensor:
    """What tokens (t, k) become when they are quantized: float32."""
    return quantize(x, scheme).values()


def _largest(scheme: ActivationScheme) -> int:
    if scheme.grid == "mxfp4":
        return mxfp4.LARGEST_NUMBER
    return int(2 ** (scheme.bits - 1) - 1 if scheme.zero_point == "none" else 2**scheme.bits - 1)


def _groups(x: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
    """Numbers (t, groups, width) and scales (t, groups, 1) of groups (t, groups, width)."""
    if scheme.grid == "mxfp4":
        largest = x.abs().amax(-1, keepdim=True)
        scale = torch.where(largest.isfinite(), mxfp4.shared_scale(largest), torch.nan)
        return mxfp4.nearest_e2m1(x / scale).div_(mxfp4.E2M1_STEP), scale * mxfp4.E2M1_STEP
    last = _largest(scheme)
    if scheme.zero_point == "none":
        scale = _stored(scheme.clip * x.abs().amax(-1, keepdim=True) / last)
        return (x / scale).round_().clamp_(-last, last), scale
    # The range contains 0, so that zero-points are codes.
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = _stored(scheme.clip * (high - low) / last)
    zero = (scheme.clip * -low / scale).round_().clamp_(0, last)
    return (x / scale).round_().add_(zero).clamp_(0, last).sub_(zero), scale


def _stored(scale: Tensor) -> Tensor:
    return scale.clamp(min=_SMALLEST_SCALE).to(torch.bfloat16).float()

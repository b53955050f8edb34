"""Quantize a linear's input at run time: each token separately, group by group (`ActivationScheme`).

The results are whole numbers from which zero-points are already subtracted, so that

    x = scale * number        number in -255 .. 255 (8 bits), -15 .. 15 (4), -7 .. 7 (3); of MXFP4, -12 .. 12

Outlier channels, if the scheme has any, form the last group. The numbers are stored as float32: sums of their products
with weight numbers are the same as in int32 (`integer.py`). Values that are not finite stay not finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.tensor import mxfp4
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.packed import grouped_views

# Smaller scales are raised to this, so that a group of zeros has a scale; bfloat16 holds it as a normal number.
_SMALLEST_SCALE = 2.0**-120


@dataclass(frozen=True)
class Quantized:
    """Quantized tokens.

    numbers: (t, k) whole numbers, float32.
    scales: (t, groups) float32.
    bounds: first and stop channel of each group.
    max_numbers: for each group, a bound on the numbers' magnitude.
    """

    numbers: Tensor
    scales: Tensor
    bounds: list[tuple[int, int]]
    max_numbers: list[int]

    def values(self) -> Tensor:
        """Dequantize: (t, k) float32."""
        widths = torch.tensor([stop - start for start, stop in self.bounds], device=self.scales.device)
        return self.numbers * self.scales.repeat_interleave(widths, dim=1)


def quantize(x: Tensor, scheme: ActivationScheme) -> Quantized:
    """Quantize tokens. x: (t, k) of any float dtype; computed in float32."""
    wide, bounds = x.float(), scheme.group_bounds(x.shape[1])
    if scheme.outliers:
        inliers, outliers = wide.split([x.shape[1] - scheme.outliers, scheme.outliers], 1)
        parts = quantize(inliers, scheme.without_outliers), quantize(outliers, scheme.of_outliers)
        numbers, scales = torch.cat([p.numbers for p in parts], 1), torch.cat([p.scales for p in parts], 1)
        return Quantized(numbers, scales, bounds, [*parts[0].max_numbers, *parts[1].max_numbers])
    groups = [_groups(view, scheme) for view, _ in grouped_views(wide, scheme)]
    numbers, scales = (torch.cat([group[i].flatten(1) for group in groups], 1) for i in range(2))
    return Quantized(numbers, scales, bounds, [_max_number(scheme)] * len(bounds))


def quantize_values(x: Tensor, scheme: ActivationScheme) -> Tensor:
    """Quantize and dequantize tokens x (t, k): float32."""
    return quantize(x, scheme).values()


def _max_number(scheme: ActivationScheme) -> int:
    """A bound on the magnitude of quantized numbers."""
    if scheme.grid == "mxfp4":
        return mxfp4.LARGEST_NUMBER
    return int(2 ** (scheme.bits - 1) - 1 if scheme.zero_point == "none" else 2**scheme.bits - 1)


def _groups(x: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
    """Quantize groups x (t, groups, width): numbers (t, groups, width) and scales (t, groups, 1)."""
    if scheme.grid == "mxfp4":
        max_abs = x.abs().amax(-1, keepdim=True)
        scale = torch.where(max_abs.isfinite(), mxfp4.shared_scale(max_abs), torch.nan)
        return mxfp4.nearest_e2m1(x / scale).div_(mxfp4.E2M1_STEP), scale * mxfp4.E2M1_STEP
    last = _max_number(scheme)
    if scheme.zero_point == "none":
        scale = _stored(scheme.clip * x.abs().amax(-1, keepdim=True) / last)
        return (x / scale).round_().clamp_(-last, last), scale
    # Each range is extended to contain 0, so that the zero-point is one of the codes.
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = _stored(scheme.clip * (high - low) / last)
    zero = (scheme.clip * -low / scale).round_().clamp_(0, last)
    return (x / scale).round_().add_(zero).clamp_(0, last).sub_(zero), scale


def _stored(scale: Tensor) -> Tensor:
    return scale.clamp(min=_SMALLEST_SCALE).to(torch.bfloat16).float()

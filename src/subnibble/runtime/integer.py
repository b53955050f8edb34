"""Products of quantized inputs with packed weights, computed on whole numbers.

For tokens `x = sx * a` (`activations.py`) and weights of a row and group, on any grid, `w = sum_p s_p * (n_p - z_p)`
with whole numbers n_p, the groups of both cut the k columns into segments, and

    y = sum over segments of  sum_p  (a · n_p - z_p * sum a) * s_p * sx

a · n_p is exact, rounded to float32 once where it may be beyond 2^24. Integer zero-points are taken off n_p first, so
only a real one leaves z_p. The rest is float32, one rounding an operation, in the order that is written here: segments
from left to right, planes from bit 0 on. Any faster kernel may be compared with that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble import mxfp4
from subnibble.runtime.activations import Quantized
from subnibble.tensor import PackedRange, PackedTensor, float_scales, unpack_codes

# Whole numbers up to here are exact in float32.
_EXACT = 2**24


@dataclass(frozen=True)
class Plane:
    """numbers: (m, n) whole, float32. scales: (m, groups). zeros: (m, groups) real zero-points, or None for 0."""

    numbers: Tensor
    scales: Tensor
    zeros: Tensor | None = None


def planes(part: PackedRange) -> list[Plane]:
    """A range as planes of whole numbers; one, or on a sign grid one for each bit."""
    codes, scheme = unpack_codes(part.codes, part.scheme.bits, part.columns), part.scheme
    scales = float_scales(part.scales, scheme)
    if scheme.grid == "sign":
        bits = scales.unflatten(1, (-1, scheme.bits))
        return [Plane(((codes >> b) & 1).float().mul_(2).sub_(1), bits[..., b]) for b in range(scheme.bits)]
    if scheme.grid == "mxfp4":
        return [Plane(mxfp4.decode_e2m1(codes).div_(mxfp4.E2M1_STEP), scales * mxfp4.E2M1_STEP)]
    zeros = part.float_zeros()
    if scheme.zero_point == "real":
        return [Plane(codes.float(), scales, zeros)]
    if zeros is None:
        return [Plane(codes.float().sub_(scheme.levels // 2), scales)]
    widths = torch.tensor([stop - start for start, stop in scheme.group_bounds(part.columns)], device=codes.device)
    return [Plane(codes.float().sub_(zeros.repeat_interleave(widths, dim=1)), scales)]


def multiply_add_(y: Tensor, x: Quantized, weight: PackedTensor) -> None:
    """Add the product of `x` with `weight` (m, k) to y (t, m) float32; the wider one's last columns meet nothing."""
    start = 0
    for part in weight.ranges:
        found = planes(part)
        for first, stop, group in _segments(part, start, x.bounds):
            a = x.numbers[:, start + first : start + stop]
            scale = x.scales[:, group[1] : group[1] + 1]
            for plane in found:
                product = _exact_product(a, plane.numbers[:, first:stop])
                if plane.zeros is not None:
                    product -= a.sum(1, keepdim=True) * plane.zeros[:, group[0]]
                y += product.mul_(plane.scales[:, group[0]]).mul_(scale)
        start += part.columns


def _exact_product(a: Tensor, n: Tensor) -> Tensor:
    """The product a nᵀ of whole numbers, float32: exact below 2^24, beyond it rounded once."""
    if a.numel() == 0 or float(a.abs().amax() * n.abs().amax() * a.shape[1]) < _EXACT:
        return a @ n.T
    return (a.double() @ n.double().T).float()


def _segments(part: PackedRange, start: int, bounds: list[tuple[int, int]]) -> list[tuple[int, int, tuple[int, int]]]:
    """Runs of a range's columns that lie in one group of the weight and one of the input.

    start: of the range in the input. Each: first and stop column in the range, (weight's group, input's group).
    """
    found = []
    for i, (w0, w1) in enumerate(part.scheme.group_bounds(part.columns)):
        for j, (x0, x1) in enumerate(bounds):
            first, stop = max(w0, x0 - start), min(w1, x1 - start)
            if first < stop:
                found.append((first, stop, (i, j)))
    return found

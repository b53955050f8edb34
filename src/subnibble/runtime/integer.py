"""Products of quantized inputs with packed weights, computed on whole numbers.

Tokens are `x = sx * a` (`activations.py`). On any grid, the weights of a row and group are
`w = sum_p s_p * (n_p - z_p)`, with whole numbers n_p on planes p. The groups of inputs and weights together cut the
k columns into segments, and

    y = sum over segments of  sum_p  (a · n_p - z_p * sum a) * s_p * sx

a · n_p is exact, and rounded to float32 once if it may exceed 2^24. Integer zero-points are subtracted from n_p first,
so z_p is nonzero only for real zero-points. Everything else is float32 with one rounding per operation, in the order
written here: segments from left to right, planes from bit 0 on. Faster kernels are compared with this one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subnibble.runtime.activations import Quantized
from subnibble.tensor import mxfp4
from subnibble.tensor.packed import PackedRange, PackedTensor, float_scales, unpack_codes

# Whole numbers up to this are exact in float32.
_EXACT = 2**24
# Numbers up to this are multiplied as int8. Processors whose int8 products do not accumulate in int32 add two products
# in int16, with one factor raised by 128: (64 + 128) * 64 * 2 fits, (127 + 128) * 127 * 2 does not.
_SMALL = 64
# Tokens multiplied at once, so few that a product is still in the processor's cache when it is summed.
_TOKENS = 512


@dataclass(frozen=True)
class Plane:
    """Weights of a range as whole numbers with scales; a sign grid has one plane per bit, other grids have one.

    numbers: (m, n) whole numbers, float32.
    max_number: a bound on their magnitude.
    scales: (m, groups).
    zeros: (m, groups) real zero-points, or None for 0.
    """

    numbers: Tensor
    max_number: int
    scales: Tensor
    zeros: Tensor | None = None


def planes(packed: PackedRange) -> list[Plane]:
    """Split a range into planes of whole numbers: one plane, or one per bit on a sign grid."""
    codes, scheme = unpack_codes(packed.codes, packed.scheme.bits, packed.num_columns), packed.scheme
    scales = float_scales(packed.scales, scheme)
    if scheme.grid == "sign":
        bits = scales.unflatten(1, (-1, scheme.bits))
        return [Plane(((codes >> b) & 1).float().mul_(2).sub_(1), 1, bits[..., b]) for b in range(scheme.bits)]
    if scheme.grid == "mxfp4":
        return [Plane(mxfp4.decode_e2m1(codes).div_(mxfp4.E2M1_STEP), mxfp4.LARGEST_NUMBER, scales * mxfp4.E2M1_STEP)]
    zeros = packed.float_zeros()
    if scheme.zero_point == "real":
        return [Plane(codes.float(), scheme.levels - 1, scales, zeros)]
    if zeros is None:
        return [Plane(codes.float().sub_(scheme.levels // 2), scheme.levels // 2, scales)]
    widths = torch.tensor(
        [stop - start for start, stop in scheme.group_bounds(packed.num_columns)], device=codes.device
    )
    return [Plane(codes.float().sub_(zeros.repeat_interleave(widths, dim=1)), scheme.levels - 1, scales)]


def multiply_add_(y: Tensor, x: Quantized, weight: PackedTensor) -> None:
    """Add the product of `x` and `weight` to y, in place.

    y: (t, m) float32.
    x: t tokens. weight: (m, k). If one has more columns, its last columns are ignored.
    """
    start = 0
    for packed in weight.ranges:
        terms = _terms(packed, start, x)
        for token in range(0, y.shape[0], _TOKENS):
            tokens = slice(token, token + _TOKENS)
            for term in terms:
                y[tokens] += term.product(tokens)
        start += packed.num_columns


@dataclass(frozen=True)
class _Numbers:
    """Whole numbers. wide: as float32. small: as int8, or None. max_number: a bound on their magnitude."""

    wide: Tensor
    small: Tensor | None
    max_number: int

    @classmethod
    def of(cls, numbers: Tensor, max_number: int) -> _Numbers:
        # torch 2.13 reads past int8 operands of one column, and past rows if strides do not describe them.
        fits = max_number <= _SMALL and numbers.shape[1] > 1 and _multiplies_int8(numbers.device)
        small = numbers.to(torch.int8, memory_format=torch.contiguous_format) if fits else None
        return cls(numbers, small, max_number)

    def rows(self, index: slice) -> _Numbers:
        """Select rows without a copy."""
        return replace(self, wide=self.wide[index], small=None if self.small is None else self.small[index])


def _multiplies_int8(device: torch.device) -> bool:
    """Whether torch has a fast int8 product on `device`: known of oneDNN on x86."""
    onednn = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return device.type == "cpu" and onednn and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@dataclass(frozen=True)
class _Term:
    """One segment on one plane. inputs: (t, n). numbers: (m, n). input_scales: (t, 1). scales, zeros: (m,)."""

    inputs: _Numbers
    numbers: _Numbers
    input_scales: Tensor
    scales: Tensor
    zeros: Tensor | None

    def product(self, tokens: slice) -> Tensor:
        """Compute the term for some tokens: (tokens, m)."""
        a = self.inputs.rows(tokens)
        product = _exact_product(a, self.numbers)
        if self.zeros is not None:
            product -= a.wide.sum(1, keepdim=True) * self.zeros
        return product.mul_(self.scales).mul_(self.input_scales[tokens])


def _terms(packed: PackedRange, start: int, x: Quantized) -> list[_Term]:
    """The terms of a range's product, in order. start: the range's first column in the input."""
    weight_planes, terms = planes(packed), []
    scales = [plane.scales.T.contiguous() for plane in weight_planes]
    for first, stop, (of_weight, of_input) in _segments(packed, start, x.bounds):
        inputs = _Numbers.of(x.numbers[:, start + first : start + stop], x.max_numbers[of_input])
        for plane, scale in zip(weight_planes, scales, strict=True):
            zeros = None if plane.zeros is None else plane.zeros[:, of_weight].contiguous()
            numbers = _Numbers.of(plane.numbers[:, first:stop], plane.max_number)
            terms.append(_Term(inputs, numbers, x.scales[:, of_input : of_input + 1], scale[of_weight], zeros))
    return terms


def _exact_product(a: _Numbers, n: _Numbers) -> Tensor:
    """The product a nᵀ of whole numbers, float32: exact below 2^24, rounded once above."""
    if a.small is not None and n.small is not None and a.wide.numel() and n.wide.numel():
        return torch._int_mm(a.small, n.small.T).float()
    if a.max_number * n.max_number * a.wide.shape[1] < _EXACT:
        return a.wide @ n.wide.T
    return (a.wide.double() @ n.wide.double().T).float()


def _segments(packed: PackedRange, start: int, bounds: list[tuple[int, int]]) -> list[tuple[int, int, tuple[int, int]]]:
    """Runs of a range's columns that lie in one group of the weight and one group of the input.

    start: the range's first column in the input.
    Returns (first column, stop column, (weight's group, input's group)) of each run; columns count within the range.
    """
    segments = []
    for i, (w0, w1) in enumerate(packed.scheme.group_bounds(packed.num_columns)):
        for j, (x0, x1) in enumerate(bounds):
            first, stop = max(w0, x0 - start), min(w1, x1 - start)
            if first < stop:
                segments.append((first, stop, (i, j)))
    return segments

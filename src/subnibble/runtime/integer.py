"""Products of quantized inputs with packed weights, computed on whole numbers.

For tokens `x = sx * a` (`activations.py`) and weights of a row and group, on any grid, `w = sum_p s_p * (n_p - z_p)`
with whole numbers n_p, the groups of both cut the k columns into segments, and

    y = sum over segments of  sum_p  (a · n_p - z_p * sum a) * s_p * sx

a · n_p is exact, rounded to float32 once where it may be beyond 2^24. Integer zero-points are taken off n_p first, so
only a real one leaves z_p. The rest is float32, one rounding an operation, in the order that is written here: segments
from left to right, planes from bit 0 on. Any faster kernel may be compared with that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subnibble.runtime.activations import Quantized
from subnibble.tensor import mxfp4
from subnibble.tensor.packed import PackedRange, PackedTensor, float_scales, unpack_codes

# Whole numbers up to here are exact in float32.
_EXACT = 2**24
# Numbers up to here are multiplied as int8. Processors without int8 products that add in int32 add two of them in
# int16, with one factor raised by 128: (64 + 128) * 64 * 2 has room there, (127 + 128) * 127 * 2 has not.
_SMALL = 64
# Tokens that are multiplied at once: what lies between a product and its sum stays in a processor's cache.
_TOKENS = 512


@dataclass(frozen=True)
class Plane:
    """numbers: (m, n) whole, float32, none beyond `largest`. scales: (m, groups). zeros: (m, groups) real zero-points,
    or None for 0.
    """

    numbers: Tensor
    largest: int
    scales: Tensor
    zeros: Tensor | None = None


def planes(part: PackedRange) -> list[Plane]:
    """A range as planes of whole numbers; one, or on a sign grid one for each bit."""
    codes, scheme = unpack_codes(part.codes, part.scheme.bits, part.columns), part.scheme
    scales = float_scales(part.scales, scheme)
    if scheme.grid == "sign":
        bits = scales.unflatten(1, (-1, scheme.bits))
        return [Plane(((codes >> b) & 1).float().mul_(2).sub_(1), 1, bits[..., b]) for b in range(scheme.bits)]
    if scheme.grid == "mxfp4":
        return [Plane(mxfp4.decode_e2m1(codes).div_(mxfp4.E2M1_STEP), mxfp4.LARGEST_NUMBER, scales * mxfp4.E2M1_STEP)]
    zeros = part.float_zeros()
    if scheme.zero_point == "real":
        return [Plane(codes.float(), scheme.levels - 1, scales, zeros)]
    if zeros is None:
        return [Plane(codes.float().sub_(scheme.levels // 2), scheme.levels // 2, scales)]
    widths = torch.tensor([stop - start for start, stop in scheme.group_bounds(part.columns)], device=codes.device)
    return [Plane(codes.float().sub_(zeros.repeat_interleave(widths, dim=1)), scheme.levels - 1, scales)]


def multiply_add_(y: Tensor, x: Quantized, weight: PackedTensor) -> None:
    """Add the product of `x` with `weight` (m, k) to y (t, m) float32; the wider one's last columns meet nothing."""
    start = 0
    for part in weight.ranges:
        terms = _terms(part, start, x)
        for token in range(0, y.shape[0], _TOKENS):
            tokens = slice(token, token + _TOKENS)
            for term in terms:
                y[tokens] += term.product(tokens)
        start += part.columns


@dataclass(frozen=True)
class _Numbers:
    """Whole numbers. wide: float32. small: the same as int8, or None. largest: none is beyond it."""

    wide: Tensor
    small: Tensor | None
    largest: int

    @classmethod
    def of(cls, numbers: Tensor, largest: int) -> _Numbers:
        # torch 2.13 reads past int8 operands of one column, and past rows whose strides say nothing of them.
        fits = largest <= _SMALL and numbers.shape[1] > 1 and _multiplies_int8(numbers.device)
        small = numbers.to(torch.int8, memory_format=torch.contiguous_format) if fits else None
        return cls(numbers, small, largest)

    def rows(self, index: slice) -> _Numbers:
        """Some rows, not copied."""
        return replace(self, wide=self.wide[index], small=None if self.small is None else self.small[index])


def _multiplies_int8(device: torch.device) -> bool:
    """Whether torch has a fast int8 product there: oneDNN's on x86 is known to be."""
    onednn = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return device.type == "cpu" and onednn and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@dataclass(frozen=True)
class _Term:
    """One group of both, on one plane. inputs: (t, n). numbers: (m, n). input_scales: (t, 1). scales, zeros: (m,)."""

    inputs: _Numbers
    numbers: _Numbers
    input_scales: Tensor
    scales: Tensor
    zeros: Tensor | None

    def product(self, tokens: slice) -> Tensor:
        """What it adds for some tokens, (tokens, m)."""
        a = self.inputs.rows(tokens)
        product = _exact_product(a, self.numbers)
        if self.zeros is not None:
            product -= a.wide.sum(1, keepdim=True) * self.zeros
        return product.mul_(self.scales).mul_(self.input_scales[tokens])


def _terms(part: PackedRange, start: int, x: Quantized) -> list[_Term]:
    """The summands of a range's product in their order. start: of the range in the input."""
    found, terms = planes(part), []
    scales = [plane.scales.T.contiguous() for plane in found]
    for first, stop, (of_weight, of_input) in _segments(part, start, x.bounds):
        inputs = _Numbers.of(x.numbers[:, start + first : start + stop], x.largest[of_input])
        for plane, scale in zip(found, scales, strict=True):
            zeros = None if plane.zeros is None else plane.zeros[:, of_weight].contiguous()
            numbers = _Numbers.of(plane.numbers[:, first:stop], plane.largest)
            terms.append(_Term(inputs, numbers, x.scales[:, of_input : of_input + 1], scale[of_weight], zeros))
    return terms


def _exact_product(a: _Numbers, n: _Numbers) -> Tensor:
    """The product a nᵀ of whole numbers, float32: exact below 2^24, beyond it rounded once."""
    if a.small is not None and n.small is not None and a.wide.numel() and n.wide.numel():
        return torch._int_mm(a.small, n.small.T).float()
    if a.largest * n.largest * a.wide.shape[1] < _EXACT:
        return a.wide @ n.wide.T
    return (a.wide.double() @ n.wide.double().T).float()


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

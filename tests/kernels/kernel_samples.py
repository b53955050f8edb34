"""Packed matrices of every form that a kernel takes, its calls by address, and how near an output has to be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from subnibble.runtime import native
from subnibble.tensor.packed import PackedRange, PackedTensor, QuantizedMatrix, scale_dtype
from subnibble.tensor.scheme import Scheme

ROWS = 7
MX = Scheme(4, 32, "none", "e8m0", "mxfp4")
# Grids and zero-points by name, for a number of bits, a group size and a type of scales.
KINDS = {"none": ("none", "uniform"), "integer": ("integer", "uniform"), "real": ("real", "uniform"),
         "sign": ("none", "sign")}  # fmt: skip


def scheme_of(kind: str, bits: int, group_size: int, scale_type: str = "float16") -> Scheme:
    zero_point, grid = KINDS[kind]
    return Scheme(bits, group_size, zero_point, scale_type, grid)


def sample(scheme: Scheme, columns: int, rows: int = ROWS, seed: int = 0) -> PackedRange:
    """Signed weights; row 0 has one code, the last row starts with a group of the middle code (0 on most grids)."""
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(columns)
    codes = torch.randint(0, scheme.levels, (rows, columns), generator=generator, dtype=torch.uint8)
    codes[0] = codes[0, 0]
    middle = 0 if scheme.grid == "mxfp4" else scheme.levels // 2
    codes[-1, : scheme.group_bounds(columns)[0][1]] = middle
    exponents = torch.rand(rows, groups * scheme.scales_per_group, generator=generator) * 6 - 8
    if scheme.scale_type == "e8m0":
        return PackedRange.pack(QuantizedMatrix(codes, torch.exp2(exponents.round()), None), scheme)
    scales = torch.exp2(exponents).to(scale_dtype(scheme)).float()
    zeros = None
    if scheme.zero_point != "none":
        zeros = torch.randint(0, scheme.levels, (rows, groups), generator=generator).float()
        if scheme.zero_point == "real":
            zeros = (zeros + torch.rand(rows, groups, generator=generator)).to(scale_dtype(scheme)).float()
        zeros[-1, 0] = middle
    return PackedRange.pack(QuantizedMatrix(codes, scales, zeros), scheme)


def tokens(count: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(count, columns), signed, one channel a hundred times larger, the last of several tokens zero."""
    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(3))
    x[:, columns // 2] *= 100
    if count > 1:
        x[-1] = 0
    return x.to(dtype)


def multiplied(part: PackedRange, x: Tensor) -> Tensor:
    """The kernel's product, in an output that was filled with NaN."""
    y = torch.full((x.shape[0], part.codes.shape[0]), math.nan)
    native.multiply_(y, native.rounded(x, None, 3), PackedTensor((part,)))
    return y


def near(y: Tensor, x: Tensor, part: PackedRange, c: float = 2.0) -> bool:
    """Every element near the product in float64.

    The bound is `c * eps * sqrt(K) * (|x| @ |w|)` for sums, and half a step of the fixed-point inputs times |w|.
    """
    w = part.dequantize().double()
    exact, size = x.double() @ w.T, x.double().abs() @ (w.abs() + cancelled(part)).T
    largest = 2.0 ** (23 if x.dtype == torch.float32 else 15)
    steps = [part.abs().amax(1, keepdim=True).expand_as(part) for part in x.double().split(native.FIXED_GROUP, 1)]
    rounding = torch.cat(steps, 1) @ w.abs().T * (1.01 * 0.5 / largest)
    bound = c * torch.finfo(torch.float32).eps * w.shape[1] ** 0.5 * size + rounding
    return y.shape == exact.shape and bool(((y.double() - exact).abs() <= bound).all())


def cancelled(part: PackedRange) -> Tensor:
    """What cancels in a weight, (m, k) float64: scale * code and scale * zero, or scales of several bits."""
    matrix = part.unpack()
    widths = torch.tensor([stop - start for start, stop in part.scheme.group_bounds(part.num_columns)])
    if matrix.zeros is not None:
        offsets = (matrix.scales.abs() * (part.scheme.levels + matrix.zeros.abs())).double()
    elif part.scheme.grid == "sign":
        offsets = matrix.scales.abs().double().unflatten(1, (-1, part.scheme.bits)).sum(2)
    else:
        return torch.zeros(matrix.codes.shape, dtype=torch.float64)
    return offsets.repeat_interleave(widths, dim=1)


def misaligned(tensor: Tensor, offset: int) -> Tensor:
    """A copy whose first byte is `offset` bytes after an aligned address, with nothing behind its last byte."""
    size = tensor.nbytes
    memory = torch.empty(size + 64 + offset, dtype=torch.uint8)
    start = -memory.data_ptr() % 64 + offset
    raw = memory[start : start + size]
    raw.copy_(tensor.contiguous().view(torch.uint8).flatten())
    if start % tensor.element_size():
        # torch has no view of a number at an odd address; callers pass the bytes.
        return raw
    return raw.view(tensor.dtype).view(tensor.shape)

"""Products of quantized inputs with packed weights by NumPy on int64 codes, and what they are made of.

The oracle corrects for zero-points afterwards, `sum q_x q_w - z_x sum q_w - z_w sum q_x + n z_x z_w`, where the code
under test takes them off first; what follows is float32 in the documented order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from subnibble.runtime.activations import Quantized, quantize
from subnibble.runtime.integer import multiply_add_
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.linear import Linear
from subnibble.tensor.packed import PackedRange, PackedTensor, QuantizedMatrix, scale_dtype
from subnibble.tensor.scheme import Scheme

ROWS, COLUMNS = 9, 139
MX, AMX = Scheme(4, 32, "none", "e8m0", "mxfp4"), ActivationScheme(4, 32, "none", "mxfp4")
E2M1_HALVES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int64)
WEIGHTS = {
    "2 bits": [(COLUMNS, Scheme(2, 32))],
    "3 bits, symmetric": [(COLUMNS, Scheme(3, 16, "none"))],
    "4 bits, whole row": [(COLUMNS, Scheme(4, -1, "integer", "float32"))],
    "8 bits": [(COLUMNS, Scheme(8, 64, "integer", "bfloat16"))],
    "8 bits, symmetric": [(COLUMNS, Scheme(8, 128, "none"))],
    "3 bits, real": [(COLUMNS, Scheme(3, 32, "real"))],
    "8 bits, real": [(COLUMNS, Scheme(8, 48, "real", "float32"))],
    "2 bits, sign": [(COLUMNS, Scheme(2, 32, "none", "float16", "sign"))],
    "4 bits, sign": [(COLUMNS, Scheme(4, 40, "none", "bfloat16", "sign"))],
    "mxfp4": [(COLUMNS, MX)],
    "three ranges": [(70, Scheme(2, 32)), (50, Scheme(3, 24, "real")), (19, Scheme(8, -1, "none"))],
}
INPUTS = {
    "8 bits, whole token": ActivationScheme(8),
    "8 bits, symmetric, groups of 128": ActivationScheme(8, 128, "none"),
    "4 bits, groups of 16": ActivationScheme(4, 16),
    "4 bits, groups of 23": ActivationScheme(4, 23),
    "4 bits, symmetric, groups of 40": ActivationScheme(4, 40, "none", clip=0.9),
    "3 bits, groups of 32": ActivationScheme(3, 32),
    "mxfp4": AMX,
}


def weight_range(rows: int, columns: int, scheme: Scheme, seed: int) -> PackedRange:
    """Codes over the whole range; row 0 has one code, row 1 the largest, the last row a first group of zeros."""
    generator = torch.Generator().manual_seed(seed)
    groups, stored = scheme.groups(columns), scale_dtype(scheme)
    codes = torch.randint(0, scheme.levels, (rows, columns), generator=generator, dtype=torch.uint8)
    codes[0], codes[1] = codes[0, 0], scheme.levels - 1
    middle = 0 if scheme.grid == "mxfp4" else scheme.levels // 2
    codes[-1, : scheme.group_bounds(columns)[0][1]] = middle
    scales = torch.exp2(torch.rand(rows, groups * scheme.scales_per_group, generator=generator) * 6 - 8)
    scales = torch.exp2(scales.log2().floor()) if scheme.grid == "mxfp4" else scales.to(stored).float()
    if scheme.zero_point == "none":
        return PackedRange.pack(QuantizedMatrix(codes, scales, None), scheme)
    zeros = torch.randint(0, scheme.levels, (rows, groups), generator=generator).float()
    if scheme.zero_point == "real":
        zeros = (zeros - torch.rand(rows, groups, generator=generator)).to(stored).float()
    zeros[-1, 0] = middle
    return PackedRange.pack(QuantizedMatrix(codes, scales, zeros), scheme)


def weight_of(ranges: list[tuple[int, Scheme]], rows: int = ROWS, seed: int = 0) -> PackedTensor:
    parts = [weight_range(rows, columns, scheme, seed + i) for i, (columns, scheme) in enumerate(ranges)]
    return PackedTensor(tuple(parts))


def tokens(columns: int = COLUMNS, dtype: torch.dtype = torch.float32) -> Tensor:
    """(7, columns): signed, one channel a hundred times larger, one token zero, one constant, one positive."""
    x = torch.randn(7, columns, generator=torch.Generator().manual_seed(3))
    x[:, columns // 2] *= 100
    x[2] = 0
    x[3] = 0.37
    x[4] = x[4].abs()
    return x.to(dtype)


@dataclass(frozen=True)
class Codes:
    """Inputs as int64 codes (t, k), scales and zero-points (t, k) of every channel, bounds of groups."""

    codes: NDArray[np.int64]
    scales: NDArray[np.float32]
    zeros: NDArray[np.int64]
    edges: list[int]


def codes_of(x: Quantized, scheme: ActivationScheme) -> Codes:
    """Numbers with a zero-point put back: any will do for the product, so every group has one of its own."""
    numbers = x.numbers.numpy().astype(np.int64)
    zeros = np.zeros_like(numbers)
    if scheme.zero_point == "integer":
        for start, stop in x.bounds:
            # The lowest code is 0.
            zeros[:, start:stop] = -np.minimum(numbers[:, start:stop].min(1, keepdims=True), 0)
    scales = np.concatenate(
        [np.repeat(x.scales[:, g : g + 1].numpy(), stop - start, 1) for g, (start, stop) in enumerate(x.bounds)], 1
    )
    return Codes(numbers + zeros, scales, zeros, [start for start, _ in x.bounds])


def weight_planes(part: PackedRange) -> list[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32] | None]]:
    """Codes (m, n) int64, scales and zero-points of every column (m, n), None for 0; a plane for each sign bit."""
    quantized, scheme = part.unpack(), part.scheme
    width = part.num_columns if scheme.group_size == -1 else scheme.group_size
    group = np.arange(part.num_columns) // width
    codes, scales = quantized.codes.numpy().astype(np.int64), quantized.scales.numpy()
    if scheme.grid == "mxfp4":
        return [(E2M1_HALVES[codes], (scales / np.float32(2))[:, group], None)]
    if scheme.grid == "sign":
        bits = scheme.bits
        return [(codes >> b & 1, 2 * scales[:, b::bits][:, group], None) for b in range(bits)]
    if quantized.zeros is None:
        middle = np.full((len(codes), part.num_columns), scheme.levels // 2, np.float32)
        return [(codes, scales[:, group], middle)]
    return [(codes, scales[:, group], quantized.zeros.numpy()[:, group])]


def segments(part: PackedRange, start: int, x: Codes) -> list[tuple[int, int]]:
    """First and stop column of runs between edges of the weight's groups and of the input's."""
    width = part.num_columns if part.scheme.group_size == -1 else part.scheme.group_size
    stop = min(part.num_columns, x.codes.shape[1] - start)
    edges = {*range(0, part.num_columns, width), *(e - start for e in x.edges), stop}
    inside = sorted(e for e in edges if 0 <= e <= stop)
    return list(itertools.pairwise(inside))


def oracle_product(x: Codes, weight: PackedTensor, y: NDArray[np.float32]) -> NDArray[np.float32]:
    start = 0
    for part in weight.ranges:
        actual = weight_planes(part)
        for first, stop in segments(part, start, x):
            q_x = x.codes[:, start + first : start + stop]
            s_x, z_x = x.scales[:, start + first, None], x.zeros[:, start + first, None]
            n = stop - first
            for codes, scales, zeros in actual:
                q_w, s_w = codes[:, first:stop], scales[:, first]
                whole = q_x @ q_w.T - z_x * q_w.sum(1)
                sums = q_x.sum(1, keepdims=True) - n * z_x
                if part.scheme.grid == "sign":
                    # A bit is (1 + sign) / 2: 2 bit - 1, and its scale is half of what is stored here.
                    product, s_w = (2 * whole - sums).astype(np.float32), s_w / np.float32(2)
                elif zeros is None:
                    product = whole.astype(np.float32)
                elif part.scheme.zero_point == "real":
                    product = whole.astype(np.float32) - sums.astype(np.float32) * zeros[:, first]
                else:
                    z_w = zeros[:, first].astype(np.int64)
                    product = (q_x @ q_w.T - z_x * q_w.sum(1) - z_w * q_x.sum(1, keepdims=True) + n * z_x * z_w).astype(
                        np.float32
                    )
                y = y + (product * s_w) * s_x
        start += part.num_columns
    return y


def oracle(x: Tensor, terms: Linear, scheme: ActivationScheme) -> Tensor:
    """What a linear gives for tokens (t, k) as they enter the product: float32 (t, m)."""
    entered = quantize(x, scheme)
    codes = codes_of(entered, scheme)
    y = oracle_product(codes, terms.weight.main, np.zeros((len(x), terms.weight.main.shape[0]), np.float32))
    if terms.weight.salient is not None:
        y = oracle_product(codes, terms.weight.salient, y)
        if terms.input.requantized:
            rank = terms.weight.salient.shape[1]
            rest = quantize(x[:, :rank].float() - entered.values()[:, :rank], scheme)
            y = oracle_product(codes_of(rest, scheme), terms.weight.salient, y)
    if terms.weight.low_rank is not None:
        down, up = terms.weight.low_rank
        inner = torch.from_numpy(oracle_product(codes, down, np.zeros((len(x), down.shape[0]), np.float32)))
        y = oracle_product(codes_of(quantize(inner, scheme), scheme), up, y)
    result = torch.from_numpy(y)
    return result if terms.weight.bias is None else result + terms.weight.bias.float()


def product(x: Quantized, weight: PackedTensor) -> Tensor:
    y = torch.zeros(len(x.numbers), weight.shape[0])
    multiply_add_(y, x, weight)
    return y


def recoded(weight: PackedTensor, change: Callable[[QuantizedMatrix], None], index: int = 0) -> PackedTensor:
    parts = list(weight.ranges)
    quantized = parts[index].unpack()
    zeros = None if quantized.zeros is None else quantized.zeros.clone()
    changed = QuantizedMatrix(quantized.codes.clone(), quantized.scales.clone(), zeros)
    change(changed)
    parts[index] = PackedRange.pack(changed, parts[index].scheme)
    return PackedTensor(tuple(parts))


def columns_shifted_by_one(quantized: QuantizedMatrix) -> None:
    quantized.codes.copy_(quantized.codes.roll(1, 1))

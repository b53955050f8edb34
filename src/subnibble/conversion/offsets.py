"""Pack weights `scale * code + offset`: our format has no offsets, but zero-points, `scale * (code - zero)`.

The zero-point is `-offset / scale`. If it is a code, or a number that the type of the scales holds, and the weights are
the same bit for bit, that type is used. Otherwise scales and zero-points are float32. Then a weight w differs by the
rounding of the quotient and of two more operations, each at most 2^-24 of its result: together with the other tool's
own rounding, by at most 2^-24 (|offset| + 3 |w|), which `TOLERANCE` bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from subnibble.conversion.foreign import row_chunks
from subnibble.errors import NotSame
from subnibble.tensor.packed import PackedRange
from subnibble.tensor.scheme import SCALE_BITS, Scheme

# Largest difference of a weight, relative to the larger one of the weight and its group's offset.
TOLERANCE = 2.0**-22
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def smallest_type(*tables: Tensor) -> str:
    """The smallest scale type that holds all numbers of float32 tensors exactly."""
    return next(name for name, dtype in _DTYPES.items() if all(torch.equal(t.to(dtype).float(), t) for t in tables))


def with_constant_groups(codes: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Codes for `pack_offsets`: 1 in groups of scale 0, which have one value, their offset; others unchanged.

    codes: (m, k) uint8.
    scales: (m, groups) float32.
    """
    return torch.where((scales == 0).index_select(1, _group_of(codes.shape[1], group_size)), 1, codes)


def pack_offsets(
    codes: Tensor,
    columns: int,
    scales: Tensor,
    offsets: Tensor,
    scheme: Scheme,
    dense: Callable[[slice], Tensor],
) -> PackedRange:
    """Pack a matrix with offsets, exactly if possible.

    codes: (m, bytes of a row) uint8, from `with_constant_groups`, packed.
    columns: k.
    scales, offsets: (m, groups) float32.
    scheme: bits and group size; its zero-point and scale type are chosen here.
    dense: gives rows (rows, k) float32 of the weights as the other tool computes them.
    Raises `NotSame` if the result differs by more than `TOLERANCE`, a bug of ours.
    """
    # A group with scale 0: scale `offset`, zero-point 0.
    is_constant = scales == 0
    zeros = torch.where(is_constant, 0.0, -offsets / torch.where(is_constant, 1.0, scales))
    scales = torch.where(is_constant, offsets, scales)
    chunks = row_chunks(len(codes), columns)
    for candidate in _candidates(scales, zeros, scheme):
        packed = PackedRange.from_packed_codes(codes, columns, scales, zeros, candidate)
        if not any(bool(_difference(packed, dense, rows).any()) for rows in chunks):
            return packed
    index = _group_of(columns, scheme.group_size)
    for rows in chunks:
        difference = _difference(packed, dense, rows)
        bound = TOLERANCE * torch.maximum(dense(rows).abs(), offsets[rows].abs().index_select(1, index))
        if bool((difference > bound).any()):
            raise NotSame(f"weights differ by up to {float(difference.max())} from those of the other tool")
    return packed


def _difference(packed: PackedRange, dense: Callable[[slice], Tensor], rows: slice) -> Tensor:
    """|packed - dense| of some rows, (rows, k)."""
    return (packed.rows(torch.arange(rows.start, rows.stop)).dequantize() - dense(rows)).abs_()


def _candidates(scales: Tensor, zeros: Tensor, scheme: Scheme) -> Iterator[Scheme]:
    """Schemes that may hold the matrix, the smallest first; the last one, with float32, always can."""
    kinds = [("real", smallest_type(scales, zeros))]
    if bool(((zeros == zeros.round()) & (zeros >= 0) & (zeros < scheme.levels)).all()):
        kinds.append(("integer", smallest_type(scales)))
    kinds.sort(key=lambda kind: SCALE_BITS[kind[1]] * (2 if kind[0] == "real" else 1))
    yield from (Scheme(scheme.bits, scheme.group_size, *kind) for kind in kinds)
    if ("real", "float32") not in kinds:
        yield Scheme(scheme.bits, scheme.group_size, "real", "float32")


def _group_of(columns: int, group_size: int) -> Tensor:
    return torch.arange(columns) // group_size

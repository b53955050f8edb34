"""A matrix of integer codes with a scale and an integer zero-point per row and group, its columns in any order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.conversion.foreign import Packed
from subnibble.errors import CheckpointError
from subnibble.tensor.groups import WHOLE_CHANNEL
from subnibble.tensor.packed import PackedRange, PackedTensor, QuantizedMatrix
from subnibble.tensor.scheme import Scheme

SCALE_TYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


@dataclass(frozen=True)
class GroupedMatrix:
    """The matrix `w[i, j] = scales[i, g] * (codes[i, j] - zeros[i, g])`, where `g = group_of[j]`.

    codes: (m, k) uint8.
    scales: (m, groups), in one of `SCALE_TYPES`.
    zeros: (m, groups) uint8, each a code.
    group_of: (k,) int64, a group of each column.
    bits: width of a code.
    group_size: columns of a group; -1 for all.
    where: the matrix, for errors.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_of: Tensor
    bits: int
    group_size: int
    where: str

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """Dequantize rows, by default all: (rows, k) float32."""
        scales, zeros = (table[rows].float().index_select(1, self.group_of) for table in (self.scales, self.zeros))
        return (self.codes[rows].float() - zeros) * scales

    def packed(self) -> Packed:
        """Pack, with the columns of a group side by side.

        Raises `CheckpointError` if the groups differ in size: only the last one may be shorter.
        """
        width = self.codes.shape[1]
        size = WHOLE_CHANNEL if self.group_size >= width else self.group_size
        order, groups = self._order(width if size == WHOLE_CHANNEL else size)
        zeros = self.zeros.index_select(1, groups)
        is_central = bool((zeros == 2 ** (self.bits - 1)).all())
        scheme = Scheme(self.bits, size, "none" if is_central else "integer", SCALE_TYPES[self.scales.dtype])
        quantized = QuantizedMatrix(
            self.codes.index_select(1, order), self.scales.index_select(1, groups).float(), zeros.float()
        )
        is_sorted = torch.equal(order, torch.arange(width))
        return Packed(PackedTensor((PackedRange.pack(quantized, scheme),)), None if is_sorted else order)

    def _order(self, size: int) -> tuple[Tensor, Tensor]:
        """Columns in the order of their groups, (k,), and groups in the order of their columns, (groups,)."""
        count = self.scales.shape[1]
        widths = torch.bincount(self.group_of, minlength=count)
        # A shorter group has to be the last one.
        groups = torch.argsort(widths < size, stable=True)
        rank = torch.empty_like(groups).index_copy_(0, groups, torch.arange(count))
        sorted_widths = widths.index_select(0, groups)
        if bool((sorted_widths[:-1] != size).any()) or not 0 < int(sorted_widths[-1]) <= size:
            wrong = next(group for group, width in enumerate(widths.tolist()) if width != size)
            raise CheckpointError(
                f"{self.where}: its g_idx puts {int(widths[wrong])} columns into group {wrong}, and groups of {size} "
                "are expected; was it written with another group_size? Fetch the model again"
            )
        return torch.argsort(rank.index_select(0, self.group_of), stable=True), groups


def plain_groups(columns: int, group_size: int) -> Tensor:
    """The group of each column if groups lie side by side, (columns,) int64."""
    return torch.arange(columns) // (columns if group_size == WHOLE_CHANNEL else group_size)

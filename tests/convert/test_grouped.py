"""A matrix whose groups lie anywhere equals its packed form, once the columns are back in their places."""

from __future__ import annotations

import pytest
import torch

from subnibble.conversion.grouped import GroupedMatrix, plain_groups
from subnibble.errors import CheckpointError


def grouped(group_of: torch.Tensor, size: int, dtype: torch.dtype, bits: int = 3) -> GroupedMatrix:
    generator = torch.Generator().manual_seed(0)
    groups = int(group_of.max()) + 1
    codes = torch.randint(0, 2**bits, (5, len(group_of)), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (5, groups), generator=generator, dtype=torch.uint8)
    scales = torch.randn(5, groups, generator=generator).to(dtype)
    return GroupedMatrix(codes, scales, zeros, group_of, bits, size, "here")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "group_of",
    [
        plain_groups(40, 16),
        plain_groups(40, 16).flip(0),
        plain_groups(40, 16)[torch.randperm(40, generator=torch.Generator().manual_seed(1))],
        # The short group is the first one.
        torch.cat([torch.zeros(8), torch.ones(16), torch.full((16,), 2)]).long(),
    ],
    ids=["plain", "reversed", "random", "short first"],
)
def test_packed_columns_are_the_foreign_ones(group_of: torch.Tensor, dtype: torch.dtype) -> None:
    matrix = grouped(group_of, 16, dtype)
    packed = matrix.packed()
    own = packed.matrix.dequantize()
    if packed.gather is not None:
        own = torch.empty_like(own).index_copy_(1, packed.gather, own)
    assert torch.equal(own, matrix.dense())
    assert (packed.gather is None) == torch.equal(group_of, plain_groups(40, 16))
    assert packed.matrix.ranges[0].scales.dtype == dtype
    by_hand = matrix.scales[2, group_of[7]].float() * (int(matrix.codes[2, 7]) - int(matrix.zeros[2, group_of[7]]))
    assert own[2, 7] == by_hand


def test_a_wider_group_than_the_matrix_is_the_whole_row() -> None:
    packed = grouped(torch.zeros(40).long(), 128, torch.float16).packed()
    assert packed.matrix.ranges[0].scheme.group_size == -1


@pytest.mark.parametrize("moved", [1, 20])
def test_groups_of_other_sizes_are_refused(moved: int) -> None:
    group_of = plain_groups(48, 16)
    group_of[:moved] = 1
    with pytest.raises(CheckpointError, match=r"here: its g_idx puts \d+ columns into group 0, and groups of 16 are"):
        grouped(group_of, 16, torch.float16).packed()

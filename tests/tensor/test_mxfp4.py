"""MXFP4 against the tables of the OCP Microscaling specification 1.0, value by value."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from subnibble.tensor import mxfp4

# Code 0sem: sign, two bits of exponent with bias 1, one of mantissa; exponent 0 is subnormal.
VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
# The middle of two neighbours, and the one of them whose mantissa bit is 0.
TIES = [(0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6)]


def test_the_table_is_that_of_the_specification_with_its_zeros_signed() -> None:
    assert list(mxfp4.E2M1) == VALUES
    assert [math.copysign(1, value) for value in mxfp4.E2M1] == [1] * 8 + [-1] * 8
    for code, value in enumerate(VALUES):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
        assert value == (-size if sign else size)
    assert all(value % mxfp4.E2M1_STEP == 0 for value in VALUES)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_decode_gives_the_table(dtype) -> None:
    values = mxfp4.decode_e2m1(torch.arange(16).to(dtype).view(2, 8))
    assert values.dtype == torch.float32
    assert values.flatten().tolist() == VALUES


@pytest.mark.parametrize("default", [torch.float64, torch.float16])
def test_values_are_float32_whatever_the_default_type_of_torch(default) -> None:
    torch.set_default_dtype(default)
    try:
        result = mxfp4.decode_e2m1(torch.arange(16)), mxfp4.shared_scale(torch.tensor([1e-30, 3.0, 1e30]).float())
        result += (mxfp4.decode_e8m0(torch.tensor([1, 127, 254], dtype=torch.uint8)),)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [values.dtype for values in result] == [torch.float32] * 3
    assert result[2].tolist() == [2.0**-126, 1.0, 2.0**127]


def test_encode_gives_every_level_its_code() -> None:
    codes = mxfp4.encode_e2m1(torch.tensor(VALUES))
    assert codes.dtype == torch.int64
    # The sign of a zero is lost, as it is in comparisons; its value is not.
    assert codes.tolist() == [*range(8), 0, *range(9, 16)]


@pytest.mark.parametrize(("middle", "code"), TIES)
def test_a_tie_goes_to_the_even_code_and_its_neighbours_do_not(middle, code) -> None:
    up = float(np.nextafter(np.float32(middle), np.float32(9)))
    down = float(np.nextafter(np.float32(middle), np.float32(0)))
    lower = next(i for i in range(7) if VALUES[i] < middle < VALUES[i + 1])
    result = mxfp4.encode_e2m1(torch.tensor([down, middle, up])).tolist()
    assert result == [lower, code, lower + 1]
    assert code % 2 == 0
    negative = mxfp4.encode_e2m1(torch.tensor([-down, -middle, -up])).tolist()
    assert negative == [8 + lower, 8 + code, 9 + lower]


def test_larger_values_saturate_and_signs_are_kept() -> None:
    x = torch.tensor([6.0, 6.5, 8.0, 1e30, torch.inf, -6.0, -7.0, -1e30, -torch.inf, 1e-30, -1e-30])
    assert mxfp4.encode_e2m1(x).tolist() == [7] * 5 + [15] * 4 + [0, 8]


def encoded_by_distance(x: Tensor) -> Tensor:
    """Nearest of the 16 values by brute force, ties to the even code, in float64."""
    codes = []
    for value in x.double().flatten().tolist():
        signs = range(8, 16) if value < 0 else range(8)
        codes.append(min(signs, key=lambda code: (abs(abs(VALUES[code]) - abs(value)), code % 2)))
    return torch.tensor(codes).view(x.shape)


def signed_values() -> Tensor:
    noise = 3 * torch.randn(400, generator=torch.Generator().manual_seed(0))
    return torch.cat([noise, torch.tensor([tie for tie, _ in TIES]), -torch.tensor([tie for tie, _ in TIES])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_encode_is_nearest_with_ties_to_even(dtype) -> None:
    x = signed_values().to(dtype)
    assert torch.equal(mxfp4.encode_e2m1(x), encoded_by_distance(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_nearest_number_is_that_of_the_code(dtype) -> None:
    edges = [6.0, 6.5, 1e30, torch.inf, -torch.inf, 1e-30, -1e-41, 0.0, -0.0, 1.999, 3.999]
    x = torch.cat([signed_values(), torch.tensor(VALUES), torch.tensor(edges)]).to(dtype)
    kept = x.clone()
    result = mxfp4.nearest_e2m1(x)
    assert result.dtype == dtype
    assert torch.equal(result.float(), mxfp4.decode_e2m1(mxfp4.encode_e2m1(x)))
    assert torch.equal(x, kept)
    assert bool(mxfp4.nearest_e2m1(torch.tensor([torch.nan], dtype=dtype)).isnan())


def ties_up(x: Tensor) -> Tensor:
    middles = torch.tensor([tie for tie, _ in TIES])
    return (x.abs().unsqueeze(-1) >= middles).sum(-1) + 8 * (x < 0)


def ties_down(x: Tensor) -> Tensor:
    middles = torch.tensor([tie for tie, _ in TIES])
    return (x.abs().unsqueeze(-1) > middles).sum(-1) + 8 * (x < 0)


def sign_dropped(x: Tensor) -> Tensor:
    return mxfp4.encode_e2m1(x.abs())


def twos_complement(x: Tensor) -> Tensor:
    codes = mxfp4.encode_e2m1(x)
    return torch.where(codes > 8, 24 - codes, codes)


def wrapped(x: Tensor) -> Tensor:
    return torch.where(x.abs() > 6, mxfp4.encode_e2m1(x) - 7, mxfp4.encode_e2m1(x))


def one_code_off_by_one(x: Tensor) -> Tensor:
    codes = mxfp4.encode_e2m1(x)
    codes[17] ^= 1
    return codes


@pytest.mark.parametrize("fault", [ties_up, ties_down, sign_dropped, twos_complement, wrapped, one_code_off_by_one])
def test_the_encoding_oracle_rejects_a_planted_fault(fault: Callable[[Tensor], Tensor]) -> None:
    x = signed_values()
    assert not torch.equal(fault(x), encoded_by_distance(x))


@pytest.mark.parametrize(
    ("exponent", "scale"), [(0, 2.0**-127), (1, 2.0**-126), (126, 0.5), (127, 1.0), (128, 2.0), (254, 2.0**127)]
)
def test_e8m0_is_a_biased_exponent(exponent, scale) -> None:
    stored = mxfp4.encode_e8m0(torch.tensor([[scale]]))
    assert stored.dtype == torch.uint8
    assert stored.tolist() == [[exponent]]
    assert mxfp4.decode_e8m0(stored).tolist() == [[scale]]


def test_every_scale_there_is_survives_e8m0_both_ways() -> None:
    exponents = torch.arange(1, 255).to(torch.uint8)
    scales = mxfp4.decode_e8m0(exponents)
    assert scales.dtype == torch.float32
    assert scales.tolist() == [2.0**e for e in range(-126, 128)]
    assert torch.equal(mxfp4.encode_e8m0(scales), exponents)
    assert (scales[0], scales[-1]) == (mxfp4.SMALLEST_SCALE, mxfp4.LARGEST_SCALE)


@pytest.mark.parametrize(
    ("largest", "scale"),
    [
        # 2^(floor(log2 largest) - 2)
        (1.0, 0.25),
        (6.0, 1.0),
        (4.0, 1.0),
        (7.999, 1.0),
        (8.0, 2.0),
        (3.999, 0.5),
        (0.37, 2.0**-4),
        (1e-3, 2.0**-12),
        (3e38, 2.0**125),
        # A group of zeros and what comes near.
        (0.0, 2.0**-126),
        (1e-38, 2.0**-126),
        (1e-45, 2.0**-126),
        (2.0**-124, 2.0**-126),
        (2.0**-123, 2.0**-125),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_shared_scale_is_the_specified_power_of_two(largest, scale, dtype) -> None:
    result = mxfp4.shared_scale(torch.tensor([[largest]], dtype=dtype))
    assert result.dtype == torch.float32
    assert result.tolist() == [[scale]]


def test_the_largest_of_a_group_lies_on_the_top_binade_of_the_grid() -> None:
    for exponent, mantissa in itertools.product(range(-120, 120, 7), (1.0, 1.25, 1.5, 1.99)):
        largest = torch.tensor(mantissa * 2.0**exponent)
        assert 4 <= float(largest / mxfp4.shared_scale(largest)) < 8

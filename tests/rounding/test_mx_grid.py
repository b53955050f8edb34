"""MXFP4 grids of weights: the specification's scale, the search around it, and rounders on top of both."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from subnibble.errors import NumericalFailure
from subnibble.rounding import grid, mx_grid
from subnibble.rounding.gptq import GPTQ
from subnibble.rounding.mx_grid import MxLevels
from subnibble.rounding.order import ORDERS
from subnibble.rounding.rtn import RTN
from subnibble.tensor.mxfp4 import E2M1, LARGEST_SCALE, SMALLEST_SCALE
from subnibble.tensor.packed import PackedRange, PackedTensor, QuantizedMatrix
from subnibble.tensor.scheme import Scheme

MX = Scheme(4, 32, "none", "e8m0", "mxfp4")
MINMAX, MSE = grid.Clip("minmax"), grid.Clip("mse")
every_clip = pytest.mark.parametrize("clip", [MINMAX, MSE, grid.Clip("mse", 2.4)], ids=lambda c: f"{c.name}{c.power}")
every_width = pytest.mark.parametrize("columns", [32, 47, 64, 5])


def weights(rows: int = 11, columns: int = 47, seed: int = 0) -> Tensor:
    """Signed, with outliers; row 2 constant, row 3 zero, row 4 tiny, row 5 huge."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05
    w[0, 3], w[1, columns - 1] = 1.7, -2.3
    w[2] = 0.37
    w[3] = 0
    w[4] *= 1e-35
    w[5] *= 1e37
    return w


def squared_error(levels: MxLevels, group: Tensor, power: float = 2.0) -> Tensor:
    """(m,) float64: of every row."""
    return (levels.decode(levels.encode(group)).double() - group.double()).abs().pow(power).sum(1)


@every_width
def test_minmax_is_the_scale_of_the_specification(columns) -> None:
    group = weights(columns=columns)
    scales = mx_grid.fit(group, "minmax", 2.0, None).scales
    assert scales.shape == (11, 1)
    for row, scale in zip(group, scales.flatten().tolist(), strict=True):
        largest = float(row.abs().max())
        expected = 2.0 ** (math.frexp(largest)[1] - 1 - 2) if largest > 0 else SMALLEST_SCALE
        assert scale == max(expected, SMALLEST_SCALE)


@every_clip
@every_width
def test_scales_are_powers_of_two_in_reach_of_e8m0(columns, clip) -> None:
    levels = grid.fit_levels(weights(columns=columns), MX, clip)
    mantissas, _ = torch.frexp(levels.scales)
    assert bool((mantissas == 0.5).all())
    assert bool(((levels.scales >= SMALLEST_SCALE) & (levels.scales <= LARGEST_SCALE)).all())
    assert levels.zeros is None


@pytest.mark.parametrize("power", [1.0, 2.0, 2.4])
@every_width
def test_the_search_is_never_worse_than_the_specification_and_once_better(columns, power) -> None:
    group = weights(columns=columns)[:4]
    standard, searched = (mx_grid.fit(group, clip, power, None) for clip in ("minmax", "mse"))
    actual, plain = squared_error(searched, group, power), squared_error(standard, group, power)
    assert bool((actual <= plain * (1 + 1e-6)).all())
    wide = torch.randn(200, columns, generator=torch.Generator().manual_seed(1))
    standard, searched = (mx_grid.fit(wide, clip, power, None) for clip in ("minmax", "mse"))
    actual, plain = squared_error(searched, wide, power), squared_error(standard, wide, power)
    assert bool((actual <= plain * (1 + 1e-6)).all())
    assert bool((actual < 0.95 * plain).any())


def test_the_search_keeps_the_best_of_one_two_and_a_half() -> None:
    group = torch.randn(300, 32, generator=torch.Generator().manual_seed(2))
    standard = mx_grid.fit(group, "minmax", 2.0, None).scales
    losses = torch.stack([squared_error(MxLevels(standard * factor), group) for factor in (1.0, 2.0, 0.5)])
    result = squared_error(mx_grid.fit(group, "mse", 2.0, None), group)
    assert torch.allclose(result, losses.amin(0), rtol=1e-5, atol=0)
    factors = (mx_grid.fit(group, "mse", 2.0, None).scales / standard).unique().tolist()
    assert {1.0, 2.0} <= set(factors) <= {0.5, 1.0, 2.0}


def test_weights_of_columns_decide_what_the_search_keeps() -> None:
    # 7.9 saturates at 6 by the specification's scale; with twice that, 1.5 moves to 2 and 7.9 to 8.
    group = torch.tensor([[7.9] + [1.5] * 31])
    importance = torch.zeros(32)
    importance[0] = 1
    assert mx_grid.fit(group, "minmax", 2.0, importance).scales.item() == 1
    assert mx_grid.fit(group, "mse", 2.0, importance).scales.item() == 2
    assert mx_grid.fit(group, "mse", 2.0, 1 - importance).scales.item() in (0.5, 1)


@every_clip
@every_width
def test_encode_is_nearest(columns, clip) -> None:
    group = weights(columns=columns)
    levels = grid.fit_levels(group, MX, clip)
    codes = levels.encode(group)
    assert codes.dtype == torch.float32
    assert set(codes.flatten().tolist()) <= set(range(16))
    table = torch.tensor(E2M1, dtype=torch.float64) * levels.scales.double()
    nearest = (table.unsqueeze(1) - group.double().unsqueeze(2)).abs().amin(2)
    assert torch.equal((levels.decode(codes).double() - group.double()).abs(), nearest)
    # A neighbouring code is not.
    assert not torch.equal((levels.decode((codes + 1) % 16).double() - group.double()).abs(), nearest)


@every_clip
@every_width
def test_rtn_packs_and_unpacks_exactly(columns, clip) -> None:
    w = weights(columns=columns)
    quantized = grid.quantized(w, MX, clip)
    part = PackedRange.pack(quantized, MX)
    assert part.scales.dtype == part.codes.dtype == torch.uint8
    assert part.codes.shape == (11, (columns + 1) // 2)
    assert part.scales.shape == (11, -(-columns // 32))
    assert part.zeros is None
    back = part.unpack()
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(back.scales, quantized.scales)
    state = PackedTensor((part,))
    assert torch.equal(PackedTensor.from_state(state.state(), state.layout).dequantize(), part.dequantize())
    assert state.stored_bits == 11 * MX.row_bits(columns) == state.layout.stored_bits
    expected = torch.tensor(E2M1)[quantized.codes.long()] * quantized.scales.repeat_interleave(32, 1)[:, :columns]
    assert torch.equal(part.dequantize(), expected)


def test_weights_on_the_grid_are_kept_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (6, 64), generator=generator)
    codes[:, [0, 32]] = 7
    scales = torch.exp2(torch.randint(-20, 20, (6, 2), generator=generator).float())
    w = torch.tensor(E2M1)[codes] * scales.repeat_interleave(32, 1)
    for clip in (MINMAX, MSE):
        quantized = grid.quantized(w, MX, clip)
        assert torch.equal(quantized.scales, scales)
        assert torch.equal(PackedRange.pack(quantized, MX).dequantize(), w)


def same(a: QuantizedMatrix, b: QuantizedMatrix) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales) and a.zeros is b.zeros is None


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("columns", [32, 47, 96])
@every_clip
def test_gptq_equals_rtn_on_a_diagonal_gram(clip, columns, order) -> None:
    w = weights(columns=columns)[[0, 1, 2, 3, 6, 7, 8]]
    gram = torch.diag(torch.rand(columns, generator=torch.Generator().manual_seed(4)) + 0.1)
    rounded = GPTQ(clip, order=order)(w, gram, MX, "here").quantized
    assert same(rounded, RTN(clip)(w, None, MX, "here").quantized)
    assert float(PackedRange.pack(rounded, MX).dequantize().sub(w).norm()) < 0.2 * float(w.norm())


def test_gptq_equals_rtn_no_longer_on_a_full_gram_and_errs_less() -> None:
    w = weights(columns=64)[[0, 1, 6, 7, 8]]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(400, 6, generator=generator) @ torch.randn(6, 64, generator=generator)
    gram = x.T @ x + 10 * torch.eye(64)
    rounded, plain = GPTQ(MSE)(w, gram, MX, "here").quantized, RTN(MSE)(w, None, MX, "here").quantized
    assert not same(rounded, plain)
    errors = [PackedRange.pack(quantized, MX).dequantize() - w for quantized in (rounded, plain)]
    mine, other = (float(((error @ gram) * error).sum()) for error in errors)
    assert mine < 0.8 * other


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@every_clip
def test_weights_that_are_not_finite_are_a_numerical_failure(clip, value) -> None:
    w = weights()
    w[4, 40] = value
    with pytest.raises(NumericalFailure, match="not finite"):
        grid.quantized(w, MX, clip)

"""Gradients of fake quantization, against autograd on the same formula with round's derivative as 1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from subnibble.errors import BadRecipe
from subnibble.rounding import grid
from subnibble.rounding.fixed import FixedGrids
from subnibble.rounding.gptq import GPTQ
from subnibble.rounding.rtn import RTN
from subnibble.tensor.packed import PackedRange
from subnibble.tensor.scheme import Scheme
from subnibble.tuning.clipping import Clipping, check_scheme
from subnibble.tuning.fake_quant import fake_quantize, rounded, straight_through

GENERATOR = torch.Generator()


def weights(rows: int = 7, columns: int = 45, kind: torch.dtype = torch.float32) -> Tensor:
    """Rows of ragged groups, an outlier, a row of zeros, a constant row."""
    w = torch.randn(rows, columns, generator=GENERATOR.manual_seed(0), dtype=kind)
    w[0, 3] = 9
    w[1] = 0
    w[2] = 0.5
    return w


def by_autograd(w: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    place = w / scale + zero
    nearest = place + (place.round() - place).detach()
    return (nearest.clamp(0, levels - 1) - zero) * scale


def gradients(function: object, levels: int) -> list[Tensor]:
    w = weights(kind=torch.float64).unflatten(1, (3, 15)).requires_grad_()
    scale = (0.2 + torch.rand(7, 3, 1, generator=GENERATOR.manual_seed(1), dtype=torch.float64)).requires_grad_()
    zero = torch.randint(0, levels, (7, 3, 1), generator=GENERATOR.manual_seed(2)).double().requires_grad_()
    result = function(w, scale, zero, levels)
    # Every element counts differently.
    (result * torch.randn(result.shape, generator=GENERATOR.manual_seed(3), dtype=torch.float64)).sum().backward()
    return [result.detach(), w.grad, scale.grad, zero.grad]


@pytest.mark.parametrize("levels", [4, 8, 16])
def test_fake_quantization_is_autograd_of_its_formula(levels: int) -> None:
    for actual, target in zip(gradients(fake_quantize, levels), gradients(by_autograd, levels), strict=True):
        assert torch.allclose(actual, target, rtol=1e-12, atol=1e-12)


def test_the_oracle_rejects_planted_faults() -> None:
    def without_range(w: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
        return straight_through(w, by_autograd(w, scale, zero, levels).detach()) + 0 * scale + 0 * zero

    def too_narrow(w: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
        return by_autograd(w, scale, zero, levels - 1)

    for fault in (without_range, too_narrow):
        pairs = zip(gradients(fault, 8), gradients(by_autograd, 8), strict=True)
        assert not all(torch.allclose(actual, target) for actual, target in pairs)


def test_gradients_pass_straight_through() -> None:
    x = torch.randn(5, requires_grad=True)
    result = straight_through(x, torch.zeros(5))
    (result * torch.arange(5)).sum().backward()
    assert torch.equal(result, torch.zeros(5))
    assert torch.equal(x.grad, torch.arange(5.0))
    assert torch.equal(rounded(x, torch.float16), x.detach().half().float())


@pytest.mark.parametrize("zero_point", ["none", "integer"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [16, -1])
def test_ranges_start_where_the_clip_search_stands(zero_point: str, bits: int, group: int) -> None:
    scheme, w = Scheme(bits, group, zero_point), weights()
    for clip in (grid.Clip(), grid.Clip("minmax")):
        target, grids = grid.quantized(w, scheme, clip), Clipping(w, scheme, clip).fitted(w)
        actual = torch.cat([fit.levels.scales for fit in grids], 1)
        assert torch.equal(actual, target.scales)
        if zero_point == "integer":
            zeros = torch.cat([fit.levels.zeros for fit in grids], 1)
            # Where a range's end lies half-way between two codes, either will do.
            assert bool(((zeros - target.zeros).abs() <= 1).all())
            assert int((zeros != target.zeros).sum()) <= 2


@pytest.mark.parametrize("zero_point", ["none", "integer"])
def test_what_is_trained_is_what_is_stored(zero_point: str) -> None:
    scheme, w = Scheme(3, 16, zero_point), weights()
    clipping = Clipping(w, scheme, grid.Clip())
    with torch.no_grad():
        for share in clipping.parameters():
            share += torch.randn(share.shape, generator=GENERATOR.manual_seed(4))
    grids = FixedGrids.stacked([clipping.fitted(w)])
    stored = PackedRange.pack(RTN(grids)(w, None, scheme, "w").quantized, scheme).dequantize()
    assert torch.equal(stored, clipping(w).detach())


def test_stacked_grids_keep_their_rows() -> None:
    scheme, w = Scheme(3, 16), weights()
    both = [Clipping(part, scheme, grid.Clip()) for part in (w, 3 * w)]
    grids = FixedGrids.stacked([clip.fitted(part) for clip, part in zip(both, (w, 3 * w), strict=True)])
    stored = PackedRange.pack(RTN(grids)(torch.cat([w, 3 * w]), None, scheme, "w").quantized, scheme).dequantize()
    assert torch.equal(stored, torch.cat([both[0](w), both[1](3 * w)]).detach())


def test_compensation_on_fixed_grids_leaves_the_grids() -> None:
    scheme, w = Scheme(3, 16), weights()
    x = torch.randn(200, 45, generator=GENERATOR.manual_seed(5)) * torch.linspace(0.2, 3, 45)
    grids = FixedGrids.stacked([Clipping(w, scheme, grid.Clip()).fitted(w)])
    nearest, compensated = (
        rounder(w, x.T @ x, scheme, "w").quantized for rounder in (RTN(grids), GPTQ(grids, order="gar"))
    )
    assert torch.equal(nearest.scales, compensated.scales)
    assert torch.equal(nearest.zeros, compensated.zeros)
    errors = [
        ((PackedRange.pack(quantized, scheme).dequantize() - w) @ x.T).norm() for quantized in (nearest, compensated)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("scheme", [Scheme(2, 32, "none", grid="sign"), Scheme(3, 32, "real")])
def test_grids_without_ranges_are_refused(scheme: Scheme) -> None:
    with pytest.raises(BadRecipe, match=r"model\.x has the scheme .* but tuning needs grid = \"uniform\""):
        check_scheme(scheme, "model.x")

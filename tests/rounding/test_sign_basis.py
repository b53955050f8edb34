"""Sign-basis grids: the fit is least squares, codes are nearest levels, storage is exact."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from subnibble.errors import BadRecipe, NumericalFailure
from subnibble.rounding import grid, sign_basis
from subnibble.rounding.gptq import GPTQ
from subnibble.rounding.sign_basis import SignLevels
from subnibble.tensor.packed import PackedRange
from subnibble.tensor.scheme import Scheme

CLIP = grid.Clip("minmax")


def sign_scheme(bits: int, group_size: int = -1) -> Scheme:
    return Scheme(bits, group_size, "none", grid="sign")


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Signed, with outliers, an all-zero row and a constant one."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    w[:, 1] *= 9
    w[0], w[1] = 0, -0.7
    return w


def brute_force(w: float, scales: list[float]) -> float:
    levels = [
        sum(s * r for s, r in zip(signs, scales, strict=True))
        for signs in itertools.product((-1, 1), repeat=len(scales))
    ]
    return min(abs(level - w) for level in levels)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_are_the_nearest_levels(bits: int) -> None:
    w = weights(6, 23)
    levels = sign_basis.fit(w, sign_scheme(bits), None)
    decoded = levels.decode(levels.encode(w))
    for i, j in itertools.product(range(6), range(23)):
        nearest = brute_force(float(w[i, j]), levels.scales[i].double().tolist())
        assert abs(float(decoded[i, j] - w[i, j])) == pytest.approx(nearest, abs=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [7, 16, -1])
def test_packed_form_decodes_to_the_fitted_levels_bit_for_bit(bits: int, group_size: int) -> None:
    w, scheme = weights(9, 45), sign_scheme(bits, group_size)
    quantized = grid.quantized(w, scheme, CLIP)
    dense = PackedRange.pack(quantized, scheme).dequantize()
    for g, (start, stop) in enumerate(scheme.group_bounds(45)):
        levels = SignLevels(quantized.scales[:, g * bits : (g + 1) * bits])
        assert torch.equal(dense[:, start:stop], levels.decode(quantized.codes[:, start:stop]))
    assert quantized.zeros is None
    assert torch.equal(quantized.scales, quantized.scales.half().float())


def test_zero_rows_stay_zero_and_constant_rows_are_met() -> None:
    w = weights(4, 32)
    quantized = grid.quantized(w, sign_scheme(2), CLIP)
    dense = PackedRange.pack(quantized, sign_scheme(2)).dequantize()
    assert torch.equal(dense[0], torch.zeros(32))
    assert float((dense[1, 2:] + 0.7).abs().max()) < 1e-3


@pytest.mark.parametrize("weighted", [False, True])
def test_loss_is_at_a_stationary_point_of_the_scales(weighted: bool) -> None:
    """With codes fixed, no scale can be moved for the better: the gradient of the weighted loss is zero."""
    w = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).double()
    h = (
        torch.rand(64, generator=torch.Generator().manual_seed(2)).double() + 0.1
        if weighted
        else torch.ones(64).double()
    )
    levels = sign_basis.fit(w.float(), sign_scheme(3), h.float())
    codes = levels.encode(w.float()).long()
    signs = torch.stack([((codes >> bit) & 1) * 2 - 1 for bit in range(3)], dim=1).double()
    result = sign_basis.bins(w.abs(), torch.ones_like(h), h, SignLevels(levels.scales.double()))
    scales = sign_basis.solve(result, levels.patterns.double())
    residual = w - torch.einsum("mk,mkg->mg", scales, signs)
    gradient = torch.einsum("mg,mkg->mk", h * residual, signs)
    assert float(gradient.abs().max()) < 1e-3 * float((h * w.abs()).sum(1).max())


def test_more_iterations_never_fit_worse() -> None:
    w, h = weights(12, 64), torch.rand(64, generator=torch.Generator().manual_seed(3)) + 0.01
    losses = []
    for iterations in (0, 1, 2, 5, 15):
        levels = sign_basis.fit(w, sign_scheme(2), h, iterations)
        losses.append(h * (levels.decode(levels.encode(w)) - w).square())
    for before, after in itertools.pairwise(losses):
        assert bool((after.sum(1) <= before.sum(1) * (1 + 1e-5)).all())
    assert float(losses[-1].sum()) < 0.9 * float(losses[0].sum())


def test_gaussian_rows_reach_the_error_of_the_optimal_grid() -> None:
    """Known figures of 2 and 3 bits on normally distributed rows in groups of 128: 0.114 and 0.035 of their energy."""
    w = torch.randn(2000, 128, generator=torch.Generator().manual_seed(0))
    for bits, expected in ((2, 0.114), (3, 0.0351)):
        dense = PackedRange.pack(grid.quantized(w, sign_scheme(bits), CLIP), sign_scheme(bits)).dequantize()
        assert float((dense - w).square().sum() / w.square().sum()) == pytest.approx(expected, rel=0.02)


def test_column_weights_buy_accuracy_where_they_are_large() -> None:
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(4))
    h = torch.ones(128)
    h[:16] = 100
    w[:, :16] *= 0.2
    errors = {}
    for name, column_weights in (("none", None), ("given", h)):
        levels = grid.fit_levels(w, sign_scheme(2), CLIP, column_weights)
        errors[name] = (levels.decode(levels.encode(w)) - w).square()
    assert float((h * errors["given"]).sum()) < 0.5 * float((h * errors["none"]).sum())
    assert float(errors["given"].sum()) > float(errors["none"].sum())


def test_weighted_uniform_search_never_loses_to_the_unweighted_one() -> None:
    w = weights(16, 64)
    h = torch.rand(64, generator=torch.Generator().manual_seed(5)).pow(4) + 1e-3
    scheme, clip = Scheme(2, -1), grid.Clip("mse", 2.0)
    losses = []
    for column_weights in (h, None):
        levels = grid.fit_levels(w, scheme, clip, column_weights)
        losses.append((h * (levels.decode(levels.encode(w)) - w).square()).sum(1))
    assert bool((losses[0] <= losses[1] * (1 + 1e-6)).all())
    assert bool((losses[0] < 0.9 * losses[1]).any())


def test_weights_of_one_are_no_weights() -> None:
    w = weights(5, 32)
    for scheme in (sign_scheme(2), Scheme(3, -1)):
        plain, ones = (grid.fit_levels(w, scheme, grid.Clip(), h) for h in (None, torch.ones(32)))
        assert torch.equal(plain.scales, ones.scales)
        assert torch.equal(plain.scales, grid.fit_levels(w, scheme, grid.Clip(), torch.zeros(32)).scales)


@pytest.mark.parametrize("weighting", ["none", "hessian"])
@pytest.mark.parametrize("order", ["natural", "gar"])
def test_gptq_on_a_diagonal_gram_rounds_to_nearest(weighting: str, order: str) -> None:
    w, scheme = weights(7, 45), sign_scheme(2, 16)
    diagonal = torch.rand(45, generator=torch.Generator().manual_seed(6)) + 0.1
    quantized = GPTQ(CLIP, order=order, weighting=weighting)(w, torch.diag(diagonal), scheme, "w").quantized
    for g, (start, stop) in enumerate(scheme.group_bounds(45)):
        h = diagonal[start:stop] if weighting == "hessian" else None
        levels = grid.fit_levels(w[:, start:stop], scheme, CLIP, h)
        dense = SignLevels(quantized.scales[:, 2 * g : 2 * g + 2]).decode(quantized.codes[:, start:stop])
        torch.testing.assert_close(dense, levels.decode(levels.encode(w[:, start:stop])), rtol=5e-3, atol=5e-3)


def test_hessian_weighting_lowers_the_output_error_of_gptq() -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(600, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    x[:, ::7] *= 6
    w, gram = torch.randn(48, 64, generator=generator), x.T @ x
    errors = []
    for weighting in ("none", "hessian"):
        quantized = GPTQ(CLIP, weighting=weighting)(w, gram, sign_scheme(2, 32), "w").quantized
        delta = w - PackedRange.pack(quantized, sign_scheme(2, 32)).dequantize()
        errors.append(float(((delta @ gram) * delta).sum()))
    assert errors[1] < errors[0]


def test_sign_schemes_that_make_no_sense_are_refused() -> None:
    for arguments in ((8, -1, "none"), (2, -1, "integer"), (3, -1, "real")):
        with pytest.raises(BadRecipe, match="sign grid"):
            Scheme(*arguments, grid="sign")
    with pytest.raises(BadRecipe, match="weighting is 'x'"):
        GPTQ(weighting="x")


def test_weights_that_are_not_finite_are_a_numerical_failure() -> None:
    w = weights(3, 16)
    w[2, 2] = torch.nan
    with pytest.raises(NumericalFailure, match="not finite"):
        grid.quantized(w, sign_scheme(2), CLIP)

"""Dual scales of D2Quant: both fits descend on the loss they state, and rest where it is least."""

from __future__ import annotations

import itertools

import pytest
import torch
from dual_scale_samples import (
    awkward,
    column_weights,
    columns_of,
    either_weighting,
    every_bits,
    every_kind,
    normal,
    rounded,
    scheme_of,
    spread,
)
from torch import Tensor

from subnibble.errors import BadRecipe, NumericalFailure
from subnibble.rounding import dual_scale, grid
from subnibble.rounding.dual_scale import DualScale, RowScale
from subnibble.rounding.levels import Fitted
from subnibble.tensor.scheme import Scheme


def loss(fitted: Fitted, w: Tensor, h: Tensor | None = None) -> float:
    error = (rounded(fitted, w) - w).double().square()
    return float((error if h is None else error * h).sum())


def relative_error(fitted: Fitted, w: Tensor) -> float:
    return loss(fitted, w) / float(w.double().square().sum())


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.1138), (3, 0.0349)])
def test_gaussian_rows_reach_the_known_error_of_the_released_form(bits: int, expected: float) -> None:
    w = normal(2000, 128)
    actual = relative_error(DualScale().fit(w, scheme_of("sign", bits, scale_type="float16"), None), w)
    assert actual == pytest.approx(expected, rel=0.01)


@every_kind
@every_bits
def test_columns_of_many_sizes_cost_no_more_than_equal_ones(kind: str, bits: int) -> None:
    """Without column scales they cost a third more or worse; where columns are equal the two fits are near."""
    scheme, equal = scheme_of(kind, bits, scale_type="float16"), normal(600, 128)
    many = equal * spread(128)
    dual = {name: relative_error(DualScale().fit(w, scheme, None), w) for name, w in (("=", equal), ("~", many))}
    rows = {name: relative_error(grid.Clip().fit(w, scheme, None), w) for name, w in (("=", equal), ("~", many))}
    assert dual["~"] < 1.01 * dual["="]
    assert dual["~"] < 0.82 * rows["~"]
    assert 0.93 * rows["="] < dual["="] < 1.001 * rows["="]


@every_kind
@every_bits
@either_weighting
def test_more_iterations_never_raise_the_loss(kind: str, bits: int, weighted: bool) -> None:
    w = awkward(seed=bits)
    h = column_weights(45) if weighted else None
    for scale_type, slack, steps in (("float32", 1e-5, (1, 2, 3, 4, 7, 15)), ("float16", 2e-3, (1, 15))):
        scheme = scheme_of(kind, bits, scale_type=scale_type)
        losses = [loss(DualScale(iterations=n).fit(w, scheme, h), w, h) for n in steps]
        for before, after in itertools.pairwise(losses):
            assert after <= before * (1 + slack)
        assert losses[-1] < 0.999 * losses[0]


@every_kind
def test_column_weights_lower_the_loss_they_weight(kind: str) -> None:
    w, h = awkward(64, 128), column_weights(128).square()
    scheme = scheme_of(kind)
    weighted, plain = (loss(DualScale().fit(w, scheme, weights), w, h) for weights in (h, None))
    assert weighted < 0.96 * plain


@every_kind
@pytest.mark.parametrize("constant", [1.0, 4.0, 0.0])
def test_equal_column_weights_are_no_weights(kind: str, constant: float) -> None:
    w, scheme = awkward(), scheme_of(kind, 3)
    plain = DualScale().fit(w, scheme, None)
    equal = DualScale().fit(w, scheme, torch.full((45,), constant))
    assert torch.equal(equal.levels.scales, plain.levels.scales)
    assert torch.equal(columns_of(equal), columns_of(plain))
    assert torch.equal(equal.encode(w), plain.encode(w))


@every_kind
def test_column_weights_have_no_unit(kind: str) -> None:
    w, h, scheme = awkward(), column_weights(45), scheme_of(kind)
    plain = DualScale().fit(w, scheme, h)
    for unit in (2.0**-60, 2.0**60):
        scaled = DualScale().fit(w, scheme, h * unit)
        assert torch.equal(scaled.levels.scales, plain.levels.scales)
        assert torch.equal(columns_of(scaled), columns_of(plain))


@pytest.mark.parametrize("zero_point", ["none", "integer", "real"])
def test_row_scales_alone_lie_between_the_clip_search_and_the_dual_scale(zero_point: str) -> None:
    """On columns of unequal size: least squares on rows helps, column scales help more."""
    generator = torch.Generator().manual_seed(11)
    w = torch.randn(400, 128, generator=generator) * torch.exp(0.35 * torch.randn(128, generator=generator))
    scheme = Scheme(2, -1, zero_point)
    losses = []
    for fitter in (grid.Clip(), RowScale(), DualScale()):
        fitted = fitter.fit(w, scheme, None)
        losses.append(float((fitted.decode(fitted.encode(w)) - w).square().sum()))
    assert RowScale().fit(w, scheme, None).column_scales is None
    assert losses[2] < 0.95 * losses[1]
    assert losses[1] <= losses[0] * 1.001


@every_kind
def test_inputs_stay_untouched_and_the_same_inputs_give_the_same_bytes(kind: str) -> None:
    w, h = awkward(), column_weights(45)
    kept = w.clone(), h.clone()
    first, second = (DualScale().fit(w, scheme_of(kind), h) for _ in range(2))
    assert torch.equal(first.levels.scales, second.levels.scales)
    assert torch.equal(columns_of(first), columns_of(second))
    assert torch.equal(w, kept[0])
    assert torch.equal(h, kept[1])


@pytest.mark.parametrize("iterations", [0, -3])
def test_no_iterations_are_a_bad_recipe(iterations: int) -> None:
    with pytest.raises(BadRecipe, match=f"iterations is {iterations}"):
        DualScale(iterations=iterations)


@every_kind
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_a_numerical_failure(kind: str, value: float) -> None:
    w = awkward()
    w[2, 2] = value
    with pytest.raises(NumericalFailure, match="not finite"):
        DualScale().fit(w, scheme_of(kind), None)


# The second writing of version R, with its signs spelled out.


def nearest_signs(w: Tensor, c: Tensor, r: Tensor) -> Tensor:
    """(m, b, g) of +-1: of the nearest of all 2**b values c_j * sum_k (+-r_k)."""
    bits = r.shape[1]
    choices = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=bits)), dtype=w.dtype)
    distance = (w.unsqueeze(1) - c * (r @ choices.T).unsqueeze(2)).abs()
    return choices[distance.argmin(1)].transpose(1, 2)


def version_r(w: Tensor, h: Tensor, bits: int, iterations: int, fault: str = "none") -> tuple[Tensor, Tensor]:
    """What elements are rounded to (m, g), and c (g,), with one planted fault (or "none")."""
    c = torch.ones_like(h) if fault == "starts at c = 1" else w.abs().mean(0)
    rest, scales = w, []
    for _ in range(bits):
        sign = torch.where(rest >= 0, 1.0, -1.0).to(w.dtype)
        scales.append((rest * sign * h * c).sum(1, keepdim=True) / (h * c * c).sum())
        rest = rest - scales[-1] * sign * c
    r = torch.cat(scales, 1)
    for _ in range(iterations):
        signs = nearest_signs(w, torch.ones_like(c) if fault == "codes without c" else c, r)
        if fault == "columns before rows":
            values = (r.unsqueeze(2) * signs).sum(1)
            c = (w * values).sum(0) / values.square().sum(0)
        row_c = torch.ones_like(c) if fault == "rows without c" else c
        row_h = torch.ones_like(h) if fault == "rows without h" else h
        basis, target = (signs * row_c * row_h.sqrt()).transpose(1, 2), (w * row_h.sqrt()).unsqueeze(2)
        if fault == "rows one bit at a time":
            r = torch.zeros_like(r)
            for k in range(bits):
                left = target[..., 0] - (basis * r.unsqueeze(1)).sum(2)
                r[:, k] = (basis[..., k] * left).sum(1) / basis[..., k].square().sum(1)
        else:
            r = torch.linalg.lstsq(basis, target).solution[..., 0]
        if fault != "columns before rows":
            values = (r.unsqueeze(2) * signs).sum(1)
            size = values.abs() if fault == "columns by absolute sums" else values.square()
            moment = w.abs() if fault == "columns by absolute sums" else w * values
            c = moment.sum(0) / size.sum(0)
        c, r = c.abs(), r.abs()
    dense = c * (r.unsqueeze(2) * nearest_signs(w, c, r)).sum(1)
    return dense, c / (c.mean() if fault == "arithmetic mean" else c.log().mean().exp())


def agree(actual: Fitted, expected: tuple[Tensor, Tensor], w: Tensor) -> bool:
    dense, c = expected
    near_dense = ((rounded(actual, w) - dense).abs() <= 1e-4 * w.abs().mean()).all()
    near_c = ((columns_of(actual) - c).abs() <= 1e-4 * c).all()
    return bool(near_dense) and bool(near_c)


@every_bits
@either_weighting
@pytest.mark.parametrize("iterations", [1, 2, 6])
def test_released_form_equals_a_second_writing(bits: int, weighted: bool, iterations: int) -> None:
    w = normal(20, 37, seed=bits).double() * spread(37)
    w[2, 4] *= 9
    h = column_weights(37).double() if weighted else torch.ones(37).double()
    result = DualScale(iterations=iterations).fit(w, scheme_of("sign", bits), h if weighted else None)
    assert agree(result, version_r(w, h, bits, iterations), w)


@every_bits
@pytest.mark.parametrize(
    "fault",
    [
        "starts at c = 1",
        "codes without c",
        "columns before rows",
        "rows without c",
        "rows without h",
        "rows one bit at a time",
        "columns by absolute sums",
        "arithmetic mean",
    ],
)
def test_second_writing_rejects_planted_fault(bits: int, fault: str) -> None:
    w, h = normal(20, 37, seed=bits).double() * spread(37), column_weights(37).double()
    result = DualScale(iterations=2).fit(w, scheme_of("sign", bits), h)
    assert agree(result, version_r(w, h, bits, 2), w)
    assert not agree(result, version_r(w, h, bits, 2, fault), w)


# Least squares.


def gradients(fitted: Fitted, w: Tensor, h: Tensor, faulty: float = 1.0) -> dict[str, float]:
    """Of the loss with the codes fixed, by each kind of parameter: the largest element, relative to the loss.

    Parameters are multiplied by exp(p), and p = 0 is where the gradient is taken. faulty: multiplies every other
    column scale first.
    """
    c, codes = columns_of(fitted).double(), fitted.encode(w)
    c[::2] *= faulty
    p_c = torch.zeros_like(c, requires_grad=True)
    scale = fitted.levels.scales.double()
    p_s = torch.zeros_like(scale, requires_grad=True)
    inputs = {"c": p_c, "scale": p_s}
    if isinstance(fitted.levels, grid.UniformLevels):
        zero = fitted.levels.zero.double()
        if fitted.levels.scheme.zero_point == "real":
            inputs["zero"] = zero = zero.requires_grad_(True)
        values = (codes - zero) * (scale * p_s.exp())
    else:
        bits = torch.arange(scale.shape[1]).unsqueeze(1)
        signs = ((codes.long().unsqueeze(1) >> bits) & 1) * 2.0 - 1
        values = torch.einsum("mk,mkg->mg", scale * p_s.exp(), signs.double())
    total = (h * (w - values * c * p_c.exp()).square()).sum()
    result = torch.autograd.grad(total, list(inputs.values()))
    return {name: float(g.abs().max() / total.detach()) for name, g in zip(inputs, result, strict=True)}


@every_kind
@every_bits
@either_weighting
def test_fit_at_rest_is_stationary_in_all_its_scales(kind: str, bits: int, weighted: bool) -> None:
    w = normal(12, 40, seed=4).double() * spread(40)
    h = column_weights(40).double() if weighted else torch.ones(40).double()
    fitted = DualScale(iterations=300).fit(w, scheme_of(kind, bits), h if weighted else None)
    assert all(size < 1e-4 for size in gradients(fitted, w, h).values())
    assert all(size > 1e-4 for size in gradients(fitted, w, h, faulty=1.01).values())


def test_column_scales_are_least_squares_and_stay_where_there_is_nothing_to_fit() -> None:
    w, values, old = normal(30, 17).double(), normal(30, 17, seed=5).double() + 0.2, torch.full((17,), 0.75).double()
    w = w + 2 * values
    w[:, 3] = 0
    values[:, 7] = 0
    c = dual_scale._column_scales(w, values, old)
    gradient = ((w - c * values) * values).sum(0)
    live = torch.ones(17, dtype=torch.bool)
    live[[3, 7]] = False
    assert bool((gradient.abs() <= 1e-12 * (w * values).abs().sum(0))[live].all())
    assert c[~live].tolist() == [0.75, 0.75]


@pytest.mark.parametrize("zero_point", ["real", "integer", "none"])
def test_refit_is_weighted_least_squares_and_keeps_the_grid_of_a_row_with_one_code(zero_point: str) -> None:
    scheme = Scheme(3, -1, zero_point, "float32")
    x, h = normal(11, 29).double() + 0.3, column_weights(29).double()
    scale, zero = (t.double() for t in grid.fit(x.float(), scheme, grid.Clip(), h.float()))
    codes = grid.encode(x, scale, zero, scheme)
    codes[4] = zero[4].round() if zero_point != "real" else 2
    s, z = dual_scale._refit(x, codes, h, scheme, (scale, zero))
    assert torch.equal(s[4], scale[4])
    assert torch.equal(z[4], zero[4])
    assert zero_point == "real" or torch.equal(z, zero)
    for row in (i for i in range(11) if i != 4):
        free = [codes[row], torch.ones(29).double()] if zero_point == "real" else [codes[row] - zero[row]]
        for weights, equal in ((h, True), (torch.ones(29).double(), False)):
            basis = torch.stack(free, 1) * weights.sqrt().unsqueeze(1)
            best = torch.linalg.lstsq(basis, (x[row] * weights.sqrt()).unsqueeze(1)).solution[:, 0]
            result = [float(s[row]), float(-s[row] * z[row])][: len(free)]
            assert (result == pytest.approx(best.tolist(), rel=1e-10)) is equal

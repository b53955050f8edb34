"""Column scales of D2Quant: both fits descend on the loss they state, and the column loop hands them back in place."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from subnibble.errors import BadRecipe, NumericalFailure
from subnibble.rounding import dual_scale, grid, sign_basis
from subnibble.rounding.dual_scale import DualScale, RowScale
from subnibble.rounding.gptq import GPTQ
from subnibble.rounding.levels import Fitted
from subnibble.rounding.order import ORDERS, ColumnPlan, plan_columns
from subnibble.scheme import Scheme
from subnibble.tensor import CodedMatrix, PackedRange, scale_dtype

KINDS = ("sign", "integer", "real", "none")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_order = pytest.mark.parametrize("order", ORDERS)
every_bits = pytest.mark.parametrize("bits", [2, 3])
either_weighting = pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])


def scheme_of(kind: str, bits: int = 2, group_size: int = -1, scale_type: str = "float32") -> Scheme:
    if kind == "sign":
        return Scheme(bits, group_size, "none", scale_type, grid="sign")
    return Scheme(bits, group_size, kind, scale_type)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(columns: int, seed: int = 1, sigma: float = 0.35) -> Tensor:
    """Log-normal column scales."""
    return (sigma * normal(columns, seed=seed)).exp()


def awkward(rows: int = 24, columns: int = 45, seed: int = 0) -> Tensor:
    """Signed, columns of many sizes, with outliers, a zero row, a constant row and a zero column."""
    w = normal(rows, columns, seed=seed) * spread(columns, seed + 1) * 0.1
    w[3, 5], w[5, columns - 2] = 1.9, -1.3
    w[0], w[1] = 0, -0.07
    w[:, 9] = 0
    return w


def column_weights(columns: int, seed: int = 2) -> Tensor:
    return normal(columns, seed=seed).exp()


def rounded(fitted: Fitted, w: Tensor) -> Tensor:
    return fitted.decode(fitted.encode(w))


def loss(fitted: Fitted, w: Tensor, h: Tensor | None = None) -> float:
    error = (rounded(fitted, w) - w).double().square()
    return float((error if h is None else error * h).sum())


def relative_error(fitted: Fitted, w: Tensor) -> float:
    return loss(fitted, w) / float(w.double().square().sum())


def columns_of(fitted: Fitted) -> Tensor:
    assert fitted.columns is not None
    return fitted.columns


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.1138), (3, 0.0349)])
def test_gaussian_rows_reach_the_known_error_of_the_released_form(bits: int, expected: float) -> None:
    w = normal(2000, 128)
    found = relative_error(DualScale().fit(w, scheme_of("sign", bits, scale_type="float16"), None), w)
    assert found == pytest.approx(expected, rel=0.01)


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
    given, plain = (loss(DualScale().fit(w, scheme, weights), w, h) for weights in (h, None))
    assert given < 0.96 * plain


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


def agree(found: Fitted, expected: tuple[Tensor, Tensor], w: Tensor) -> bool:
    dense, c = expected
    near_dense = ((rounded(found, w) - dense).abs() <= 1e-4 * w.abs().mean()).all()
    near_c = ((columns_of(found) - c).abs() <= 1e-4 * c).all()
    return bool(near_dense) and bool(near_c)


@every_bits
@either_weighting
@pytest.mark.parametrize("iterations", [1, 2, 6])
def test_released_form_equals_a_second_writing(bits: int, weighted: bool, iterations: int) -> None:
    w = normal(20, 37, seed=bits).double() * spread(37)
    w[2, 4] *= 9
    h = column_weights(37).double() if weighted else torch.ones(37).double()
    found = DualScale(iterations=iterations).fit(w, scheme_of("sign", bits), h if weighted else None)
    assert agree(found, version_r(w, h, bits, iterations), w)


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
    found = DualScale(iterations=2).fit(w, scheme_of("sign", bits), h)
    assert agree(found, version_r(w, h, bits, 2), w)
    assert not agree(found, version_r(w, h, bits, 2, fault), w)


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
    found = torch.autograd.grad(total, list(inputs.values()))
    return {name: float(g.abs().max() / total.detach()) for name, g in zip(inputs, found, strict=True)}


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
            found = [float(s[row]), float(-s[row] * z[row])][: len(free)]
            assert (found == pytest.approx(best.tolist(), rel=1e-10)) is equal


# What column scales are.


def groups() -> dict[str, Tensor]:
    zero_columns = awkward()
    zero_columns[:, ::2] = 0
    tiny = awkward()
    tiny[:, 4] *= 1e-6
    return {
        "awkward": awkward(),
        "every other column zero": zero_columns,
        "a tiny column": tiny,
        "all zero": torch.zeros(6, 16),
        "constant rows": torch.cat([torch.tensor([[0.5], [-2.0], [0.0]]).expand(3, 16), normal(4, 16)]),
        "one row": normal(1, 16),
        "one column": normal(16, 1),
        "one zero": torch.zeros(1, 1),
        "one column not zero": torch.eye(16)[:1] * normal(8, 1),
        "small": awkward() * 1e-3,
    }


@every_kind
@pytest.mark.parametrize("name", groups())
def test_column_scales_are_positive_with_geometric_mean_one(kind: str, name: str) -> None:
    w = groups()[name]
    h = column_weights(w.shape[1])
    if len(h) > 3:
        h[3] = 0
    for bits, scale_type, weights in ((2, "float16", None), (3, "bfloat16", h)):
        scheme = scheme_of(kind, bits, scale_type=scale_type)
        fitted = DualScale(iterations=5).fit(w, scheme, weights)
        c = columns_of(fitted)
        assert c.shape == (w.shape[1],)
        assert c.dtype == torch.float32
        assert bool((c > 0).all())
        assert float(c.double().log().mean()) == pytest.approx(0, abs=1e-5)
        codes = fitted.encode(w)
        assert torch.equal(codes, codes.round().clamp(0, scheme.levels - 1))
        assert bool(torch.isfinite(fitted.decode(codes)).all())
        scales = fitted.levels.scales
        assert torch.equal(scales, scales.to(scale_dtype(scheme)).float())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_groups_of_a_single_magnitude_are_met_by_the_sign_grid(bits: int) -> None:
    for columns, value in itertools.product((16, 32, 64, 128, 1024), (-0.3, 0.02, 0.5, 1.0)):
        for w in (torch.full((6, columns), value), normal(16, columns).sign() * value):
            fitted = DualScale().fit(w, scheme_of("sign", bits, scale_type="float16"), None)
            assert bool(((rounded(fitted, w) - w).abs() <= 1e-3 * w.abs()).all())


@every_kind
def test_zero_groups_stay_zero(kind: str) -> None:
    w = torch.zeros(5, 16)
    for scale_type, least in (("float16", 1e-6), ("float32", 1e-20)):
        fitted = DualScale().fit(w, scheme_of(kind, scale_type=scale_type), None)
        assert float(rounded(fitted, w).abs().max()) < least


@every_kind
def test_rows_proportional_to_each_other_are_met(kind: str) -> None:
    c = spread(16)
    w = c * torch.tensor([[1.0], [0.5], [2.0], [0.25]])
    fitted = DualScale().fit(w, scheme_of(kind), None)
    assert bool(((rounded(fitted, w) - w).abs() <= 1e-3 * w.abs()).all())
    if kind == "sign":
        torch.testing.assert_close(columns_of(fitted), c / c.log().mean().exp(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["sign", "integer", "none"])
def test_zero_columns_and_zero_rows_change_no_other_row(kind: str) -> None:
    w = normal(12, 32) * spread(32)
    taller = torch.cat([w, torch.zeros(3, 32)])
    alone, with_zeros = (DualScale().fit(group, scheme_of(kind), None) for group in (w, taller))
    torch.testing.assert_close(rounded(with_zeros, taller)[:12], rounded(alone, w), rtol=1e-4, atol=1e-5)


@every_bits
def test_columns_scaled_by_powers_of_two_scale_their_c(bits: int) -> None:
    """With weights divided by the squares, so that the loss is the same one; without, the rows would be other."""
    w, h = normal(16, 33).double(), column_weights(33).double()
    d = 2.0 ** torch.randint(-2, 3, (33,), generator=torch.Generator().manual_seed(3)).double()
    scheme = scheme_of("sign", bits)
    plain, scaled, other = (
        DualScale().fit(w * by, scheme, weights) for by, weights in ((1, h), (d, h / d.square()), (d, h))
    )
    expected = columns_of(plain) * d
    expected /= expected.log().mean().exp()
    torch.testing.assert_close(columns_of(scaled), expected, rtol=1e-5, atol=0, check_dtype=False)
    torch.testing.assert_close(rounded(scaled, w * d), rounded(plain, w) * d, rtol=1e-5, atol=1e-7)
    assert float((columns_of(other) / expected - 1).abs().max()) > 1e-3


@every_kind
def test_groups_scaled_by_a_power_of_two_keep_their_c(kind: str) -> None:
    w = awkward()[1:].double()
    plain, scaled = (DualScale().fit(w * by, scheme_of(kind), None) for by in (1, 2.0**-4))
    torch.testing.assert_close(columns_of(scaled), columns_of(plain), rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.levels.scales, plain.levels.scales * 2.0**-4, rtol=1e-6, atol=0)


def test_sign_grids_are_blind_to_the_signs_of_weights() -> None:
    w = normal(16, 33) * spread(33)
    flips = torch.where(normal(16, 33, seed=8) > 0, 1.0, -1.0)
    plain, flipped = (DualScale().fit(group, scheme_of("sign", 3), None) for group in (w, w * flips))
    assert torch.equal(columns_of(flipped), columns_of(plain))
    assert torch.equal(flipped.levels.scales, plain.levels.scales)
    torch.testing.assert_close(rounded(flipped, w * flips), rounded(plain, w) * flips, rtol=1e-6, atol=0)


@every_kind
@either_weighting
def test_the_order_of_columns_only_orders_their_scales(kind: str, weighted: bool) -> None:
    w = normal(16, 33).double() * spread(33)
    h = column_weights(33).double() if weighted else torch.ones(33).double()
    order = torch.randperm(33, generator=torch.Generator().manual_seed(9))
    plain, moved = DualScale().fit(w, scheme_of(kind), h), DualScale().fit(w[:, order], scheme_of(kind), h[order])
    torch.testing.assert_close(columns_of(moved), columns_of(plain)[order], rtol=1e-5, atol=0)
    assert torch.equal(moved.encode(w[:, order]), plain.encode(w)[:, order])


def rolls(rows: int, columns: int) -> Tensor:
    """Every row in every rotation: each column holds the same weights."""
    return torch.stack([row.roll(k) for row in normal(rows, columns) for k in range(columns)])


@every_kind
def test_columns_that_hold_the_same_weights_have_scale_one(kind: str) -> None:
    c = columns_of(DualScale().fit(rolls(5, 24).double(), scheme_of(kind, 3), None))
    torch.testing.assert_close(c, torch.ones(24), rtol=0, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_released_form_with_c_of_one_is_the_rows_only_fit(bits: int) -> None:
    w, scheme = rolls(5, 24), scheme_of("sign", bits)
    dual, rows = DualScale(iterations=sign_basis.ITERATIONS).fit(w, scheme, None), sign_basis.fit(w, scheme, None)
    torch.testing.assert_close(rounded(dual, w), rows.decode(rows.encode(w)), rtol=1e-4, atol=1e-5)


# Through the column loop.


def inputs(tokens: int = 300, columns: int = 45, seed: int = 1) -> Tensor:
    """Correlated, with an outlier channel and a quiet one."""
    x = normal(tokens, 6, seed=seed) @ normal(6, columns, seed=seed + 1)
    x += 0.3 * normal(tokens, columns, seed=seed + 2)
    x[:, 7] *= 12
    x[:, 11] *= 0.1
    return x.double()


def dense(coded: CodedMatrix, scheme: Scheme) -> Tensor:
    assert coded.columns is not None
    return PackedRange.pack(coded, scheme).dequantize() * coded.columns


def fit_groups(
    w: Tensor, plan: ColumnPlan, scheme: Scheme, h: Tensor | None, fault: str = "none"
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (m, k), column scales (k,) and weights (m, k) of each group fitted by itself, or with a planted fault."""
    codes, c, values = torch.empty_like(w), torch.empty(w.shape[1]), torch.empty_like(w)
    position = 0
    for _, columns in plan.groups:
        # Laid out as the column loop has it, so that sums run in the same order.
        group = w.T[columns].T
        fitted = DualScale().fit(group, scheme, None if h is None else h[columns])
        codes[:, columns], values[:, columns] = fitted.encode(group), rounded(fitted, group)
        here = columns.sort().values if fault == "sorted inside a group" else columns
        if fault == "in the order of the visit":
            here = torch.arange(position, position + len(columns))
        c[here] = columns_of(fitted)
        position += len(columns)
    return codes, c, values if fault == "none" else values / fit_groups(w, plan, scheme, h)[1] * c


def matches(coded: CodedMatrix, scheme: Scheme, expected: tuple[Tensor, Tensor, Tensor]) -> tuple[bool, bool]:
    """Whether codes and column scales agree exactly, and whether the weights do."""
    codes, c, values = expected
    assert coded.columns is not None
    exact = torch.equal(coded.codes.float(), codes) and torch.equal(coded.columns, c)
    return exact, torch.equal(dense(coded, scheme), values)


@every_kind
@pytest.mark.parametrize(
    ("order", "group_size", "weighting"),
    [("gar", 16, "none"), ("gar", 7, "hessian"), ("gar", -1, "hessian"), ("natural", 16, "hessian")],
)
def test_gptq_on_a_diagonal_gram_rounds_to_nearest_on_the_dual_grid(
    kind: str, order: str, group_size: int, weighting: str
) -> None:
    w = awkward(12)
    w[2, 16:32] = 0
    diagonal = column_weights(45, seed=6)
    scheme = scheme_of(kind, 2, group_size, "float16")
    plan = plan_columns(order, diagonal, scheme)
    coded = GPTQ(DualScale(), order=order, weighting=weighting)(w, torch.diag(diagonal), scheme, "w").coded
    assert coded.columns is not None
    assert coded.columns.shape == (45,)
    for start, stop in scheme.group_bounds(45):
        assert float(coded.columns[start:stop].log().mean()) == pytest.approx(0, abs=1e-5)
    h = diagonal if weighting == "hessian" else None
    assert matches(coded, scheme, fit_groups(w, plan, scheme, h)) == (True, True)


@every_kind
@pytest.mark.parametrize("fault", ["in the order of the visit", "sorted inside a group"])
def test_diagonal_gram_oracle_rejects_column_scales_left_in_gar_order(kind: str, fault: str) -> None:
    w, diagonal = awkward(12), column_weights(45, seed=6)
    scheme = scheme_of(kind, 2, 16)
    plan = plan_columns("gar", diagonal, scheme)
    coded = GPTQ(DualScale(), order="gar")(w, torch.diag(diagonal), scheme, "w").coded
    assert matches(coded, scheme, fit_groups(w, plan, scheme, None, fault)) == (False, False)


def columnwise(w: Tensor, gram: Tensor, plan: ColumnPlan, scheme: Scheme, fault: str = "none") -> tuple[Tensor, Tensor]:
    """Codes (m, k) and column scales (k,), one column at a time by explicit inverses, with a planted fault."""
    h = gram.clone()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    w, untouched = w.clone(), w.clone()
    codes, c = torch.empty_like(w), torch.empty(w.shape[1])
    left = plan.columns.tolist()
    for _, columns in plan.groups:
        source = untouched if fault == "grid of the original weights" else w
        fitted = DualScale().fit(source[:, columns].float(), scheme, None)
        c[columns] = columns_of(fitted)
        for place, j in enumerate(columns.tolist()):
            # The released program indexes in its block, which is right only where blocks are groups.
            index = place % 5 if fault == "index in the block" else place
            if fault == "index in the sorted group":
                index = int((columns < j).sum())
            codes[:, j : j + 1] = fitted.encode(w[:, j : j + 1], index)
            error = w[:, j : j + 1] - fitted.decode(codes[:, j : j + 1], index)
            if fault == "error in units of c":
                error = error / c[j]
            inverse = torch.linalg.inv(h[left][:, left])
            left = left[1:]
            w[:, left] -= error * inverse[0, 1:] / inverse[0, 0]
    return codes, c


def test_column_loop_equals_explicit_inverses_on_the_dual_grid_and_rejects_planted_faults() -> None:
    w, gram = awkward().double(), inputs().T @ inputs()
    for kind, order, group_size in (("sign", "gar", 16), ("integer", "gar", 16), ("real", "natural", 7)):
        scheme = scheme_of(kind, 3, group_size)
        plan = plan_columns(order, gram.diagonal(), scheme)
        coded = GPTQ(DualScale(), order=order, block=5)(w, gram, scheme, "w").coded
        assert coded.columns is not None
        expected = columnwise(w, gram, plan, scheme)
        assert torch.equal(coded.codes.double(), expected[0])
        torch.testing.assert_close(coded.columns, expected[1], rtol=1e-4, atol=0)
        if order == "gar":
            faults = ("grid of the original weights", "index in the block", "index in the sorted group")
            for fault in (*faults, "error in units of c"):
                assert not torch.equal(coded.codes.double(), columnwise(w, gram, plan, scheme, fault)[0]), fault


@every_kind
@pytest.mark.parametrize(("order", "group_size"), [("gar", 16), ("natural", -1)])
def test_blocks_do_not_matter_to_the_dual_grid(kind: str, order: str, group_size: int) -> None:
    w, gram = awkward(12).double(), inputs().T @ inputs()
    scheme = scheme_of(kind, 2, group_size)
    run = partial(GPTQ, DualScale(), order=order, weighting="hessian")
    single = run(block=1)(w, gram, scheme, "w").coded
    assert single.columns is not None
    for block in (5, 128):
        found = run(block=block)(w, gram, scheme, "w").coded
        assert found.columns is not None
        assert torch.equal(found.codes, single.codes)
        torch.testing.assert_close(found.columns, single.columns, rtol=1e-5, atol=0)


@every_kind
@every_order
def test_column_scales_lower_the_output_error_of_gptq_where_columns_differ(kind: str, order: str) -> None:
    x = inputs(columns=96, seed=10)
    w, gram = normal(64, 96) * spread(96, sigma=0.6), (x.T @ x).float()
    scheme = scheme_of(kind, 2, 32, "float16")
    plain, dual = (GPTQ(fitter, order=order)(w, gram, scheme, "w").coded for fitter in (grid.Clip(), DualScale()))
    errors = []
    for delta in (w - PackedRange.pack(plain, scheme).dequantize(), w - dense(dual, scheme)):
        errors.append(float(((delta @ gram) * delta).sum()))
    assert errors[1] < 0.85 * errors[0]


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
    assert RowScale().fit(w, scheme, None).columns is None
    assert losses[2] < 0.95 * losses[1]
    assert losses[1] <= losses[0] * 1.001

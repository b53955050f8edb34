"""What D2Quant's column scales are: positive with geometric mean one, and scaled and ordered as their columns are."""

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

from subnibble.rounding import sign_basis
from subnibble.rounding.dual_scale import DualScale, RowScale
from subnibble.tensor.packed import scale_dtype


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


@every_kind
@pytest.mark.parametrize("tiny", [1e-4, 1e-6, 1e-9, 1e-20, 1e-30])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.95])
def test_columns_that_are_next_to_nothing_leave_the_others_as_good(kind: str, tiny: float, share: float) -> None:
    w = normal(24, 60) * 0.05
    w[:, : round(share * 60)] *= tiny
    for bits in (2, 3):
        scheme = scheme_of(kind, bits, scale_type="float16")
        fitted, rows = DualScale().fit(w, scheme, None), RowScale().fit(w, scheme, None)
        c = columns_of(fitted)
        assert float(c.min()) >= (1 - 1e-5) * 2.0**-14
        assert float(c.max()) <= (1 + 1e-5) * 2.0**8
        errors = [float((rounded(one, w) - w).square().sum()) for one in (fitted, rows)]
        assert errors[0] <= 1.05 * errors[1]


@every_kind
@pytest.mark.parametrize("size", [1e-12, 1e-21, 1e-30, 1e-38])
def test_groups_too_small_for_their_squares_have_scales(kind: str, size: float) -> None:
    w = normal(6, 16) * size
    fitted = DualScale().fit(w, scheme_of(kind, 2, scale_type="float32"), None)
    assert bool(torch.isfinite(rounded(fitted, w)).all())
    assert bool((columns_of(fitted) > 0).all())


@pytest.mark.parametrize("bits", [2, 3])
def test_the_sign_fit_does_not_see_a_power_of_two(bits: int) -> None:
    w, scheme = awkward(), scheme_of("sign", bits)
    usual, small = DualScale().fit(w, scheme, None), DualScale().fit(w * 2.0**-70, scheme, None)
    assert torch.equal(columns_of(usual), columns_of(small))
    assert torch.equal(usual.levels.scales * 2.0**-70, small.levels.scales)


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
    plain, permuted = DualScale().fit(w, scheme_of(kind), h), DualScale().fit(w[:, order], scheme_of(kind), h[order])
    torch.testing.assert_close(columns_of(permuted), columns_of(plain)[order], rtol=1e-5, atol=0)
    assert torch.equal(permuted.encode(w[:, order]), plain.encode(w)[:, order])


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

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subnibble.errors import BadRecipe, NumericalFailure
from subnibble.rounding import grid
from subnibble.rounding.gptq import GPTQ, block_bounds, factorize, round_columns
from subnibble.rounding.order import ORDERS, ColumnPlan, plan_columns
from subnibble.tensor.packed import QuantizedMatrix
from subnibble.tensor.scheme import BITS, ZERO_POINTS, Scheme

WHERE = "model.layers.3.mlp.down_proj"
MINMAX, MSE = grid.Clip("minmax"), grid.Clip("mse")
every_clip = pytest.mark.parametrize("clip", [MINMAX, MSE], ids=lambda clip: clip.name)
every_order = pytest.mark.parametrize("order", ORDERS)
SCHEMES = [
    Scheme(2, 16, "integer"),
    Scheme(3, 7, "real"),
    Scheme(4, -1, "none", "bfloat16"),
    Scheme(3, 5, "integer", "float32"),
    Scheme(4, 30, "real", "float32"),
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)


def weights(rows: int = 9, columns: int = 53, seed: int = 0) -> Tensor:
    """Signed, with outliers; row 1 constant, columns 16..31 of row 2 zero."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1
    w[0, 5], w[3, columns - 2] = 1.9, -1.3
    w[1] = 0.37
    w[2, 16:32] = 0
    return w


def inputs(tokens: int = 400, columns: int = 53, seed: int = 1, common: int = 6) -> Tensor:
    """Correlated through a few directions they share, signed, with an outlier channel and a quiet one."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, common, generator=g) @ torch.randn(common, columns, generator=g)
    x += 0.3 * torch.randn(tokens, columns, generator=g)
    x[:, 7] *= 12
    x[:, 11] *= 1e-2
    return x


def gram_of(x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return x.to(dtype).T @ x.to(dtype)


def dense(quantized: QuantizedMatrix, scheme: Scheme) -> Tensor:
    middle = torch.full_like(quantized.scales, scheme.levels // 2)
    zeros = middle if quantized.zeros is None else quantized.zeros
    w = torch.empty(quantized.codes.shape)
    for g, (start, stop) in enumerate(scheme.group_bounds(w.shape[1])):
        part = (quantized.codes[:, start:stop].float() - zeros[:, g : g + 1]) * quantized.scales[:, g : g + 1]
        w[:, start:stop] = part
    return w


def output_error(weight: Tensor, quantized: QuantizedMatrix, scheme: Scheme, gram: Tensor) -> float:
    delta = (weight - dense(quantized, scheme)).double()
    return float(((delta @ gram.double()) * delta).sum())


def same(a: QuantizedMatrix, b: QuantizedMatrix) -> bool:
    zeros = a.zeros is b.zeros if a.zeros is None or b.zeros is None else torch.equal(a.zeros, b.zeros)
    return torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales) and zeros


def obq(
    weight: Tensor, gram: Tensor, plan: ColumnPlan, scheme: Scheme, clip: grid.Clip, damping: float = 0.01
) -> Tensor:
    """Codes (m, k) by an explicit inverse from which each column is eliminated once it is rounded."""
    w, h = weight.double().clone(), gram.double().clone()
    h += damping * h.diagonal().mean() * torch.eye(h.shape[0], dtype=h.dtype)
    inverse = torch.linalg.inv(h)
    codes = torch.full(w.shape, -1, dtype=torch.int64)
    left = torch.ones(w.shape[1], dtype=torch.bool)
    for _, columns in plan.groups:
        ascending = columns.sort().values
        scale, zero = grid.fit(w[:, ascending].float(), scheme, clip)
        for j in columns.tolist():
            q = grid.encode(w[:, j : j + 1], scale, zero, scheme)
            codes[:, j] = q[:, 0].long()
            error = (w[:, j] - grid.decode(q, scale, zero)[:, 0]) / inverse[j, j]
            left[j] = False
            w -= torch.where(left, error.unsqueeze(1) * inverse[j], 0)
            inverse = inverse - inverse[:, j : j + 1] * inverse[j : j + 1] / inverse[j, j]
    return codes


def columnwise(weight: Tensor, gram: Tensor, plan: ColumnPlan, scheme: Scheme, damping: float, fault: str) -> Tensor:
    """GPTQ written a second time, one column at a time, with one planted fault (or "none")."""
    order = plan.order
    if fault == "no damping":
        damping = 1e-9
    h = gram[order][:, order].clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    if fault == "u transposed":
        u = u.T
    if fault == "u not flipped":
        u = torch.linalg.inv(torch.linalg.cholesky(h))
    w = weight.double()[:, order]
    if fault == "gram in natural order":
        w = weight.double()
    untouched = w.clone()
    codes = torch.empty(w.shape, dtype=torch.int64)
    j = 0
    for _, columns in plan.groups:
        source = untouched if fault == "grid of the original weights" else w
        scale, zero = grid.fit(source[:, j : j + len(columns)].float(), scheme, MINMAX)
        for _ in columns:
            q = grid.encode(w[:, j : j + 1], scale, zero, scheme)
            codes[:, j] = q[:, 0].long()
            error = w[:, j] - grid.decode(q, scale, zero)[:, 0]
            if fault != "missing 1/u_jj":
                error = error / u[j, j]
            sign = 1 if fault == "sign" else -1
            first = j + 2 if fault == "next column skipped" else j + 1
            w[:, first:] += sign * error.unsqueeze(1) * u[j, first:]
            j += 1
    natural = torch.empty_like(codes)
    if fault == "permuted twice":
        return codes[:, order]
    natural[:, order] = codes
    return natural


@every_order
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_gptq_equals_rtn_on_diagonal_gram(order: str, bits: int, zero_point: str) -> None:
    w = weights()
    gram = torch.diag(torch.rand(53, generator=torch.Generator().manual_seed(2)) * 90 + 0.01)
    for group_size, clip, block in ((16, MINMAX, 1), (5, MINMAX, 128), (-1, MINMAX, 8), (16, MSE, 128)):
        scheme = Scheme(bits, group_size, zero_point)
        result = GPTQ(clip, order=order, block=block)(w, gram, scheme, WHERE).quantized
        rtn = grid.quantized(w, scheme, clip)
        assert torch.equal(result.codes, rtn.codes)
        # The sums of mse's errors depend on the order within a group, so that ranges that tie may differ.
        assert clip is MSE or same(result, rtn)


@every_order
@every_scheme
@every_clip
def test_cholesky_gptq_equals_obq_with_an_explicit_inverse(order: str, scheme: Scheme, clip: grid.Clip) -> None:
    for seed in range(2):
        w, gram = weights(seed=seed).double(), gram_of(inputs(seed=seed + 10))
        plan = plan_columns(order, gram.diagonal(), scheme)
        result = GPTQ(clip, damping=0.01, order=order, block=16)(w, gram, scheme, WHERE).quantized
        assert torch.equal(result.codes.long(), obq(w, gram, plan, scheme, clip))


@pytest.mark.parametrize(
    "fault",
    [
        "u transposed",
        "u not flipped",
        "missing 1/u_jj",
        "gram in natural order",
        "permuted twice",
        "grid of the original weights",
        "sign",
        "next column skipped",
        "no damping",
    ],
)
def test_obq_oracle_rejects_planted_fault(fault: str) -> None:
    scheme = Scheme(3, 16)
    w, gram = weights().double(), gram_of(inputs())
    plan = plan_columns("gar", gram.diagonal(), scheme)
    expected = obq(w, gram, plan, scheme, MINMAX)
    assert torch.equal(columnwise(w, gram, plan, scheme, 0.01, "none"), expected)
    assert not torch.equal(columnwise(w, gram, plan, scheme, 0.01, fault), expected)


@every_order
@every_scheme
def test_blocked_gptq_equals_one_column_at_a_time(order: str, scheme: Scheme) -> None:
    w, gram = weights(seed=5).double(), gram_of(inputs(seed=6))
    for clip, blocks in ((MINMAX, (2, 3, 7, 16, 20, 52, 53, 54)), (MSE, (5, 1000))):
        single = GPTQ(clip, order=order, block=1)(w, gram, scheme, WHERE).quantized
        for block in blocks:
            assert same(GPTQ(clip, order=order, block=block)(w, gram, scheme, WHERE).quantized, single)


@settings(deadline=None, max_examples=150)
@given(widths=st.lists(st.integers(1, 40), min_size=1, max_size=12), block=st.integers(1, 50))
def test_blocks_cover_all_columns_and_cut_no_group_that_starts_inside(widths: list[int], block: int) -> None:
    starts = [sum(widths[:i]) for i in range(len(widths) + 1)]
    groups = enumerate(torch.arange(a, b) for a, b in itertools.pairwise(starts))
    bounds = block_bounds(ColumnPlan(tuple(groups)), block)
    assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
    assert bounds[-1][1] == sum(widths)
    assert all(0 < stop - start <= block for start, stop in bounds)
    for start, stop in bounds:
        for first, end in itertools.pairwise(starts):
            assert not (start < first < stop) or end <= stop


@every_order
def test_factor_is_upper_and_squares_to_the_inverse_of_the_damped_gram(order: str) -> None:
    gram = gram_of(inputs())
    columns = plan_columns(order, gram.diagonal(), Scheme(4, 16)).order
    before = gram.clone()
    factor = factorize(gram, columns, 0.03, WHERE)
    assert torch.equal(gram, before)
    h = gram[columns][:, columns] + 0.03 * gram.diagonal().mean() * torch.eye(53, dtype=torch.float64)
    assert torch.equal(factor.u, factor.u.triu())
    assert bool((factor.u.diagonal() > 0).all())
    inverse = torch.linalg.inv(h)
    size = inverse.diagonal().sqrt()
    # Entry ij of an inverse is at most sqrt(ii jj): the bound is on every entry, not on the matrix.
    assert bool(((factor.u.T @ factor.u - inverse).abs() <= 1e-11 * torch.outer(size, size)).all())
    assert (factor.damping, factor.retries) == (0.03, 0)
    assert not bool(factor.dead.any())


@every_order
@pytest.mark.parametrize("zero_point", ["none", "integer"])
@every_clip
def test_dead_columns_get_zero_and_leave_the_live_ones_alone(order: str, zero_point: str, clip: grid.Clip) -> None:
    scheme = Scheme(3, -1, zero_point)
    x = inputs()
    dead = torch.zeros(53, dtype=torch.bool)
    dead[[0, 5, 20, 21, 52]] = True
    x[:, dead] = 0
    w, gram = weights(rows=7, seed=8).double(), gram_of(x)
    full = GPTQ(clip, order=order, block=8)(w, gram, scheme, WHERE).quantized
    live = GPTQ(clip, order=order, block=8)(w[:, ~dead], gram[~dead][:, ~dead], scheme, WHERE).quantized
    assert torch.equal(full.codes[:, ~dead], live.codes)
    assert torch.equal(full.scales, live.scales)
    assert torch.equal(dense(full, scheme)[:, dead], torch.zeros(7, 5))


@every_order
@every_scheme
def test_weights_of_dead_columns_change_nothing(order: str, scheme: Scheme) -> None:
    x = inputs()
    x[:, [3, 16, 50]] = 0
    w, gram = weights(), gram_of(x, torch.float32)
    other = w.clone()
    other[:, [3, 16, 50]] = torch.tensor([9.0, -4.0, 0.0])
    method = GPTQ(MSE, order=order)
    a, b = (method(each, gram, scheme, WHERE).quantized for each in (w, other))
    if not scheme.has_zero:
        # Codes of what is never fed follow its weights; nothing else does.
        codes = b.codes.clone()
        codes[:, [3, 16, 50]] = a.codes[:, [3, 16, 50]]
        b = replace(b, codes=codes)
    assert same(a, b)


def test_gram_without_any_input_gives_round_to_nearest() -> None:
    scheme = Scheme(4, 16)
    rounding = GPTQ()(weights(), torch.zeros(53, 53), scheme, WHERE)
    assert torch.equal(
        dense(rounding.quantized, scheme), dense(grid.quantized(weights(), scheme, GPTQ().fitter), scheme)
    )
    assert rounding.notes["damping_retries"] == 0


@every_order
def test_rank_deficient_gram_needs_no_more_than_its_damping(order: str) -> None:
    w, gram = weights(), gram_of(inputs(tokens=5), torch.float32)
    scheme = Scheme(3, 16)
    rounding = GPTQ(MSE, order=order)(w, gram, scheme, WHERE)
    assert rounding.notes == {"damping": 0.01, "damping_retries": 0}
    assert int(rounding.quantized.codes.max()) <= 7
    nearest = output_error(w, grid.quantized(w, scheme, MSE), scheme, gram)
    assert output_error(w, rounding.quantized, scheme, gram) < nearest


def indefinite(smallest: float) -> Tensor:
    """A symmetric matrix with mean diagonal 1 and one eigenvalue `smallest`; its diagonal is positive."""
    g = torch.Generator().manual_seed(4)
    basis = torch.linalg.qr(torch.randn(53, 53, generator=g, dtype=torch.float64)).Q
    values = torch.rand(53, generator=g, dtype=torch.float64) + 2.5
    values *= (53 - smallest) / values[1:].sum()
    values[0] = smallest
    gram = (basis * values) @ basis.T
    gram = (gram + gram.T) / 2
    assert float(gram.diagonal().min()) > 0
    return gram


@pytest.mark.parametrize(("smallest", "damping", "retries"), [(-0.005, 0.01, 0), (-0.05, 0.1, 1), (-0.5, 1.0, 2)])
def test_indefinite_gram_raises_the_damping_tenfold_and_counts(smallest: float, damping: float, retries: int) -> None:
    gram, scheme = indefinite(smallest), Scheme(4, 16)
    rounding = GPTQ(damping=0.01)(weights(), gram, scheme, WHERE)
    assert rounding.notes["damping_retries"] == retries
    assert rounding.notes["damping"] == pytest.approx(damping, rel=1e-12)
    again = GPTQ(damping=damping)(weights(), gram, scheme, WHERE)
    assert same(rounding.quantized, again.quantized)
    factor = factorize(gram, torch.arange(53), 0.01, WHERE)
    h = gram + factor.damping * gram.diagonal().mean() * torch.eye(53, dtype=torch.float64)
    assert bool(((factor.u @ h @ factor.u.T - torch.eye(53, dtype=torch.float64)).abs() < 1e-9).all())


@every_order
@pytest.mark.parametrize("cause", ["negative", "nan", "one nan", "inf"])
def test_hopeless_gram_is_a_numerical_failure_that_names_the_linear(order: str, cause: str) -> None:
    gram = indefinite(-1.5)
    if cause == "nan":
        gram = torch.full_like(gram, torch.nan)
    elif cause == "one nan":
        gram = indefinite(0.1)
        gram[4, 9] = gram[9, 4] = torch.nan
    elif cause == "inf":
        gram[3, 3] = torch.inf
    said = "damping 1 .*skip = true" if cause == "negative" else 'is not finite; use dtype = "float32"'
    with pytest.raises(NumericalFailure, match=f"^{re.escape(WHERE)}: .*{said}"):
        GPTQ(order=order)(weights(), gram, Scheme(4, -1), WHERE)


@every_order
@pytest.mark.parametrize("scheme", SCHEMES[:3], ids=lambda scheme: scheme.name)
@every_clip
def test_gptq_leaves_less_output_error_than_rtn_on_correlated_inputs(
    order: str, scheme: Scheme, clip: grid.Clip
) -> None:
    for seed in range(3):
        w, gram = weights(rows=33, seed=seed), gram_of(inputs(seed=seed + 20), torch.float32)
        compensated = GPTQ(clip, order=order)(w, gram, scheme, WHERE).quantized
        nearest = output_error(w, grid.quantized(w, scheme, clip), scheme, gram)
        assert output_error(w, compensated, scheme, gram) < 0.9 * nearest


@every_order
@every_scheme
def test_the_same_inputs_give_the_same_codes_and_stay_untouched(order: str, scheme: Scheme) -> None:
    w, gram = weights(), gram_of(inputs(), torch.float32)
    kept = w.clone(), gram.clone()
    first, second = (GPTQ(order=order)(w, gram, scheme, WHERE).quantized for _ in range(2))
    assert same(first, second)
    assert torch.equal(w, kept[0])
    assert torch.equal(gram, kept[1])
    assert first.codes.dtype == torch.uint8
    assert first.codes.is_contiguous()
    assert int(first.codes.max()) < scheme.levels
    assert first.scales.shape == (9, scheme.groups(53))
    assert (first.zeros is None) == (scheme.zero_point == "none")


def test_a_single_column_and_a_single_row_are_rounded_to_nearest() -> None:
    scheme = Scheme(4, -1)
    w = weights(5, 40)[:, :1]
    assert same(GPTQ()(w, torch.tensor([[3.0]]), scheme, WHERE).quantized, grid.quantized(w, scheme, MSE))
    row, gram = weights()[:1].double(), gram_of(inputs())
    plan = plan_columns("gar", gram.diagonal(), scheme)
    result = GPTQ()(row, gram, scheme, WHERE).quantized.codes
    assert torch.equal(result.long(), obq(row, gram, plan, scheme, MSE))


def test_stacked_rows_are_rounded_as_alone() -> None:
    scheme = Scheme(3, 16)
    w, gram = weights().double(), gram_of(inputs())
    plan = plan_columns("gar", gram.diagonal(), scheme)
    factor = factorize(gram, plan.order, 0.01, WHERE)
    whole = round_columns(w, factor, plan, scheme, GPTQ(MSE))
    for row in range(9):
        alone = round_columns(w[row : row + 1], factor, plan, scheme, GPTQ(MSE))
        assert torch.equal(alone.codes[0], whole.codes[row])


def test_bad_settings_are_bad_recipes_and_a_missing_gram_names_the_linear() -> None:
    for damping in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(BadRecipe, match="damping"):
            GPTQ(damping=damping)
    with pytest.raises(BadRecipe, match="natural, gar"):
        GPTQ(order="act")
    with pytest.raises(BadRecipe, match="block"):
        GPTQ(block=0)
    with pytest.raises(ValueError, match=re.escape(WHERE)):
        GPTQ()(weights(), None, Scheme(4), WHERE)

"""Dual grids in the column loop of GPTQ: fitted a group at a time, and column scales handed back in place."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dual_scale_samples import awkward, column_weights, columns_of, every_kind, normal, rounded, scheme_of, spread
from torch import Tensor

from subnibble.rounding import grid
from subnibble.rounding.dual_scale import DualScale
from subnibble.rounding.gptq import GPTQ
from subnibble.rounding.order import ORDERS, ColumnPlan, plan_columns
from subnibble.tensor.packed import PackedRange, QuantizedMatrix
from subnibble.tensor.scheme import Scheme

every_order = pytest.mark.parametrize("order", ORDERS)


def inputs(tokens: int = 300, columns: int = 45, seed: int = 1) -> Tensor:
    """Correlated, with an outlier channel and a quiet one."""
    x = normal(tokens, 6, seed=seed) @ normal(6, columns, seed=seed + 1)
    x += 0.3 * normal(tokens, columns, seed=seed + 2)
    x[:, 7] *= 12
    x[:, 11] *= 0.1
    return x.double()


def dense(quantized: QuantizedMatrix, scheme: Scheme) -> Tensor:
    assert quantized.column_scales is not None
    return PackedRange.pack(quantized, scheme).dequantize() * quantized.column_scales


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


def matches(quantized: QuantizedMatrix, scheme: Scheme, expected: tuple[Tensor, Tensor, Tensor]) -> tuple[bool, bool]:
    """Whether codes and column scales agree exactly, and whether the weights do."""
    codes, c, values = expected
    assert quantized.column_scales is not None
    exact = torch.equal(quantized.codes.float(), codes) and torch.equal(quantized.column_scales, c)
    return exact, torch.equal(dense(quantized, scheme), values)


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
    quantized = GPTQ(DualScale(), order=order, weighting=weighting)(w, torch.diag(diagonal), scheme, "w").quantized
    assert quantized.column_scales is not None
    assert quantized.column_scales.shape == (45,)
    for start, stop in scheme.group_bounds(45):
        assert float(quantized.column_scales[start:stop].log().mean()) == pytest.approx(0, abs=1e-5)
    h = diagonal if weighting == "hessian" else None
    assert matches(quantized, scheme, fit_groups(w, plan, scheme, h)) == (True, True)


@every_kind
@pytest.mark.parametrize("fault", ["in the order of the visit", "sorted inside a group"])
def test_diagonal_gram_oracle_rejects_column_scales_left_in_gar_order(kind: str, fault: str) -> None:
    w, diagonal = awkward(12), column_weights(45, seed=6)
    scheme = scheme_of(kind, 2, 16)
    plan = plan_columns("gar", diagonal, scheme)
    quantized = GPTQ(DualScale(), order="gar")(w, torch.diag(diagonal), scheme, "w").quantized
    assert matches(quantized, scheme, fit_groups(w, plan, scheme, None, fault)) == (False, False)


def columnwise(w: Tensor, gram: Tensor, plan: ColumnPlan, scheme: Scheme, fault: str = "none") -> tuple[Tensor, Tensor]:
    """Codes (m, k) and column scales (k,), one column at a time by explicit inverses, with a planted fault."""
    h = gram.clone()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    w, untouched = w.clone(), w.clone()
    codes, c = torch.empty_like(w), torch.empty(w.shape[1])
    left = plan.order.tolist()
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
        quantized = GPTQ(DualScale(), order=order, block=5)(w, gram, scheme, "w").quantized
        assert quantized.column_scales is not None
        expected = columnwise(w, gram, plan, scheme)
        assert torch.equal(quantized.codes.double(), expected[0])
        torch.testing.assert_close(quantized.column_scales, expected[1], rtol=1e-4, atol=0)
        if order == "gar":
            faults = ("grid of the original weights", "index in the block", "index in the sorted group")
            for fault in (*faults, "error in units of c"):
                assert not torch.equal(quantized.codes.double(), columnwise(w, gram, plan, scheme, fault)[0]), fault


@every_kind
@pytest.mark.parametrize(("order", "group_size"), [("gar", 16), ("natural", -1)])
def test_blocks_do_not_matter_to_the_dual_grid(kind: str, order: str, group_size: int) -> None:
    w, gram = awkward(12).double(), inputs().T @ inputs()
    scheme = scheme_of(kind, 2, group_size)
    run = partial(GPTQ, DualScale(), order=order, weighting="hessian")
    single = run(block=1)(w, gram, scheme, "w").quantized
    assert single.column_scales is not None
    for block in (5, 128):
        result = run(block=block)(w, gram, scheme, "w").quantized
        assert result.column_scales is not None
        assert torch.equal(result.codes, single.codes)
        torch.testing.assert_close(result.column_scales, single.column_scales, rtol=1e-5, atol=0)


@every_kind
@every_order
def test_column_scales_lower_the_output_error_of_gptq_where_columns_differ(kind: str, order: str) -> None:
    x = inputs(columns=96, seed=10)
    w, gram = normal(64, 96) * spread(96, sigma=0.6), (x.T @ x).float()
    scheme = scheme_of(kind, 2, 32, "float16")
    plain, dual = (GPTQ(fitter, order=order)(w, gram, scheme, "w").quantized for fitter in (grid.Clip(), DualScale()))
    errors = []
    for delta in (w - PackedRange.pack(plain, scheme).dequantize(), w - dense(dual, scheme)):
        errors.append(float(((delta @ gram) * delta).sum()))
    assert errors[1] < 0.85 * errors[0]

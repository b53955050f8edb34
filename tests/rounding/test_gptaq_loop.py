"""The column loop of GPTAQ equals explicit inverses, and blocks matter to its released form alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gptaq_samples import (
    IN_LOOP,
    MINMAX,
    K,
    damped,
    dead_inputs,
    drifted,
    every_order,
    every_scheme,
    inputs,
    normal,
    pushed,
    same,
    statistics,
    weights,
)
from torch import Tensor

from subnibble.rounding.gptaq import FORMS
from subnibble.rounding.order import ColumnPlan, plan_columns
from subnibble.tensor.scheme import Scheme


def eliminated(
    w: Tensor, gram: Tensor, drift: Tensor, plan: ColumnPlan, scheme: Scheme, form: str, alpha: float, block: int
) -> Tensor:
    """Codes (m, k) by explicit inverses of what is left, no factor and no P.

    `released` takes blocks to be `block` columns each, the last one shorter: groups of as many, or one group.
    """
    h, dead = damped(gram), gram.diagonal() == 0
    original, w = w.clone(), w.clone()
    w[:, dead] = 0
    codes = torch.full(w.shape, -1, dtype=torch.int64)
    left, position = plan.order.tolist(), 0
    for _, columns in plan.groups:
        fitted = MINMAX.fit(w[:, columns].float(), scheme, None)
        for j in columns.tolist():
            before = original[:, j] if dead[j] and form != "released" else w[:, j].clone()
            inverse = torch.linalg.inv(h[left][:, left])
            left = left[1:]
            code = fitted.encode(w[:, j : j + 1])
            codes[:, j] = code[:, 0].long()
            value = fitted.decode(code)[:, 0].double()
            w[:, left] -= (w[:, j] - value).unsqueeze(1) * inverse[0, 1:] / inverse[0, 0]
            if left:
                share = alpha * drift[j, left] @ torch.linalg.inv(h[left][:, left])
                source = before.unsqueeze(1).expand(-1, len(left)).clone()
                if form == "released":
                    source[:, (position // block + 1) * block - position - 1 :] = value.unsqueeze(1)
                w[:, left] += source * share
            position += 1
    return codes


def columnwise(
    w: Tensor, gram: Tensor, drift: Tensor, plan: ColumnPlan, scheme: Scheme, alpha: float, fault: str
) -> Tensor:
    """Codes (m, k) of `corrected` with the published P, in one block, with one planted fault (or "none")."""
    order = plan.order
    h, r = damped(gram)[order][:, order], drift[order][:, order]
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    if fault == "drift in natural order":
        r = drift
    if fault == "drift with its rows in natural order":
        r = drift[:, order]
    if fault == "drift transposed":
        r = r.T
    p = alpha * (r @ u.T).triu(0 if fault == "P not strictly upper" else 1) @ u
    if fault == "P cut last":
        p = alpha * (r @ u.T @ u).triu(1)
    if fault == "sign":
        p = -p
    if fault == "alpha twice":
        p = alpha * p
    if fault == "undamped factor in P":
        v = torch.linalg.cholesky(torch.linalg.inv(gram[order][:, order]), upper=True)
        p = alpha * (r @ v.T).triu(1) @ v
    w = w[:, order].clone()
    codes, j = torch.empty(w.shape, dtype=torch.int64), 0
    for _, columns in plan.groups:
        fitted = MINMAX.fit(w[:, j : j + len(columns)].float(), scheme, None)
        for _ in columns:
            before = w[:, j : j + 1].clone()
            code = fitted.encode(w[:, j : j + 1])
            codes[:, j] = code[:, 0].long()
            value = fitted.decode(code).double()
            if fault == "pushed by the rounded weight":
                before = value
            if fault == "pushed by the rounding error":
                before = before - value
            error = w[:, j : j + 1] - value
            w[:, j + 1 :] -= error / u[j, j] * u[j, j + 1 :]
            first = j + 2 if fault == "next column skipped" else j + 1
            w[:, first:] += before * p[j, first:]
            j += 1
    natural = torch.empty_like(codes)
    natural[:, order] = codes
    return natural


ORACLE_SCHEMES = [
    (Scheme(3, 16), 16),
    (Scheme(2, 16, "none", "float32", grid="sign"), 16),
    (Scheme(4, -1, "real", "float32"), 20),
]


@every_order
@pytest.mark.parametrize("form", IN_LOOP)
@pytest.mark.parametrize(("scheme", "block"), ORACLE_SCHEMES, ids=["int3", "sign2", "real4"])
def test_column_loop_equals_explicit_inverses(order: str, form: str, scheme: Scheme, block: int) -> None:
    x = inputs(seed=5)
    gram, drift = statistics(x, drifted(x))
    plan = plan_columns(order, gram.diagonal(), scheme)
    w = weights()
    if scheme.grid == "sign":
        # A constant row has two levels in one place, and which code it gets there is rounding noise.
        w[1] = normal(K, seed=9)
    for alpha in (1.0, 0.25):
        actual = pushed(form, alpha, order=order, block=block)(w, gram, scheme, "w", drift).quantized
        expected = eliminated(w, gram, drift, plan, scheme, form, alpha, block)
        assert torch.equal(actual.codes.long(), expected)


@pytest.mark.parametrize(
    "fault",
    [
        "drift transposed",
        "drift in natural order",
        "drift with its rows in natural order",
        "P not strictly upper",
        "P cut last",
        "sign",
        "alpha twice",
        "undamped factor in P",
        "pushed by the rounded weight",
        "pushed by the rounding error",
        "next column skipped",
    ],
)
def test_explicit_inverses_reject_planted_fault(fault: str) -> None:
    scheme, alpha = Scheme(3, 16, "integer", "float32"), 0.5
    x = inputs(seed=5)
    gram, drift = statistics(x, drifted(x))
    plan = plan_columns("gar", gram.diagonal(), scheme)
    expected = eliminated(weights(), gram, drift, plan, scheme, "corrected", alpha, 1000)
    assert torch.equal(columnwise(weights(), gram, drift, plan, scheme, alpha, "none"), expected)
    assert not torch.equal(columnwise(weights(), gram, drift, plan, scheme, alpha, fault), expected)


def test_the_forms_are_different_methods() -> None:
    x = inputs()
    gram, drift = statistics(x, drifted(x))
    result = [pushed(form, block=16)(weights(), gram, Scheme(3, 16), "w", drift).quantized for form in FORMS]
    assert not any(same(a, b) for i, a in enumerate(result) for b in result[:i])


@every_order
@every_scheme
@pytest.mark.parametrize("form", ["corrected", "shifted"])
def test_blocks_do_not_matter(order: str, scheme: Scheme, form: str) -> None:
    x = inputs(seed=6)
    gram, drift = statistics(x, drifted(x))
    run = partial(pushed, form, order=order)
    single = run(block=1)(weights(seed=5), gram, scheme, "w", drift).quantized
    for block in (3, 16, 20, 1000):
        assert same(run(block=block)(weights(seed=5), gram, scheme, "w", drift).quantized, single)


@every_order
@every_scheme
def test_released_form_differs_from_the_corrected_one_only_across_blocks(order: str, scheme: Scheme) -> None:
    x = inputs(seed=6)
    gram, drift = statistics(x, drifted(x))
    for block, equal in ((K, True), (1000, True), (16, False), (1, False)):
        released, corrected = (
            pushed(form, order=order, block=block)(weights(), gram, scheme, "w", drift).quantized
            for form in ("released", "corrected")
        )
        assert same(released, corrected) is equal


@every_order
@pytest.mark.parametrize("form", IN_LOOP)
def test_column_loop_with_dead_columns_equals_explicit_inverses(order: str, form: str) -> None:
    x, full = dead_inputs([0, 5, 20, 21, K - 1])
    gram, drift = statistics(x, full)
    scheme = Scheme(3, 16)
    plan = plan_columns(order, gram.diagonal(), scheme)
    result = pushed(form, order=order, block=1000)(weights(), gram, scheme, "w", drift).quantized
    assert torch.equal(result.codes.long(), eliminated(weights(), gram, drift, plan, scheme, form, 1.0, 1000))

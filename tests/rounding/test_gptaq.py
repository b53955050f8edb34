"""GPTAQ: what it adds vanishes without drift, follows its equations otherwise, and has the loss it claims to have."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from subnibble.errors import BadRecipe
from subnibble.rounding import grid
from subnibble.rounding.gptaq import FORMS, Asymmetry, Push
from subnibble.rounding.gptq import GPTQ, factorize
from subnibble.rounding.order import ORDERS, ColumnPlan, plan_columns
from subnibble.scheme import Scheme
from subnibble.tensor import CodedMatrix, PackedRange

K = 53
DAMPING = 0.01
MINMAX, MSE = grid.Clip("minmax"), grid.Clip("mse")
IN_LOOP = ("released", "corrected", "original")
ACTIVE = (*IN_LOOP, "shifted")
every_form = pytest.mark.parametrize("form", ACTIVE)
every_order = pytest.mark.parametrize("order", ORDERS)
SCHEMES = [
    Scheme(2, 16, "integer"),
    Scheme(3, 7, "real"),
    Scheme(4, -1, "none", "bfloat16"),
    Scheme(3, 16, "none", "float32", grid="sign"),
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(rows: int = 9, columns: int = K, seed: int = 0) -> Tensor:
    """Signed, with outliers; row 1 constant, columns 16..31 of row 2 zero."""
    w = normal(rows, columns, seed=seed) * 0.1
    w[0, 5], w[3, columns - 2] = 1.9, -1.3
    w[1] = 0.37
    w[2, 16:32] = 0
    return w


def inputs(tokens: int = 400, columns: int = K, seed: int = 1) -> Tensor:
    """Correlated through a few directions they share, signed, with an outlier channel and a quiet one."""
    x = normal(tokens, 6, seed=seed) @ normal(6, columns, seed=seed + 50)
    x += 0.3 * normal(tokens, columns, seed=seed + 100)
    x[:, 7] *= 12
    x[:, 11] *= 0.1
    return x


def linear_map(columns: int = K, size: float = 0.3, seed: int = 3) -> Tensor:
    """Near the identity."""
    return torch.eye(columns, dtype=torch.float64) + size / columns**0.5 * normal(columns, columns, seed=seed)


def drifted(x: Tensor, seed: int = 3) -> Tensor:
    """Full-precision inputs: a linear function of x, and noise."""
    return x @ linear_map(x.shape[1], seed=seed) + 0.05 * normal(*x.shape, seed=seed + 1)


def statistics(x: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrix sum x xᵀ and drift sum (x~ - x) xᵀ."""
    return x.T @ x, (full - x).T @ x


def dense(coded: CodedMatrix, scheme: Scheme) -> Tensor:
    return PackedRange.pack(coded, scheme).dequantize().double()


def same(a: CodedMatrix, b: CodedMatrix) -> bool:
    zeros = a.zeros is b.zeros if a.zeros is None or b.zeros is None else torch.equal(a.zeros, b.zeros)
    return torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales) and zeros


def pushed(form: str, alpha: float = 1.0, clip: grid.Clip = MINMAX, **settings: object) -> GPTQ:
    return GPTQ(clip, DAMPING, asymmetry=Asymmetry(form, alpha), **settings)  # type: ignore[arg-type]


def damped(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """With what GPTQ adds to the diagonal, columns that are never fed included."""
    h, live = gram.clone(), gram.diagonal() > 0
    mean = h.diagonal()[live].mean()
    h.diagonal()[~live] = mean
    h.diagonal().add_(damping * mean)
    return h


def output_error(w: Tensor, q: Tensor, x: Tensor, full: Tensor) -> float:
    return float((full @ w.T - x @ q.T).square().sum())


# Without drift.


@every_form
@every_scheme
@pytest.mark.parametrize(("order", "dtype"), [("gar", torch.float32), ("natural", torch.float64)])
def test_alpha_zero_and_zero_drift_are_gptq(form: str, scheme: Scheme, order: str, dtype: torch.dtype) -> None:
    x = inputs()
    gram, drift = (matrix.to(dtype) for matrix in statistics(x, drifted(x)))
    w = weights().float()
    plain = GPTQ(MINMAX, DAMPING, order, 16)(w, gram, scheme, "w").coded
    run = partial(pushed, form, order=order, block=16)
    assert same(run(0.0)(w, gram, scheme, "w", drift).coded, plain)
    assert same(run(1.0)(w, gram, scheme, "w", torch.zeros_like(drift)).coded, plain)
    assert not same(run(1.0)(w, gram, scheme, "w", drift).coded, plain)


@every_order
def test_without_a_form_drift_is_not_read(order: str) -> None:
    x = inputs()
    gram, drift = statistics(x, drifted(x))
    plain, ignored = GPTQ(order=order), pushed("none", clip=grid.Clip(), order=order)
    assert not plain.needs_drift
    assert not ignored.needs_drift
    scheme = Scheme(3, 16)
    expected = plain(weights(), gram, scheme, "w").coded
    assert same(ignored(weights(), gram, scheme, "w", drift * torch.nan).coded, expected)


# The equations.


@every_order
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_propagation_is_the_drift_through_the_inverse_of_what_lies_behind(order: str, alpha: float) -> None:
    x = inputs()
    gram, drift = statistics(x, drifted(x))
    columns = plan_columns(order, gram.diagonal(), Scheme(4, 16)).columns
    h, r = damped(gram)[columns][:, columns], drift[columns][:, columns]
    u = factorize(gram, columns, DAMPING, "w").u

    def agrees(found: Tensor) -> bool:
        near = torch.equal(found, found.triu(1))
        for q in range(K - 1):
            inverse = torch.linalg.inv(h[q + 1 :, q + 1 :])
            # Of every entry, not of the matrix: what its own sum could have lost.
            size = r[q, q + 1 :].abs() @ inverse.abs()
            expected = alpha * r[q, q + 1 :] @ inverse
            near &= bool(((found[q, q + 1 :] - expected).abs() <= 1e-11 * size).all())
        return near

    asymmetry = Asymmetry("original", alpha)
    assert agrees(Push(r, asymmetry).propagation(u))
    faults = {
        "drift transposed": Push(r.T.contiguous(), asymmetry).propagation(u),
        "factor transposed": Push(r, asymmetry).propagation(u.T),
        "not strictly upper": (r @ u.T).triu() @ u * alpha,
        "not cut at all": r @ u.T @ u * alpha,
        "lower": (r @ u.T).tril(-1) @ u * alpha,
        "sign": -Push(r, asymmetry).propagation(u),
        "a tenth of a percent": Push(r * 1.001, asymmetry).propagation(u),
    }
    assert [name for name, p in faults.items() if agrees(p)] == []


@pytest.mark.parametrize("damping", [0.0, DAMPING, 0.5])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_shifted_weights_have_the_asymmetric_loss_up_to_a_constant(damping: float, alpha: float) -> None:
    """tr[(W* - Q) (H + d) (W* - Q)ᵀ] - ||W x~ - Q x||² - d ||W - Q||² is one number for all Q."""
    x = inputs()
    full = drifted(x)
    gram, drift = statistics(x, full)
    w = weights()
    u = factorize(gram, torch.arange(K), damping, "w").u
    extra = damping * float(gram.diagonal().mean())
    h = gram + extra * torch.eye(K, dtype=torch.float64)
    guesses = [w + size * normal(*w.shape, seed=30 + i) for i, size in enumerate((0.0, 0.1, 1.0, 0.1, 5.0))]

    def constant(target: Tensor) -> bool:
        gaps = []
        for q in guesses:
            delta = target - q
            wanted = output_error(w, q, x, x + alpha * (full - x)) + extra * float((w - q).square().sum())
            gaps.append(float(((delta @ h) * delta).sum()) - wanted)
        largest = max(output_error(w, q, x, full) for q in guesses)
        return max(gaps) - min(gaps) <= 1e-10 * largest

    def shifted(r: Tensor, by: Tensor = u, share: float = alpha) -> Tensor:
        return Push(r, Asymmetry("shifted", share)).shifted(w.T, by).T

    right = shifted(drift)
    torch.testing.assert_close(right, w + alpha * w @ drift @ torch.linalg.inv(h), rtol=1e-8, atol=1e-9)
    assert constant(right)
    faults = {
        "not shifted": w,
        "drift transposed": shifted(drift.T),
        "sign": shifted(-drift),
        "factor transposed": shifted(drift, u.T),
        "share": shifted(drift, share=alpha / 2),
    }
    if damping:
        faults["drift past the damping"] = alpha * w @ (gram + drift) @ torch.linalg.inv(h) + (1 - alpha) * w
        faults["no damping"] = shifted(drift, factorize(gram, torch.arange(K), 0.0, "w").u)
    assert [name for name, target in faults.items() if constant(target)] == []


def test_shifted_weights_without_drift_are_the_weights() -> None:
    gram = inputs().T @ inputs()
    u = factorize(gram, torch.arange(K), 0.3, "w").u
    w = weights().T.contiguous()
    assert torch.equal(Push(torch.zeros(K, K, dtype=torch.float64), Asymmetry("shifted", 1.0)).shifted(w, u), w)


@every_order
@every_scheme
def test_shifted_form_equals_gptq_of_the_weights_seen_through_a_linear_map(order: str, scheme: Scheme) -> None:
    """With x~ = A x nothing is lost: W x~ = (W A) x."""
    x, a = inputs(), linear_map()
    gram, drift = statistics(x, x @ a.T)
    tiny = 1e-9
    found = GPTQ(MSE, tiny, order, asymmetry=Asymmetry("shifted", 1.0))(weights(), gram, scheme, "w", drift).coded
    assert torch.equal(found.codes, GPTQ(MSE, tiny, order)(weights() @ a, gram, scheme, "w").coded.codes)
    assert not torch.equal(found.codes, GPTQ(MSE, tiny, order)(weights() @ a.T, gram, scheme, "w").coded.codes)


# The column loop.


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
    left, position = plan.columns.tolist(), 0
    for _, columns in plan.groups:
        fitted = MINMAX.fit(w[:, columns].float(), scheme, None)
        for j in columns.tolist():
            before = original[:, j] if form == "original" or (dead[j] and form != "released") else w[:, j].clone()
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
    w: Tensor, gram: Tensor, drift: Tensor, plan: ColumnPlan, scheme: Scheme, form: str, alpha: float, fault: str
) -> Tensor:
    """Codes (m, k) with the published P, in one block, with one planted fault (or "none")."""
    order = plan.columns
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
    original, codes, j = w.clone(), torch.empty(w.shape, dtype=torch.int64), 0
    for _, columns in plan.groups:
        fitted = MINMAX.fit(w[:, j : j + len(columns)].float(), scheme, None)
        for _ in columns:
            before = original[:, j : j + 1] if form == "original" else w[:, j : j + 1].clone()
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
        found = pushed(form, alpha, order=order, block=block)(w, gram, scheme, "w", drift).coded
        expected = eliminated(w, gram, drift, plan, scheme, form, alpha, block)
        assert torch.equal(found.codes.long(), expected)


@pytest.mark.parametrize("form", ["corrected", "original"])
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
def test_explicit_inverses_reject_planted_fault(form: str, fault: str) -> None:
    scheme, alpha = Scheme(3, 16, "integer", "float32"), 0.5
    x = inputs(seed=5)
    gram, drift = statistics(x, drifted(x))
    plan = plan_columns("gar", gram.diagonal(), scheme)
    expected = eliminated(weights(), gram, drift, plan, scheme, form, alpha, 1000)
    assert torch.equal(columnwise(weights(), gram, drift, plan, scheme, form, alpha, "none"), expected)
    assert not torch.equal(columnwise(weights(), gram, drift, plan, scheme, form, alpha, fault), expected)


def test_the_forms_are_different_methods() -> None:
    x = inputs()
    gram, drift = statistics(x, drifted(x))
    found = [pushed(form, block=16)(weights(), gram, Scheme(3, 16), "w", drift).coded for form in FORMS]
    assert not any(same(a, b) for i, a in enumerate(found) for b in found[:i])


@every_order
@every_scheme
@pytest.mark.parametrize("form", ["corrected", "original", "shifted"])
def test_blocks_do_not_matter(order: str, scheme: Scheme, form: str) -> None:
    x = inputs(seed=6)
    gram, drift = statistics(x, drifted(x))
    run = partial(pushed, form, order=order)
    single = run(block=1)(weights(seed=5), gram, scheme, "w", drift).coded
    for block in (3, 16, 20, 1000):
        assert same(run(block=block)(weights(seed=5), gram, scheme, "w", drift).coded, single)


@every_order
@every_scheme
def test_released_form_differs_from_the_corrected_one_only_across_blocks(order: str, scheme: Scheme) -> None:
    x = inputs(seed=6)
    gram, drift = statistics(x, drifted(x))
    for block, equal in ((K, True), (1000, True), (16, False), (1, False)):
        released, corrected = (
            pushed(form, order=order, block=block)(weights(), gram, scheme, "w", drift).coded
            for form in ("released", "corrected")
        )
        assert same(released, corrected) is equal


# What it is for.


@every_order
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_shifted_form_lowers_the_error_against_full_precision_inputs(order: str, scheme: Scheme) -> None:
    for seed in range(2):
        x, w = inputs(seed=seed + 20), weights(rows=25, seed=seed)
        full = drifted(x, seed=seed + 60)
        gram, drift = statistics(x, full)
        plain = GPTQ(MSE, DAMPING, order)(w, gram, scheme, "w").coded
        errors = [output_error(w, dense(plain, scheme), x, full)]
        for right in (drift, drift.T):
            coded = pushed("shifted", clip=MSE, order=order)(w, gram, scheme, "w", right).coded
            errors.append(output_error(w, dense(coded, scheme), x, full))
        assert errors[1] < 0.75 * errors[0]
        assert errors[1] < 0.75 * errors[2]


@every_order
@pytest.mark.parametrize("form", ACTIVE)
def test_every_form_lowers_the_error_against_full_precision_inputs(order: str, form: str) -> None:
    scheme, x, w = Scheme(3, 16), inputs(seed=20), weights(rows=33)
    full = drifted(x, seed=60)
    gram, drift = statistics(x, full)
    plain = GPTQ(MSE, DAMPING, order)(w, gram, scheme, "w").coded
    coded = pushed(form, 0.25, MSE, order=order)(w, gram, scheme, "w", drift).coded
    assert output_error(w, dense(coded, scheme), x, full) < output_error(w, dense(plain, scheme), x, full)


# Columns that are never fed, but would be in full precision.


def dead_inputs(dead: list[int]) -> tuple[Tensor, Tensor]:
    x = inputs()
    full = drifted(x)
    x[:, dead] = 0
    return x, full


@every_form
@every_order
@every_scheme
def test_dead_columns_leave_everything_finite_and_get_zero(form: str, order: str, scheme: Scheme) -> None:
    dead = [0, 5, 20, 21, K - 1]
    x, full = dead_inputs(dead)
    gram, drift = statistics(x, full)
    coded = pushed(form, order=order, block=16)(weights(), gram, scheme, "w", drift).coded
    q = dense(coded, scheme)
    assert bool(torch.isfinite(q).all())
    assert int(coded.codes.max()) < scheme.levels
    if scheme.has_zero:
        assert torch.equal(q[:, dead], torch.zeros(9, len(dead), dtype=torch.float64))
    else:
        # No level at 0: of all levels the nearest to the weights.
        every = [dense(replace(coded, codes=torch.full_like(coded.codes, c)), scheme) for c in range(scheme.levels)]
        least = torch.stack([(level - weights()).abs() for level in every]).amin(0)
        assert torch.allclose((q - weights()).abs()[:, dead], least[:, dead])


@every_order
@pytest.mark.parametrize("form", IN_LOOP)
def test_column_loop_with_dead_columns_equals_explicit_inverses(order: str, form: str) -> None:
    x, full = dead_inputs([0, 5, 20, 21, K - 1])
    gram, drift = statistics(x, full)
    scheme = Scheme(3, 16)
    plan = plan_columns(order, gram.diagonal(), scheme)
    found = pushed(form, order=order, block=1000)(weights(), gram, scheme, "w", drift).coded
    assert torch.equal(found.codes.long(), eliminated(weights(), gram, drift, plan, scheme, form, 1.0, 1000))


@pytest.mark.parametrize(
    ("form", "order"),
    # In the loop with gar nothing is left to push when dead groups are visited, last of all.
    [("corrected", "natural"), ("shifted", "natural"), ("shifted", "gar")],
)
def test_dead_columns_push_live_ones_by_their_original_weight(form: str, order: str) -> None:
    """Dead groups that are visited first are the same as live weights moved by W_dead R inv(H) beforehand."""
    dead = list(range(16))
    x, full = dead_inputs(dead)
    gram, drift = statistics(x, full)
    w, scheme = weights(), Scheme(3, 16)
    live = gram[16:, 16:]
    run = pushed(form, order=order, block=1000)
    whole = run(w, gram, scheme, "w", drift).coded
    moved = w[:, 16:] + w[:, :16] @ drift[:16, 16:] @ torch.linalg.inv(damped(live))
    if form == "shifted":
        moved = moved + w[:, 16:] @ drift[16:, 16:] @ torch.linalg.inv(damped(live))
        alone = GPTQ(MINMAX, DAMPING, order)(moved, live, scheme, "w").coded
    else:
        alone = run(moved, live, scheme, "w", drift[16:, 16:]).coded
    assert torch.equal(whole.codes[:, 16:], alone.codes)
    unmoved = run(w[:, 16:], live, scheme, "w", drift[16:, 16:]).coded
    assert not torch.equal(whole.codes[:, 16:], unmoved.codes)


@every_order
def test_the_released_program_takes_weights_of_dead_columns_for_zero(order: str) -> None:
    dead = [3, 16, 17, 40]
    x, full = dead_inputs(dead)
    gram, drift = statistics(x, full)
    w, scheme = weights(), Scheme(3, 16)
    other = w.clone()
    other[:, dead] += 3
    a, b = (pushed("released", order=order, block=16)(each, gram, scheme, "w", drift).coded for each in (w, other))
    assert same(a, b)


@pytest.mark.parametrize("form", ["corrected", "original", "shifted"])
def test_weights_of_dead_columns_matter_only_where_full_precision_feeds_them(form: str) -> None:
    x, full = dead_inputs([3, 16])
    w, scheme = weights(), Scheme(3, 16)
    other = w.clone()
    other[:, [3, 16]] += torch.tensor([2.0, -3.0], dtype=torch.float64)
    run = pushed(form, order="natural")
    for wanted in (True, False):
        if not wanted:
            full[:, [3, 16]] = 0
        gram, drift = statistics(x, full)
        a, b = (run(weight, gram, scheme, "w", drift).coded for weight in (w, other))
        live = [j for j in range(K) if j not in (3, 16)]
        assert torch.equal(a.codes[:, live], b.codes[:, live]) is not wanted


# Settings.


@every_form
def test_inputs_stay_untouched_and_the_same_inputs_give_the_same_codes(form: str) -> None:
    x = inputs()
    gram, drift = (matrix.float() for matrix in statistics(x, drifted(x)))
    w = weights().float()
    kept = w.clone(), gram.clone(), drift.clone()
    first, second = (pushed(form, block=16)(w, gram, Scheme(2, 16), "w", drift).coded for _ in range(2))
    assert same(first, second)
    for now, before in zip((w, gram, drift), kept, strict=True):
        assert torch.equal(now, before)


@every_form
def test_a_missing_drift_is_an_error_that_names_the_linear(form: str) -> None:
    run = pushed(form)
    assert run.needs_drift
    with pytest.raises(ValueError, match=re.escape("drift of mlp.down_proj's inputs")):
        run(weights(), inputs().T @ inputs(), Scheme(4), "mlp.down_proj")


def test_bad_settings_are_bad_recipes() -> None:
    with pytest.raises(BadRecipe, match="'gptaq'; choose one of none, released, corrected, original, shifted"):
        Asymmetry("gptaq")
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(BadRecipe, match="alpha"):
            Asymmetry("shifted", alpha)
    assert [Asymmetry("released", alpha).alpha for alpha in (0, 1)] == [0, 1]

"""GPTAQ: what it adds vanishes without drift, follows its equations otherwise, and has the loss it claims to have."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from gptaq_samples import (
    ACTIVE,
    DAMPING,
    MINMAX,
    MSE,
    SCHEMES,
    K,
    damped,
    dense,
    drifted,
    every_form,
    every_order,
    every_scheme,
    inputs,
    linear_map,
    normal,
    pushed,
    same,
    statistics,
    weights,
)
from torch import Tensor

from subnibble.errors import BadRecipe
from subnibble.rounding import grid
from subnibble.rounding.gptaq import Asymmetry, Push
from subnibble.rounding.gptq import GPTQ, factorize
from subnibble.rounding.order import plan_columns
from subnibble.tensor.scheme import Scheme


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
    plain = GPTQ(MINMAX, DAMPING, order, 16)(w, gram, scheme, "w").quantized
    run = partial(pushed, form, order=order, block=16)
    assert same(run(0.0)(w, gram, scheme, "w", drift).quantized, plain)
    assert same(run(1.0)(w, gram, scheme, "w", torch.zeros_like(drift)).quantized, plain)
    assert not same(run(1.0)(w, gram, scheme, "w", drift).quantized, plain)


@every_order
def test_without_a_form_drift_is_not_read(order: str) -> None:
    x = inputs()
    gram, drift = statistics(x, drifted(x))
    plain, ignored = GPTQ(order=order), pushed("none", clip=grid.Clip(), order=order)
    assert not plain.needs_drift
    assert not ignored.needs_drift
    scheme = Scheme(3, 16)
    expected = plain(weights(), gram, scheme, "w").quantized
    assert same(ignored(weights(), gram, scheme, "w", drift * torch.nan).quantized, expected)


# The equations.


@every_order
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_propagation_is_the_drift_through_the_inverse_of_what_lies_behind(order: str, alpha: float) -> None:
    x = inputs()
    gram, drift = statistics(x, drifted(x))
    columns = plan_columns(order, gram.diagonal(), Scheme(4, 16)).order
    h, r = damped(gram)[columns][:, columns], drift[columns][:, columns]
    u = factorize(gram, columns, DAMPING, "w").u

    def agrees(actual: Tensor) -> bool:
        near = torch.equal(actual, actual.triu(1))
        for q in range(K - 1):
            inverse = torch.linalg.inv(h[q + 1 :, q + 1 :])
            # Of every entry, not of the matrix: what its own sum could have lost.
            size = r[q, q + 1 :].abs() @ inverse.abs()
            expected = alpha * r[q, q + 1 :] @ inverse
            near &= bool(((actual[q, q + 1 :] - expected).abs() <= 1e-11 * size).all())
        return near

    asymmetry = Asymmetry("corrected", alpha)
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
            loss = output_error(w, q, x, x + alpha * (full - x)) + extra * float((w - q).square().sum())
            gaps.append(float(((delta @ h) * delta).sum()) - loss)
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
    result = GPTQ(MSE, tiny, order, asymmetry=Asymmetry("shifted", 1.0))(weights(), gram, scheme, "w", drift).quantized
    assert torch.equal(result.codes, GPTQ(MSE, tiny, order)(weights() @ a, gram, scheme, "w").quantized.codes)
    assert not torch.equal(result.codes, GPTQ(MSE, tiny, order)(weights() @ a.T, gram, scheme, "w").quantized.codes)


# What it is for.


@every_order
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_shifted_form_lowers_the_error_against_full_precision_inputs(order: str, scheme: Scheme) -> None:
    for seed in range(2):
        x, w = inputs(seed=seed + 20), weights(rows=25, seed=seed)
        full = drifted(x, seed=seed + 60)
        gram, drift = statistics(x, full)
        plain = GPTQ(MSE, DAMPING, order)(w, gram, scheme, "w").quantized
        errors = [output_error(w, dense(plain, scheme), x, full)]
        for right in (drift, drift.T):
            quantized = pushed("shifted", clip=MSE, order=order)(w, gram, scheme, "w", right).quantized
            errors.append(output_error(w, dense(quantized, scheme), x, full))
        assert errors[1] < 0.75 * errors[0]
        assert errors[1] < 0.75 * errors[2]


@every_order
@pytest.mark.parametrize("form", ACTIVE)
def test_every_form_lowers_the_error_against_full_precision_inputs(order: str, form: str) -> None:
    scheme, x, w = Scheme(3, 16), inputs(seed=20), weights(rows=33)
    full = drifted(x, seed=60)
    gram, drift = statistics(x, full)
    plain = GPTQ(MSE, DAMPING, order)(w, gram, scheme, "w").quantized
    quantized = pushed(form, 0.25, MSE, order=order)(w, gram, scheme, "w", drift).quantized
    assert output_error(w, dense(quantized, scheme), x, full) < output_error(w, dense(plain, scheme), x, full)


# Settings.


@every_form
def test_inputs_stay_untouched_and_the_same_inputs_give_the_same_codes(form: str) -> None:
    x = inputs()
    gram, drift = (matrix.float() for matrix in statistics(x, drifted(x)))
    w = weights().float()
    kept = w.clone(), gram.clone(), drift.clone()
    first, second = (pushed(form, block=16)(w, gram, Scheme(2, 16), "w", drift).quantized for _ in range(2))
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
    with pytest.raises(BadRecipe, match="'gptaq'; choose one of none, released, corrected, shifted"):
        Asymmetry("gptaq")
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(BadRecipe, match="alpha"):
            Asymmetry("shifted", alpha)
    assert [Asymmetry("released", alpha).alpha for alpha in (0, 1)] == [0, 1]

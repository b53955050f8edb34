"""GPTAQ on columns that are never fed, but would be in full precision: finite, zero, and pushing live ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gptaq_samples import (
    DAMPING,
    MINMAX,
    K,
    damped,
    dead_inputs,
    dense,
    every_form,
    every_order,
    every_scheme,
    pushed,
    same,
    statistics,
    weights,
)

from subnibble.rounding.gptq import GPTQ
from subnibble.tensor.scheme import Scheme


@every_form
@every_order
@every_scheme
def test_dead_columns_leave_everything_finite_and_get_zero(form: str, order: str, scheme: Scheme) -> None:
    dead = [0, 5, 20, 21, K - 1]
    x, full = dead_inputs(dead)
    gram, drift = statistics(x, full)
    quantized = pushed(form, order=order, block=16)(weights(), gram, scheme, "w", drift).quantized
    q = dense(quantized, scheme)
    assert bool(torch.isfinite(q).all())
    assert int(quantized.codes.max()) < scheme.levels
    if scheme.has_zero:
        assert torch.equal(q[:, dead], torch.zeros(9, len(dead), dtype=torch.float64))
    else:
        # No level at 0: of all levels the nearest to the weights.
        every = [
            dense(replace(quantized, codes=torch.full_like(quantized.codes, c)), scheme) for c in range(scheme.levels)
        ]
        least = torch.stack([(level - weights()).abs() for level in every]).amin(0)
        assert torch.allclose((q - weights()).abs()[:, dead], least[:, dead])


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
    whole = run(w, gram, scheme, "w", drift).quantized
    shifted = w[:, 16:] + w[:, :16] @ drift[:16, 16:] @ torch.linalg.inv(damped(live))
    if form == "shifted":
        shifted = shifted + w[:, 16:] @ drift[16:, 16:] @ torch.linalg.inv(damped(live))
        alone = GPTQ(MINMAX, DAMPING, order)(shifted, live, scheme, "w").quantized
    else:
        alone = run(shifted, live, scheme, "w", drift[16:, 16:]).quantized
    assert torch.equal(whole.codes[:, 16:], alone.codes)
    unmoved = run(w[:, 16:], live, scheme, "w", drift[16:, 16:]).quantized
    assert not torch.equal(whole.codes[:, 16:], unmoved.codes)


@every_order
@every_scheme
def test_the_released_program_takes_weights_of_dead_columns_for_zero(order: str, scheme: Scheme) -> None:
    dead = [3, 16, 17, 40]
    x, full = dead_inputs(dead)
    gram, drift = statistics(x, full)
    w = weights()
    other = w.clone()
    other[:, dead] += 3
    live = [j for j in range(K) if j not in dead]
    run = pushed("released", order=order, block=7)
    a, b = (run(each, gram, scheme, "w", drift).quantized for each in (w, other))
    if scheme.has_zero:
        assert same(a, b)
    # A grid that has no 0 keeps dead weights near what they are; no live one moves for that.
    assert torch.equal(a.codes[:, live], b.codes[:, live])


@pytest.mark.parametrize("form", ["corrected", "shifted"])
def test_weights_of_dead_columns_matter_only_where_full_precision_feeds_them(form: str) -> None:
    x, full = dead_inputs([3, 16])
    w, scheme = weights(), Scheme(3, 16)
    other = w.clone()
    other[:, [3, 16]] += torch.tensor([2.0, -3.0], dtype=torch.float64)
    run = pushed(form, order="natural")
    for target in (True, False):
        if not target:
            full[:, [3, 16]] = 0
        gram, drift = statistics(x, full)
        a, b = (run(weight, gram, scheme, "w", drift).quantized for weight in (w, other))
        live = [j for j in range(K) if j not in (3, 16)]
        assert torch.equal(a.codes[:, live], b.codes[:, live]) is not target

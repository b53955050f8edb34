"""Coordinate descent on codes: the loss never rises, a fixed point is one in each coordinate, GPTQ gains by it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from subnibble.errors import BadRecipe
from subnibble.rounding import grid
from subnibble.rounding.dual_scale import DualScale
from subnibble.rounding.gptaq import Asymmetry
from subnibble.rounding.gptq import GPTQ
from subnibble.tensor.packed import PackedRange, QuantizedMatrix
from subnibble.tensor.scheme import Scheme

SCHEMES = [Scheme(2, 16), Scheme(3, 7, "real"), Scheme(2, 16, "none", grid="sign")]
DAMPING = 0.01


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights (m, k) and a correlated Gram matrix (k, k)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 8, generator=generator) @ torch.randn(8, 45, generator=generator)
    x += 0.5 * torch.randn(300, 45, generator=generator)
    x[:, 3] *= 5
    return torch.randn(12, 45, generator=generator), (x.T @ x).double()


def dense(quantized: QuantizedMatrix, scheme: Scheme) -> Tensor:
    w = PackedRange.pack(quantized, scheme).dequantize().double()
    return w if quantized.column_scales is None else w * quantized.column_scales.double()


def damped(gram: Tensor) -> Tensor:
    return gram + DAMPING * gram.diagonal().mean() * torch.eye(gram.shape[0], dtype=gram.dtype)


def loss(w: Tensor, quantized: QuantizedMatrix, scheme: Scheme, gram: Tensor) -> Tensor:
    """(m,) of the damped objective, which is what descends."""
    delta = w.double() - dense(quantized, scheme)
    return ((delta @ damped(gram)) * delta).sum(1)


@pytest.mark.parametrize("fitter", [grid.Clip(), DualScale(iterations=4)], ids=["clip", "dual"])
@pytest.mark.parametrize("order", ["natural", "gar"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_no_sweep_raises_the_loss_and_the_first_lowers_it(scheme: Scheme, order: str, fitter: object) -> None:
    w, gram = problem()
    runs = [GPTQ(fitter, order=order, sweeps=sweeps)(w, gram, scheme, "w").quantized for sweeps in range(4)]
    losses = [loss(w, quantized, scheme, gram) for quantized in runs]
    for before, after in itertools.pairwise(losses):
        assert bool((after <= before * (1 + 1e-5)).all())
    assert float(losses[1].sum()) < float(losses[0].sum())
    for quantized in runs:
        assert torch.equal(quantized.scales, runs[0].scales)


@pytest.mark.parametrize("order", ["natural", "gar"])
def test_at_rest_no_single_code_can_change_for_the_better(order: str) -> None:
    """Brute force over every other code of every element: the oracle that a wrong gradient or Gram order fails."""
    w, gram = problem(1)
    scheme = Scheme(2, 15, scale_type="float32")
    quantized = GPTQ(order=order, sweeps=60)(w, gram, scheme, "w").quantized
    rest = loss(w, quantized, scheme, gram)
    for j, code in itertools.product(range(45), range(4)):
        changed = quantized.codes.clone()
        changed[:, j] = code
        other = loss(w, QuantizedMatrix(changed, quantized.scales, quantized.zeros), scheme, gram)
        assert bool((other >= rest * (1 - 1e-4)).all()), (j, code)


def test_the_brute_force_rejects_plain_gptq() -> None:
    w, gram = problem(1)
    scheme = Scheme(2, 15, scale_type="float32")
    quantized = GPTQ()(w, gram, scheme, "w").quantized
    rest, better = loss(w, quantized, scheme, gram), 0
    for j, code in itertools.product(range(45), range(4)):
        changed = quantized.codes.clone()
        changed[:, j] = code
        better += int(
            (loss(w, QuantizedMatrix(changed, quantized.scales, quantized.zeros), scheme, gram) < rest * 0.999).sum()
        )
    assert better > 0


def test_blocks_do_not_change_the_result() -> None:
    w, gram = problem(2)
    runs = [GPTQ(block=block, sweeps=2)(w, gram, Scheme(3, 16), "w").quantized for block in (1, 16, 128)]
    assert all(torch.equal(run.codes, runs[0].codes) for run in runs)


def test_sweeps_head_for_the_shifted_target() -> None:
    w, gram = problem(3)
    drift, scheme = 0.2 * gram, Scheme(3, 16)
    target = w * (1 + 0.2)
    runs = [
        GPTQ(asymmetry=Asymmetry("shifted", 1.0), damping=1e-4, sweeps=sweeps)(w, gram, scheme, "w", drift).quantized
        for sweeps in (0, 2)
    ]
    losses = [float(loss(target, quantized, scheme, gram).sum()) for quantized in runs]
    assert losses[1] < 0.97 * losses[0]


def test_what_cannot_be_swept_is_refused() -> None:
    with pytest.raises(BadRecipe, match="sweeps is -1"):
        GPTQ(sweeps=-1)
    with pytest.raises(BadRecipe, match="need a known target"):
        GPTQ(asymmetry=Asymmetry("released"), sweeps=1)

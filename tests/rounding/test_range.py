"""Rounding at the ends of what types hold: idle inputs, weights and Gram matrices far from 1."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from subnibble.errors import NumericalFailure
from subnibble.rounding import grid
from subnibble.rounding.dual_scale import DualScale
from subnibble.rounding.error import relative_errors
from subnibble.rounding.gptaq import Asymmetry
from subnibble.rounding.gptq import GPTQ
from subnibble.rounding.rtn import RTN
from subnibble.rounding.table import as_stored, pack_table
from subnibble.tensor.scheme import Scheme

WHERE = "model.layers.3.mlp.down_proj"


def weights(rows: int = 9, columns: int = 24) -> Tensor:
    return 0.1 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def gram(columns: int = 24) -> Tensor:
    x = torch.randn(200, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[:, 3] *= 20
    x[:, 1:] += 0.5 * x[:, :-1]
    return x.T @ x


@pytest.mark.parametrize("scheme", [Scheme(3, 8), Scheme(2, -1, "real"), Scheme(2, 8, "none", grid="sign")])
@pytest.mark.parametrize("order", ["natural", "gar"])
def test_weights_of_an_idle_input_are_rounded_to_nearest(scheme: Scheme, order: str) -> None:
    idle = torch.zeros(24, 24)
    result = GPTQ(order=order)(weights(), idle, scheme, WHERE).quantized
    nearest = RTN()(weights(), None, scheme, WHERE).quantized
    assert torch.equal(result.codes, nearest.codes)
    assert torch.equal(result.scales, nearest.scales)


@pytest.mark.parametrize("factor", [1e-70, 1e-40, 1e40, 1e70])
@pytest.mark.parametrize("weighting", ["none", "hessian"])
def test_the_size_of_a_gram_matrix_beyond_float32_changes_no_code(factor: float, weighting: str) -> None:
    drift = 0.1 * gram()
    for rounder in (
        GPTQ(weighting=weighting), GPTQ(weighting=weighting, sweeps=1), RTN(weighting=weighting),
        GPTQ(weighting=weighting, asymmetry=Asymmetry("shifted", 0.5)),
    ):  # fmt: skip
        usual = rounder(weights(), gram(), Scheme(3, 8), WHERE, drift)
        result = rounder(weights(), gram() * factor, Scheme(3, 8), WHERE, drift * factor)
        assert torch.equal(result.quantized.codes, usual.quantized.codes)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize("spread", [1e-60, 1.0, 1e60])
def test_relative_errors_do_not_depend_on_sizes(size: float, spread: float) -> None:
    w, q = weights(), grid.nearest(weights(), Scheme(3, 8))
    (usual,) = relative_errors(w, q, gram(), [9])
    (result,) = relative_errors(w * size, q * size, gram() * spread, [9])
    assert result.weight == pytest.approx(usual.weight, rel=1e-4)
    assert result.output == pytest.approx(usual.output, rel=1e-4)


def test_relative_errors_of_a_linear_that_is_all_zero_are_none() -> None:
    zero = torch.zeros(4, 24)
    (result,) = relative_errors(zero, zero, gram(), [4])
    assert (result.weight, result.output) == (0, 0)


@pytest.mark.parametrize("scheme", [Scheme(4, 8), Scheme(8, 8, "none"), Scheme(2, 8, "none", grid="sign")])
def test_a_weight_that_float16_scales_do_not_hold_is_named(scheme: Scheme) -> None:
    wide = Scheme(scheme.bits, 8, scheme.zero_point, "float32", scheme.grid)
    for small in (1e-8, 1e-12):
        with pytest.raises(NumericalFailure, match=f"^{re.escape(WHERE)}: its largest weight is .*too small"):
            grid.check_range(weights() * small, scheme, WHERE)
        grid.check_range(weights() * small, wide, WHERE)
    grid.check_range(weights(), scheme, WHERE)
    # A row that is nearly nothing is no matter, and neither is one that is nothing.
    some = weights()
    some[1:] *= 1e-12
    grid.check_range(some, scheme, WHERE)
    grid.check_range(torch.zeros(4, 24), scheme, WHERE)
    grid.check_range(weights() * 1e-40, scheme, WHERE)


@pytest.mark.parametrize("large", [1e7, 1e20])
def test_scales_are_never_cut_to_their_types_range(large: float) -> None:
    said = 'too much for scales of type float16; set scale_type = "float32"'
    with pytest.raises(NumericalFailure, match=said):
        DualScale().fit(weights() * large, Scheme(3, 8), None)
    with pytest.raises(NumericalFailure, match=said):
        grid.check_range(weights() * large, Scheme(2, 8, "none", grid="sign"), WHERE)
    with pytest.raises(NumericalFailure, match=said):
        RTN()(weights() * large, None, Scheme(3, 8), WHERE)
    wide = Scheme(3, 8, "integer", "float32")
    result = RTN()(weights() * large, None, wide, WHERE).quantized
    assert bool(torch.isfinite(result.scales).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_table_that_float16_scales_do_not_hold_is_named(bits: int) -> None:
    with pytest.raises(NumericalFailure, match=r"^model\.embed_tokens: its largest weight"):
        pack_table("model.embed_tokens", weights() * 1e-8, Scheme(bits, 8))
    pack_table("model.embed_tokens", weights() * 1e-8, Scheme(bits, 8, "integer", "float32"))


@pytest.mark.parametrize(
    ("size", "target"),
    [(1e-9, torch.bfloat16), (1.0, torch.float16), (1e4, torch.float16), (1e9, torch.bfloat16), (0, torch.float16)],
)
def test_a_matrix_is_stored_in_the_16_bits_that_hold_it(size: float, target: torch.dtype) -> None:
    stored = as_stored(weights() * size)
    assert stored.dtype == target
    torch.testing.assert_close(stored.float(), weights() * size, rtol=2**-8, atol=2**-12 * size * 0.3)


def test_a_matrix_that_no_16_bits_hold_stays_as_it_is() -> None:
    largest = torch.full((2, 3), torch.finfo(torch.float32).max)
    assert torch.equal(as_stored(largest), largest)

"""Two factors for the rounding error: optimal under their own weight, and what they store."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from subnibble.checkpoint.module_specs import PackedLinearSpec
from subnibble.corrections.low_rank import FORMS, LowRank, factorize, roots_of
from subnibble.errors import BadRecipe
from subnibble.rounding import grid
from subnibble.tensor.packed import PackedLayout, PackedRange
from subnibble.tensor.scheme import Scheme

ROWS, COLUMNS, RANK = 40, 56, 6


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64) / 4
    return torch.randn(600, COLUMNS, generator=generator, dtype=torch.float64) @ mix * torch.linspace(4, 0.2, COLUMNS)


def error() -> Tensor:
    w = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    scheme = Scheme(3, 16)
    return w - PackedRange.pack(grid.quantized(w, scheme, grid.Clip("minmax")), scheme).dequantize()


def loss(e: Tensor, down: Tensor, up: Tensor) -> float:
    return float(((e.double() - up.double() @ down.double()) @ tokens().T).square().sum())


def factors(form: str, e: Tensor, rank: int = RANK) -> tuple[Tensor, Tensor]:
    x = tokens()
    return factorize(e, roots_of(form, x.T @ x, x.abs().mean(0)), rank)


def plain(e: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of a plain truncated SVD, which does not look at inputs."""
    eye = torch.eye(COLUMNS, dtype=torch.float64)
    return factorize(e, (eye, eye), RANK)


def test_each_form_is_better_on_outputs_than_the_one_before() -> None:
    e = error()
    nothing = loss(e, torch.zeros(RANK, COLUMNS), torch.zeros(ROWS, RANK))
    losses = [loss(e, *plain(e)), *(loss(e, *factors(form, e)) for form in FORMS)]
    assert [nothing, *losses] == sorted([nothing, *losses], reverse=True)
    assert losses[2] < 0.9 * losses[0]


def test_qera_reaches_the_bound_of_any_square_root() -> None:
    e, x = error().double(), tokens()
    lower = torch.linalg.cholesky(x.T @ x)
    bound = torch.linalg.svdvals(e @ lower)[RANK:].square().sum()
    torch.testing.assert_close(loss(e, *factors("qera", e)), float(bound), rtol=1e-8, atol=0)


def test_qera_is_a_plain_svd_on_white_inputs() -> None:
    e = error()
    (down, up), (own_down, own_up) = factorize(e, roots_of("qera", torch.eye(COLUMNS) * 3, None), RANK), plain(e)
    torch.testing.assert_close(up @ down, own_up @ own_down)


def test_full_rank_leaves_nothing() -> None:
    e = error()
    for form in FORMS:
        down, up = factors(form, e, ROWS)
        torch.testing.assert_close(up @ down, e.double(), rtol=0, atol=1e-8)


def test_silent_inputs_do_not_make_factors_infinite() -> None:
    e, x = error(), tokens()
    x[:, 4:9] = 0
    for form in ("l2qer", "qera"):
        down, up = factorize(e, roots_of(form, x.T @ x, x.abs().mean(0)), RANK)
        assert bool(torch.isfinite(down).all())
        assert bool(torch.isfinite(up).all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("weight", [Scheme(4, 16), Scheme(4, 16, "none"), Scheme(4, 32, "none", "e8m0", "mxfp4")])
def test_packed_factors_take_the_bits_that_were_planned(bits: int, weight: Scheme) -> None:
    e, x = error(), tokens().float()
    correction = LowRank(RANK, "qera", bits)
    ((down, up),) = correction.branches([e], x.T @ x, None, weight)
    assert (down.shape, up.shape) == ((RANK, COLUMNS), (ROWS, RANK))
    spec = PackedLinearSpec(PackedLayout(ROWS, ((COLUMNS, weight),)), bias=False)
    assert correction.planned(spec, weight).low_rank == (down.layout, up.layout)
    exact = factors("qera", e)
    assert loss(e, down.dequantize(), up.dequantize()) < (1.02 if bits == 8 else 1.6) * loss(e, *exact)


def test_a_rank_beyond_the_weight_is_its_smaller_side() -> None:
    x = tokens().float()
    ((down, up),) = LowRank(500, "qera", 8).branches([error()], x.T @ x, None, Scheme(4, 16))
    assert (down.shape[0], up.shape[1]) == (ROWS, ROWS)


def test_bad_values_name_the_choices() -> None:
    with pytest.raises(BadRecipe, match="rank is 0"):
        LowRank(0, "qera", 4)
    with pytest.raises(BadRecipe, match="choose one of l2qer, qera"):
        LowRank(4, "pca", 4)
    with pytest.raises(BadRecipe, match="factor_bits is 16; choose one of 2, 3, 4, 8"):
        LowRank(4, "qera", 16)


def test_linears_of_one_input_get_the_branches_that_each_would_get() -> None:
    x, parts, scheme = tokens().float(), (error(), 2 * error()[:3], error().flip(0)), Scheme(4, 16)
    for form in FORMS:
        correction = LowRank(RANK, form, 8)
        alone = [correction.branches([part], x.T @ x, x.abs().mean(0), scheme)[0] for part in parts]
        together = correction.branches(parts, x.T @ x, x.abs().mean(0), scheme)
        for one, other in zip(alone, together, strict=True):
            assert one is not None
            assert other is not None
            assert all(torch.equal(a.dequantize(), b.dequantize()) for a, b in zip(one, other, strict=True))

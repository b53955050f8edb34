"""SERQ's second weight of the salient channels: what each form computes, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from subnibble.corrections.correction import NOTHING, Rounded, RoundMain
from subnibble.corrections.salient import FORMS, SalientColumns, least_squares
from subnibble.errors import BadRecipe
from subnibble.rounding import grid
from subnibble.rounding.gptq import GPTQ
from subnibble.rounding.rtn import RTN
from subnibble.scheme import Scheme

ROWS, COLUMNS, RANK = 24, 88, 32
SCHEME = Scheme(4, 16, "none")
MINMAX = grid.Clip("minmax")


def weight(seed: int = 0) -> Tensor:
    """Signed, most salient columns first and largest, as after flattening; ragged last group, a zero row."""
    w = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    w *= torch.linspace(8, 0.3, COLUMNS)
    w[3] = 0
    return w


def tokens(seed: int = 1, count: int = 400) -> Tensor:
    """Correlated inputs with outlier channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5 + torch.eye(COLUMNS)
    return torch.randn(count, COLUMNS, generator=generator) @ mix


def gram() -> Tensor:
    x = tokens()
    return x.T @ x


TO_NEAREST = RoundMain(RTN(MINMAX), SCHEME, "here")
BY_GPTQ = RoundMain(GPTQ(MINMAX, order="natural"), SCHEME, "here")


def dense(rounded: Rounded) -> Tensor:
    _, main, salient = rounded
    total = main.dequantize()
    if salient is not None:
        total[:, : salient.columns] += salient.dequantize()
    return total


def output_error(w: Tensor, q: Tensor) -> float:
    delta = w - q
    return float(((delta @ gram()) * delta).sum())


def test_before_and_after_are_the_same_numbers_when_rounding_TO_NEAREST() -> None:
    w = weight()
    one = dense(SalientColumns(RANK, "before", MINMAX).round(w, None, SCHEME, TO_NEAREST))
    other = dense(SalientColumns(RANK, "after", MINMAX).round(w, None, SCHEME, TO_NEAREST))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_before_and_after_differ_where_the_identity_must_not_hold() -> None:
    w = weight()
    one = dense(SalientColumns(RANK, "before", MINMAX).round(w, gram(), SCHEME, BY_GPTQ))
    other = dense(SalientColumns(RANK, "after", MINMAX).round(w, gram(), SCHEME, BY_GPTQ))
    assert float((one - other).abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("form", "rounding"),
    # What GPTQ moved from salient columns to others is undone by a plain residual: `after` is for rounding to nearest.
    [*((form, TO_NEAREST) for form in FORMS), ("before", BY_GPTQ), ("fitted", BY_GPTQ)],
)
def test_a_second_weight_takes_most_of_the_output_error(form: str, rounding: RoundMain) -> None:
    w = weight()
    made = SalientColumns(RANK, form, MINMAX).round(w, gram(), SCHEME, rounding)
    alone = dense(NOTHING.round(w, None, SCHEME, TO_NEAREST))
    assert made[2].columns == RANK
    assert output_error(w, dense(made)) < 0.5 * output_error(w, alone)


@pytest.mark.parametrize("rounding", [TO_NEAREST, BY_GPTQ])
def test_output_error_falls_with_the_rank(rounding: RoundMain) -> None:
    w = weight()
    errors = [output_error(w, dense(NOTHING.round(w, gram(), SCHEME, rounding)))]
    for rank in (16, 32, 48, 64, 88):
        errors.append(output_error(w, dense(SalientColumns(rank, "before", MINMAX).round(w, gram(), SCHEME, rounding))))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 * errors[0]


def test_fitted_beats_the_plain_residual_on_the_inputs_it_saw() -> None:
    w = weight()
    plain = dense(SalientColumns(RANK, "after", MINMAX).round(w, gram(), SCHEME, TO_NEAREST))
    fitted = dense(SalientColumns(RANK, "fitted", MINMAX).round(w, gram(), SCHEME, TO_NEAREST))
    assert output_error(w, fitted) < output_error(w, plain)


def test_least_squares_is_what_lstsq_finds() -> None:
    x, error = tokens(), weight(5) * 0.1
    mean = x[:, :RANK].square().sum(0).mean()
    # Damping is as many more rows of inputs, whose target is the plain residual.
    rows = (0.01 * mean).sqrt() * torch.eye(RANK)
    stacked = torch.cat([x[:, :RANK], rows]).double()
    target = torch.cat([x @ error.T, rows @ error[:, :RANK].T]).double()
    wanted = torch.linalg.lstsq(stacked, target).solution.T
    torch.testing.assert_close(least_squares(error, x.T @ x, RANK).double(), wanted, rtol=1e-3, atol=1e-5)
    assert float((least_squares(error, 2 * torch.eye(COLUMNS), RANK) - error[:, :RANK]).abs().max()) < 1e-6


def test_channels_that_calibration_never_fed_keep_the_plain_residual() -> None:
    error = weight(2)
    assert torch.equal(least_squares(error, torch.zeros(COLUMNS, COLUMNS), RANK), error[:, :RANK])


@pytest.mark.parametrize("form", ["after", "fitted"])
def test_a_group_that_mixes_salient_and_other_columns_is_refused(form: str) -> None:
    with pytest.raises(BadRecipe, match="no multiple of q's group size 16"):
        SalientColumns(24, form).check(COLUMNS, SCHEME, "q")
    SalientColumns(24, "before").check(COLUMNS, SCHEME, "q")
    SalientColumns(COLUMNS, form).check(COLUMNS, SCHEME, "q")
    with pytest.raises(BadRecipe, match="group size 88"):
        SalientColumns(16, form).check(COLUMNS, Scheme(4, -1, "none"), "q")


def test_a_rank_beyond_the_inputs_is_refused() -> None:
    with pytest.raises(BadRecipe, match="larger than the 88 inputs of q"):
        SalientColumns(89).check(COLUMNS, SCHEME, "q")


@pytest.mark.parametrize(("values", "message"), [
    ({"rank": 0}, "rank is 0"),
    ({"rank": 8, "form": "during"}, "choose one of before, after, fitted"),
    ({"rank": 8, "residual": "all"}, "choose one of none, salient"),
])  # fmt: skip
def test_bad_values_name_the_choices(values: dict[str, object], message: str) -> None:
    with pytest.raises(BadRecipe, match=message):
        SalientColumns(**values)


def test_the_coarse_weight_is_where_the_form_puts_it() -> None:
    assert [SalientColumns(8, form).coarse for form in FORMS] == ["none"] * 3
    assert [SalientColumns(8, form, residual="salient").coarse for form in FORMS] == ["salient", "weight", "weight"]

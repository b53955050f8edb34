"""SERQ's second weight of the salient channels: what it computes, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from subnibble.corrections.correction import NOTHING, Rounded, RoundMain
from subnibble.corrections.salient import SalientColumns
from subnibble.errors import BadRecipe
from subnibble.rounding import grid
from subnibble.rounding.gptq import GPTQ
from subnibble.rounding.rtn import RTN
from subnibble.tensor.scheme import Scheme

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
        total[:, : salient.num_columns] += salient.dequantize()
    return total


def output_error(w: Tensor, q: Tensor) -> float:
    delta = w - q
    return float(((delta @ gram()) * delta).sum())


def before(w: Tensor, rounding: RoundMain, rank: int = RANK) -> Tensor:
    return dense(SalientColumns(rank, MINMAX).round(w, gram(), SCHEME, rounding))


def after(w: Tensor, rounding: RoundMain, rank: int = RANK) -> Tensor:
    """Equations 5 to 7: the second weight is what rounding the whole left of its columns."""
    _, main, _ = NOTHING.round(w, gram(), SCHEME, rounding)
    total = main.dequantize()
    total[:, :rank] += grid.nearest(w[:, :rank] - total[:, :rank], SCHEME, MINMAX)
    return total


def test_the_residual_of_the_rounded_weight_is_the_same_when_rounding_to_nearest() -> None:
    w = weight()
    torch.testing.assert_close(before(w, TO_NEAREST), after(w, TO_NEAREST), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rounding", "rank"), [(BY_GPTQ, RANK), (TO_NEAREST, 24)], ids=["compensated", "cut group"])
def test_it_is_not_where_the_identity_must_not_hold(rounding: RoundMain, rank: int) -> None:
    w = weight()
    assert float((before(w, rounding, rank) - after(w, rounding, rank)).abs().max()) > 1e-2


def test_a_residual_behind_error_compensation_takes_back_what_that_moved() -> None:
    w = weight()
    assert output_error(w, before(w, BY_GPTQ)) < output_error(w, after(w, BY_GPTQ))


@pytest.mark.parametrize("rounding", [TO_NEAREST, BY_GPTQ])
def test_a_second_weight_takes_most_of_the_output_error(rounding: RoundMain) -> None:
    w = weight()
    rounded = SalientColumns(RANK, MINMAX).round(w, gram(), SCHEME, rounding)
    alone = dense(NOTHING.round(w, None, SCHEME, TO_NEAREST))
    assert rounded[2].num_columns == RANK
    assert output_error(w, dense(rounded)) < 0.5 * output_error(w, alone)


@pytest.mark.parametrize("rounding", [TO_NEAREST, BY_GPTQ])
def test_output_error_falls_with_the_rank(rounding: RoundMain) -> None:
    w = weight()
    errors = [output_error(w, dense(NOTHING.round(w, gram(), SCHEME, rounding)))]
    for rank in (16, 32, 48, 64, 88):
        errors.append(output_error(w, before(w, rounding, rank)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 * errors[0]


def test_a_rank_beyond_the_inputs_is_refused() -> None:
    with pytest.raises(BadRecipe, match="larger than the 88 inputs of q"):
        SalientColumns(89).check(COLUMNS, SCHEME, "q")


@pytest.mark.parametrize(("values", "message"), [
    ({"rank": 0}, "rank is 0"),
    ({"rank": 8, "residual": "all"}, "choose one of none, salient"),
])  # fmt: skip
def test_bad_values_name_the_choices(values: dict[str, object], message: str) -> None:
    with pytest.raises(BadRecipe, match=message):
        SalientColumns(**values)


def test_the_remainder_runs_through_the_coarse_weight_where_it_is_asked_for() -> None:
    assert [SalientColumns(8, residual=word).requantized for word in ("none", "salient")] == [0, 8]

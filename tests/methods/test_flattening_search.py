"""What the search for a flattening's powers minimises is what the running linear gets wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from linears import built
from subnibble.calibrate.stream import SiteStatistics
from subnibble.corrections.correction import NOTHING
from subnibble.methods import METHODS
from subnibble.pipeline.observe import Observed
from subnibble.pipeline.round import Stack, round_stack
from subnibble.rounding.grid import Clip
from subnibble.rounding.rtn import RTN
from subnibble.runtime import ops
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.packed import PackedTensor
from subnibble.tensor.scheme import Scheme
from subnibble.transforms.flatten import Loss, SearchedFlatten

ROWS, COLUMNS = 20, 72
NAME, INPUTS = "w", ActivationScheme(4, 16)
SCHEMES = {"serq": Scheme(4, 16, "none"), "serq-plus": Scheme(4, 16, "integer")}


def weight() -> Tensor:
    w = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.1
    # Scaled up by what their inputs were divided by, salient columns are the large ones.
    w[:, :8] *= 8
    return w


def tokens() -> Tensor:
    return torch.randn(50, COLUMNS, generator=torch.Generator().manual_seed(1)) * torch.linspace(2, 0.5, COLUMNS)


def loss_of(method: str, options: dict[str, Any]) -> Loss:
    (transform,) = METHODS[method].steps({"flattening": "search", "rounding": "rtn", **options}).transforms
    assert isinstance(transform, SearchedFlatten)
    result = SiteStatistics({}, {}, {}, {}, {NAME: SCHEMES[method]}, {NAME: INPUTS})
    return transform.loss(result)


def runs_with(method: str, options: dict[str, Any]) -> float:
    """Squared error of the packed linear that the method makes of the same, through the runtime."""
    steps = METHODS[method].steps({"rounding": "rtn", **options})
    correction, x, scheme = steps.correction, tokens(), SCHEMES[method]
    stack = Stack("block", (NAME,), (ROWS,), scheme, INPUTS, correction.requantized, NAME)
    _, main, salient = round_stack(stack, weight(), Observed(x.T @ x), steps.rounder, correction)
    second = None if salient is None else PackedTensor((salient,))
    terms = built(main, activation=INPUTS, salient=second, requantized=correction.requantized)
    return float((ops.linear(x, terms) - x @ weight().T).square().sum())


@pytest.mark.parametrize("rank", [0, 8, 16, 40])
@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("weighting", ["none", "hessian"])
def test_the_loss_is_that_of_the_packed_linear(weighting: str, clip: str, rank: int) -> None:
    options = {"rank": rank, "clip": clip, "weighting": weighting}
    result = loss_of("serq", options)(NAME, weight(), tokens())
    assert result == pytest.approx(runs_with("serq", options), rel=1e-3)


@pytest.mark.parametrize("rank", [8, 16])
def test_a_remainder_that_runs_again_is_nearly_that_of_the_packed_linear(rank: int) -> None:
    """It counts as if it met both weights, of which it meets the coarse one."""
    result = loss_of("serq-plus", {"rank": rank})(NAME, weight(), tokens())
    assert result == pytest.approx(runs_with("serq-plus", {"rank": rank}), rel=0.1)
    assert result < 0.8 * loss_of("serq-plus", {"rank": rank, "residual": "none"})(NAME, weight(), tokens())


def test_the_cases_differ() -> None:
    losses = [
        loss_of(method, {"rank": rank, "clip": clip, "residual": "none"})(NAME, weight(), tokens())
        for method in SCHEMES
        for rank in (0, 8, 16)
        for clip in ("minmax", "mse")
    ]
    assert len({round(loss, 6) for loss in losses}) == len(losses)


def test_a_rank_inside_a_group_is_not_taken_for_a_residual_of_the_whole() -> None:
    """The fault of rounding all columns first, salient ones among them."""
    w, x, scheme = weight(), tokens(), SCHEMES["serq"]
    plain = RTN(Clip("minmax"))
    stack = Stack("block", (NAME,), (ROWS,), scheme, INPUTS, 0, NAME)
    _, main, _ = round_stack(stack, w, Observed(x.T @ x), plain, NOTHING)
    rest = (w - main.dequantize())[:, :8]
    _, second, _ = round_stack(stack, rest, Observed(x[:, :8].T @ x[:, :8]), plain, NOTHING)
    terms = built(main, activation=INPUTS, salient=second)
    wrong = float((ops.linear(x, terms) - x @ w.T).square().sum())
    assert wrong > 1.2 * loss_of("serq", {"rank": 8})(NAME, w, x)

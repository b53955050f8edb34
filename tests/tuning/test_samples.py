"""What a block is trained on: the first tokens of the first windows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from subnibble.calibrate.stats import value_over
from subnibble.errors import CalibrationError
from subnibble.model.transformers_api.blocks import BlockCall
from subnibble.tuning.samples import Samples, TrainingWindows
from subnibble.tuning.tuning import Effort


def hidden(seed: int) -> Tensor:
    return torch.randn(20, 6, 8, generator=torch.Generator().manual_seed(seed))


def samples(windows: int, *parts: Tensor) -> Samples:
    effort = Effort(windows=windows, tokens=4, first=1, second=1, batch=4)
    batches = zip(*(part.split(3) for part in parts), strict=True)
    return value_over(TrainingWindows(effort, BlockCall({})), batches)


@pytest.mark.parametrize(("windows", "taken", "held_out"), [(8, 8, [7]), (16, 16, [14, 15]), (64, 20, [18, 19])])
def test_the_first_tokens_of_the_first_windows_and_the_last_of_these_are_held_out(
    windows: int, taken: int, held_out: list[int]
) -> None:
    inputs, exact, target = hidden(0), hidden(1), hidden(2)
    # A sink before the block, one behind it, and one that comes after all tokens that are taken.
    exact[1, 2] *= 1000
    target[2, 3] *= 1000
    target[3, 5] *= 1000
    actual = samples(windows, inputs, exact, target)
    ordinary = torch.ones(taken, 4, dtype=torch.bool)
    ordinary[:, 0] = ordinary[1, 2] = ordinary[2, 3] = False
    assert torch.equal(actual.inputs, inputs[:taken, :4])
    assert torch.equal(actual.target, target[:taken, :4])
    assert torch.equal(actual.ordinary, ordinary)
    added = (target - exact)[:taken, :4][ordinary].square().sum(-1).mean()
    assert actual.energy == pytest.approx(float(added), rel=1e-6)
    assert list(actual.held_out) == held_out
    assert actual.trained == held_out[0]


def test_a_window_without_a_token_to_train_on_is_refused() -> None:
    exact = hidden(0)
    exact[1, 1:4] *= 1e6
    with pytest.raises(CalibrationError, match="use longer windows"):
        samples(8, exact, exact, exact)
    assert samples(1, exact, exact, exact).inputs.shape[0] == 1

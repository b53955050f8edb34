"""Training: the loss falls, the best state is kept, what is not finite is rolled back, and a seed decides."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_block import TOKENS, Case

from subnibble.errors import BadRecipe
from subnibble.tuning import train
from subnibble.tuning.block import TunedBlock
from subnibble.tuning.samples import Samples
from subnibble.tuning.train import held_out_loss, train_
from subnibble.tuning.tuning import Effort, Tuning

EFFORT = Effort(windows=16, tokens=TOKENS, first=2, second=2, batch=2 * TOKENS)


def samples(case: Case) -> Samples:
    generator = torch.Generator().manual_seed(3)
    case.hidden = torch.randn(16, TOKENS, case.hidden.shape[2], generator=generator)
    target = case.output(case.states)
    ordinary = torch.ones(16, TOKENS, dtype=torch.bool)
    ordinary[:, 0] = False
    energy = float((target - case.hidden)[ordinary].square().sum(-1).mean())
    return Samples(case.hidden, target, ordinary, energy, case.call)


def coarse(case: Case) -> Case:
    schemes = {name: replace(scheme, bits=2) for name, scheme in case.context.schemes.items() if scheme is not None}
    case.context = replace(case.context, schemes=schemes)
    return case


@pytest.mark.parametrize("options", [{}, {"low_rank": "none"}, {"smoothing": "hard"}])
def test_training_lowers_the_held_out_loss(options: dict[str, str], folders: dict[str, Path]) -> None:
    case = coarse(Case(folders["llama"], quantized=True))
    data, losses = samples(case), []
    tuned = case.tuned(**options)
    trained = train_(tuned, data, EFFORT, torch.Generator().manual_seed(0), losses.append)
    assert trained.after < 0.95 * trained.before
    assert held_out_loss(tuned, data) == pytest.approx(trained.after, rel=1e-6)
    # The first loss, then that of the best state after each epoch.
    assert losses == sorted(losses, reverse=True)
    assert (losses[0], losses[-1], len(losses)) == (trained.before, trained.after, 1 + trained.epochs)
    assert trained.rollbacks == 0


def test_a_seed_decides_what_is_learned(folders: dict[str, Path]) -> None:
    def learned(seed: int) -> TunedBlock:
        case = coarse(Case(folders["llama"], quantized=True))
        data = samples(case)
        tuned = case.tuned()
        train_(tuned, data, EFFORT, torch.Generator().manual_seed(seed), lambda loss: None)
        return tuned

    first, again, other = (learned(seed).parameters() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_step_that_is_not_finite_is_left_out(folders: dict[str, Path]) -> None:
    case = coarse(Case(folders["llama"], quantized=True))
    data = samples(case)
    data.target[0] = math.nan
    trained = train_(case.tuned(), data, EFFORT, torch.Generator().manual_seed(0), lambda loss: None)
    assert trained.left_out == trained.epochs == 4
    assert trained.rollbacks == 0
    assert trained.after < 0.95 * trained.before


@pytest.mark.parametrize("why", ["nothing is finite", "training spoils it"])
def test_where_no_step_is_finite_it_goes_back(
    why: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = coarse(Case(folders["llama"], quantized=True))
    data = samples(case)
    if why == "nothing is finite":
        data.target[:14] = math.nan
    else:

        def spoil(block: TunedBlock, *rest: object) -> bool:
            with torch.no_grad():
                next(iter(block.parameters().values())).fill_(math.nan)
            return True

        monkeypatch.setattr(train, "_step_", spoil)
    tuned = case.tuned()
    before = {name: value.detach().clone() for name, value in tuned.parameters().items()}
    trained = train_(tuned, data, EFFORT, torch.Generator().manual_seed(0), lambda loss: None)
    assert trained.rollbacks == trained.epochs == 4
    # Four in a row are enough.
    assert trained.left_out == (16 if why == "nothing is finite" else 0)
    assert trained.after == trained.before
    assert all(torch.equal(before[name], value) for name, value in tuned.parameters().items())


def test_a_stage_ends_where_epochs_bring_nothing_and_the_next_begins_with_the_best(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = coarse(Case(folders["llama"], quantized=True))
    data, losses = samples(case), iter([5.0, 3.0, 4.0, 4.0, 4.0, 4.0, 4.0, *[6.0] * 9])
    tuned = case.tuned()
    watched = tuned.parameters()["clipping.mlp.up_proj.upper"]
    states: list[torch.Tensor] = []

    def scripted(block: TunedBlock, samples: Samples) -> float:
        states.append(watched.detach().clone())
        return next(losses)

    monkeypatch.setattr(train, "held_out_loss", scripted)
    long = replace(EFFORT, first=9, second=9)
    updates: list[torch.Tensor] = []
    step = train._step_

    def noted(*args: object) -> bool:
        updates.append(watched.detach().clone())
        return step(*args)

    monkeypatch.setattr(train, "_step_", noted)
    trained = train_(tuned, data, long, torch.Generator().manual_seed(0), lambda loss: None)
    # The best after one epoch, five more without a better one; then five of the second stage.
    assert (trained.epochs, trained.after) == (6 + 5, 3.0)
    assert torch.equal(watched, states[1])
    assert torch.equal(updates[6 * 7], states[1])
    assert not torch.equal(states[6], states[1])


def test_held_out_windows_are_not_trained_on(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    case = coarse(Case(folders["llama"], quantized=True))
    data, stepped = samples(case), []
    step = train._step_

    def noted(block: TunedBlock, samples: Samples, batch: torch.Tensor, *rest: object) -> bool:
        stepped.extend(batch.tolist())
        return step(block, samples, batch, *rest)

    monkeypatch.setattr(train, "_step_", noted)
    train_(case.tuned(), data, EFFORT, torch.Generator().manual_seed(0), lambda loss: None)
    assert list(data.held_out) == [14, 15]
    assert sorted(stepped) == sorted([*range(14)] * 4)


def test_tokens_that_are_left_out_do_not_count(folders: dict[str, Path]) -> None:
    case = coarse(Case(folders["llama"], quantized=True))
    data = samples(case)
    tuned = case.tuned()
    before = held_out_loss(tuned, data)
    data.target[:, 0] += 1000
    assert held_out_loss(tuned, data) == before
    data.target[:, 1] += 1000
    assert held_out_loss(tuned, data) > 10 * before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clipping": "row"}, "clipping is 'row'; choose one of group, none"),
        ({"effort": "much"}, "effort is 'much'; choose one of fast, default, best"),
        ({"clipping": "none", "smoothing": "none", "low_rank": "none"}, "nothing to tune"),
        ({"rank": 0}, "rank is 0"),
        ({"penalty": -1.0}, "penalty is -1.0"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, object], said: str) -> None:
    with pytest.raises(BadRecipe, match=said):
        Tuning(**options)

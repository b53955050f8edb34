"""Settings, and tokens chosen by them: as `generate` of transformers, a seed repeats the draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from subnibble.errors import BadRecipe, NumericalFailure
from subnibble.generate.sampler import Sampler
from subnibble.generate.settings import Sampling, Settings, generation_defaults, stop_ids
from tiny_llama import tiny_llama

CASES: dict[str, dict[str, Any]] = {
    "transformers' defaults": {},
    "temperature": {"temperature": 0.6, "top_k": 0},
    "top_k": {"top_k": 5},
    "top_k of all": {"top_k": 1000},
    "top_p": {"top_p": 0.5, "temperature": 1.7},
    "small top_p": {"top_p": 0.01},
    "min_p": {"min_p": 0.2, "top_k": 0},
    "penalty": {"repetition_penalty": 1.4, "top_k": 0},
    "all": {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_have_the_probabilities_that_transformers_gives_them(name: str) -> None:
    settings, model, ids = CASES[name], tiny_llama(3), torch.tensor([[4, 9, 4, 33]])
    torch.manual_seed(5)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=6, return_dict_in_generate=True,
        output_scores=True, output_logits=True, eos_token_id=None, pad_token_id=0, **settings,
    )  # fmt: skip
    text = out.sequences[0].tolist()
    sampling = Settings(**settings).sampling({"do_sample": True})
    sampler, kept = Sampler(sampling), []
    for step, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        actual = sampler.scores(logits[0], text[: 4 + step])
        assert torch.equal(actual.isinf(), scores[0].isinf())
        assert torch.equal(actual.softmax(-1), scores[0].softmax(-1))
        kept.append(int((~actual.isinf()).sum()))
    # The test can fail: the settings change what may be drawn, or how likely it is.
    changed = not torch.equal(actual.softmax(-1), logits[0].float().softmax(-1))
    assert changed == (name != "top_k of all")
    assert (min(kept) == 1) == (name == "small top_p")


def test_draws_have_the_frequencies_of_their_probabilities() -> None:
    logits = torch.tensor([0.3, 2.0, -1.0, 1.0, 0.0])
    sampler = Sampler(Sampling(1.0, 0, 1.0, 0.0, 1.0, seed=1))
    draws = torch.tensor([sampler.pick(logits, []) for _ in range(4000)])
    share = torch.bincount(draws, minlength=5) / 4000
    assert float((share - logits.softmax(-1)).abs().max()) < 0.03


def test_temperature_0_takes_the_likeliest_token_and_keeps_the_penalty() -> None:
    logits = torch.tensor([0.0, 2.0, 1.9])
    assert Sampler(Sampling(0.0, 1, 0.1, 0.9, 1.0, 0)).pick(logits, [1]) == 1
    assert Sampler(Sampling(0.0, 1, 0.1, 0.9, 1.3, 0)).pick(logits, [1]) == 2


def test_a_seed_repeats_the_draws_and_leaves_torchs_own_alone() -> None:
    def drawn(seed: int) -> list[int]:
        sampler = Sampler(Sampling(1.0, 0, 1.0, 0.0, 1.0, seed))
        return [sampler.pick(torch.zeros(1000), []) for _ in range(5)]

    state = torch.get_rng_state()
    assert drawn(3) == drawn(3) != drawn(4)
    assert torch.equal(torch.get_rng_state(), state)


def test_logits_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(NumericalFailure, match="logits are NaN"):
        Sampler(Sampling(0.0, 0, 1.0, 0.0, 1.0, 0)).pick(torch.tensor([0.0, float("nan")]), [])


def test_what_the_caller_leaves_open_is_as_the_model_says_else_as_in_transformers() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.8, repetition_penalty=1.05, max_new_tokens=9)
    defaults = generation_defaults(config)
    assert Settings().sampling(defaults) == Sampling(0.7, 50, 0.8, 0.0, 1.05, 0)
    assert Settings(top_k=3, temperature=0, seed=2).sampling(defaults) == Sampling(0.0, 3, 0.8, 0.0, 1.05, 2)
    assert (Settings().most_tokens(defaults), Settings(max_new_tokens=4).most_tokens(defaults)) == (9, 4)
    silent = generation_defaults(GenerationConfig())
    assert Settings().sampling(silent) == Sampling(0.0, 50, 1.0, 0.0, 1.0, 0)
    assert Settings(temperature=1.0).sampling(silent).temperature == 1.0
    assert Settings().most_tokens(silent) == 256
    for ids, expected in ((None, set()), (3, {3}), ([3, 5], {3, 5})):
        assert stop_ids(GenerationConfig(eos_token_id=ids)) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": "hot"}, {"temperature": True},
        {"top_k": -1}, {"top_k": 1.5}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 2}, {"repetition_penalty": 0},
        {"max_new_tokens": 0}, {"seed": -1}, {"seed": 2**63}, {"stop": ("",)}, {"stop": (3,)},
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(BadRecipe, match=f"{name} is .*; give "):
        Settings(**wrong)


def test_an_unknown_setting_is_named_and_one_stop_string_may_stand_alone() -> None:
    with pytest.raises(BadRecipe, match=r"unknown setting 'topk' of generation; known: max_new_tokens, .*top_k"):
        Settings.from_dict({"topk": 3})
    assert Settings(stop="end").stop == ("end",)

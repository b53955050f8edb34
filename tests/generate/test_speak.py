"""A prompt is continued: greedily or by draws that a seed repeats, and no further than positions reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Run
from subnibble.checkpoint.opening import open_source
from subnibble.errors import BadRecipe
from subnibble.generate.prefix import attach_prefix_
from subnibble.generate.speak import speak
from subnibble.hf import load_model
from subnibble.tensor.cache_scheme import PrefixIds

POSITIONS = 128


@pytest.fixture(scope="module")
def tokenizer(folders: dict[str, Path]) -> Any:
    return open_source(folders["llama"]).load_tokenizer()


@pytest.fixture
def model(folders: dict[str, Path]) -> Any:
    return load_model(folders["llama"])


def test_greedy_words_are_the_likeliest_each(model: Any, tokenizer: Any) -> None:
    ids = [3, 7]
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert speak(model, tokenizer, "w3 w7", 5) == " ".join(f"w{i}" for i in ids[2:])
    assert speak(model, tokenizer, "w3 w7", 5, seed=8) == speak(model, tokenizer, "w3 w7", 5)


def test_a_seed_repeats_draws_and_another_changes_them(model: Any, tokenizer: Any) -> None:
    def drawn(temperature: float, seed: int) -> str:
        return speak(model, tokenizer, "w3 w7", 12, temperature, seed)

    assert drawn(1.0, 1) == drawn(1.0, 1)
    assert len({drawn(1.0, seed) for seed in range(4)}) == 4
    assert drawn(1.0, 1) != drawn(0.0, 1)
    assert drawn(1e-4, 1) == drawn(0.0, 1)
    state = torch.get_rng_state()
    drawn(1.0, 1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("prompt", [0, 6])
def test_words_end_where_positions_do(prompt: int, model: Any, tokenizer: Any) -> None:
    if prompt:
        attach_prefix_(model, None, PrefixIds(tuple(range(prompt)), None))
    room = POSITIONS - prompt
    for num_words, expected in ((room - 1, 1), (room - 3, 3), (4, 5)):
        text = " ".join(["w3", "w7"] * room).split()[:num_words]
        assert len(speak(model, tokenizer, " ".join(text), 5).split()) == expected
    after_prefix = "" if prompt == 0 else " after a system prompt of 6"
    with pytest.raises(BadRecipe, match=f"{room} tokens{after_prefix} and the model 128 positions; give a shorter one"):
        speak(model, tokenizer, " ".join(["w3"] * room), 5)


def test_the_command_says_what_cannot_be(run: Run, folders: dict[str, Path]) -> None:
    code, _, err = run("generate", folders["llama"], "--prompt", " ".join(["w1"] * 200))
    assert code == 2
    assert "the prompt has 200 tokens and the model 128 positions" in err
    for seed in (10**22, -1):
        code, _, err = run("generate", folders["llama"], "--prompt", "w1", "--seed", seed)
        assert code == 2
        assert "--seed" in err

"""What scores a model: the native step and torch give the same logits; the choice between them is explained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import random_model
from subnibble import evaluate
from subnibble.errors import BadRecipe
from subnibble.evaluation.runners import native_runner, runner_of, torch_runner
from subnibble.generate.choice import chosen_backend
from subnibble.generate.prefix import attach_prefix_
from subnibble.hf import load_model
from subnibble.kernels import native as kernels
from subnibble.tensor.cache_scheme import PrefixIds

pytestmark = pytest.mark.skipif(kernels.why_missing() is not None, reason="there are no kernels")

IDS = torch.tensor([(7 * i * i + 3) % 95 for i in range(40)])


def test_both_give_the_same_logits(packed: dict[str, Path]) -> None:
    model = load_model(packed["llama"], "float32")
    with torch.inference_mode():
        expected = torch_runner(model)(IDS)
        actual = runner_of(model)(IDS)
    assert actual.shape == expected.shape
    assert not torch.equal(actual, expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


def test_bos_before_a_window_is_hidden_by_a_prefix_that_has_it() -> None:
    model: Any = random_model("llama")
    attach_prefix_(model, None, PrefixIds((5, 9, 2), bos=5))
    ids = torch.cat([torch.tensor([5]), IDS])
    with torch.inference_mode():
        expected = torch_runner(model)(ids)[1:]
        actual = native_runner(model)(ids)[1:]
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
    with pytest.raises(BadRecipe, match="begins with the model's own system prompt"):
        native_runner(model)(torch.cat([torch.tensor([5, 9, 2]), IDS]))


def test_the_choice_is_explained(packed: dict[str, Path]) -> None:
    model, plain = load_model(packed["llama"], "float32"), random_model("llama")
    assert chosen_backend(model, "auto") == ("native", "packed, on the CPU")
    assert chosen_backend(model, "torch") == ("torch", "chosen")
    assert chosen_backend(plain, "auto") == ("torch", "the model is not packed")
    assert chosen_backend(plain, "native") == ("native", "chosen")
    with kernels.chosen("torch"):
        assert chosen_backend(model, "auto")[0] == "torch"
        with pytest.raises(BadRecipe, match="torch operations were chosen; use --backend torch"):
            chosen_backend(model, "native")
    with pytest.raises(BadRecipe, match="choose one of auto, native, torch"):
        chosen_backend(model, "fast")


def test_an_evaluation_names_its_backend(packed: dict[str, Path], text_file: Path) -> None:
    results = {
        backend: evaluate(packed["llama"], {"text": str(text_file), "window": 32, "backend": backend})
        for backend in ("native", "torch")
    }
    assert [results[name]["backend"] for name in results] == ["native", "torch"]
    native, by_torch = (results[name]["perplexity"] for name in results)
    assert native != by_torch
    assert native == pytest.approx(by_torch, rel=1e-3)

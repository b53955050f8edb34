"""Models side by side: names, and the original behind the same system prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from subnibble import Recipe
from subnibble.errors import BadRecipe
from subnibble.evaluation.compare import ORIGINAL, compare, recipe_name, recipe_names
from subnibble.evaluation.evaluate import Evaluation


def test_names_say_how_the_cache_is_coded() -> None:
    plain = Recipe(method="quarot", bits=4, activation_bits=4)
    cached = replace(plain, kv_bits=4, kv={"group_size": 32})
    assert recipe_name(cached) == recipe_name(plain) + "-kv4g32-hadamard-clip0.95"


def test_recipes_that_differ_have_names_that_differ() -> None:
    plain = Recipe(method="d2quant", options={"mean_shift": "none"})
    recipes = [plain, replace(plain, options={"asymmetry": "none"}), replace(plain, num_windows=4)]
    names = recipe_names(recipes)
    assert len(set(names)) == 3
    assert names[2] == f"{names[0]}-2"
    assert names[:2] == [recipe_name(recipe) for recipe in recipes[:2]]
    with pytest.raises(BadRecipe, match="is given 2 times"):
        recipe_names([*recipes, replace(plain)])


def test_each_of_two_recipes_of_one_name_is_scored(folders: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    recipes = [Recipe(method="rtn", bits=2, group_size=16, seed=seed) for seed in (0, 1)]
    recipes.append(Recipe(method="rtn", bits=2, group_size=16, overrides={"re:.*up_proj": {"skip": True}}))
    evaluation = Evaluation(str(text_file), window=16, dtype="float32")
    rows = compare(folders["llama"], recipes, evaluation, tmp_path)
    assert [row.name for row in rows[1:]] == ["rtn-w2g16", "rtn-w2g16-2", "rtn-w2g16-3"]
    assert rows[1].scores == rows[2].scores != rows[3].scores
    assert (tmp_path / "rtn-w2g16-3" / "config.json").is_file()


def test_the_original_is_scored_behind_the_prompt_of_the_others(folders: dict[str, Path], text_file: Path) -> None:
    evaluation = Evaluation(str(text_file), window=16, dtype="float32")
    recipes = [Recipe(method="none", system_prompt="w5 w9 w2", kv_bits=bits) for bits in (8, 2)]
    rows = {row.name: row.scores for row in compare(folders["llama"], recipes, evaluation)}
    coarse, fine = (rows[recipe_name(recipe)] for recipe in reversed(recipes))
    assert fine.kl_divergence < 0.1 * coarse.kl_divergence
    plain = compare(folders["llama"], [replace(recipes[0], system_prompt=None)], evaluation)
    assert plain[0].scores.perplexity != rows[ORIGINAL].perplexity


def test_one_prompt_at_a_time(folders: dict[str, Path], text_file: Path) -> None:
    evaluation = Evaluation(str(text_file), window=16)
    recipes = [Recipe(method="none", kv_bits=4), Recipe(method="none", kv_bits=3, system_prompt="w5")]
    with pytest.raises(BadRecipe, match="the same system prompt"):
        compare(folders["llama"], recipes, evaluation)
    with pytest.raises(BadRecipe, match="in the recipes"):
        compare(folders["llama"], recipes[:1], replace(evaluation, kv_bits=4))

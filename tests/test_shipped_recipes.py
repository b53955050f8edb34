"""The recipes in `recipes/`: each says what it is, resolves on every architecture, and is what the bench measures."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from conftest import CONFIGS
from subnibble import Recipe, quantize
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.methods import find_method
from subnibble.model.skeleton import Skeleton
from subnibble.pipeline.plan import make_plan, plan_cache, plan_rotation

FILES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.toml"))
BASE = {"group_size": 16, "num_windows": 4, "window": 32}


def small(file: Path) -> Recipe:
    """The recipe for tiny models: small groups and ranks."""
    values = Recipe.from_toml(file).to_dict()
    options = {**values["options"]}
    method = find_method(values["method"])
    if hasattr(method.options(), "rank") and options.get("rank") != 0:
        options["rank"] = 16
    if "atom" in (values["method"], options.get("over")):
        options["outliers"] = 16
    if values["kv"].get("window"):
        values["kv"] = values["kv"] | {"window": 8} | ({"group_size": 4} if "group_size" in values["kv"] else {})
    return Recipe.from_dict(values | BASE | {"options": options})


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_recipe_resolves_on_every_architecture(file: Path, folders: dict[str, Path]) -> None:
    assert file.read_text().startswith("# ")
    recipe = small(file)
    method = find_method(recipe.method)
    steps = method.build(method.configure(recipe.options))
    for name in CONFIGS:
        skeleton = Skeleton(SafetensorsSource(folders[name]), torch.float32, torch.device("cpu"))
        plan = make_plan(recipe, steps, skeleton)
        assert all((scheme is None) == (recipe.method == "none") for scheme in plan.schemes.values())
        bits = {None if scheme is None else scheme.bits for scheme in plan.activations.values()}
        assert bits == ({None} if file.parent.name == "recipes" or recipe.method == "none" else {4})
        cached = plan_cache(recipe, steps, skeleton)
        assert (cached is not None) == (file.parent.name == "weight_activation_kv")
        assert (plan_rotation(recipe, steps, skeleton) is None) == (steps.rotation == "none")


def test_no_two_recipes_are_the_same() -> None:
    resolved = []
    for file in FILES:
        recipe = Recipe.from_toml(file)
        method = find_method(recipe.method)
        resolved.append(recipe.to_dict() | {"options": asdict(method.configure(recipe.options))})
    for i, one in enumerate(resolved):
        assert one not in resolved[:i], FILES[i].name


@pytest.mark.parametrize(
    "name",
    [
        "recipes/d2quant",
        "recipes/d2quant-uniform",
        "recipes/dualfit",
        "recipes/dualfit-sign",
        "recipes/gptaq-rotated",
        "weight_activation/serq",
        "weight_activation/quarot",
        "weight_activation/qera",
        "weight_activation_kv/atom",
        "weight_activation_kv/quarot",
        "weight_activation_kv/bisup-atom-fast",
        "weight_activation_kv/kv-by-channel",
    ],
)
def test_recipe_written_beside_the_checkpoint_makes_the_same_bytes_again(
    name: str, folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    file = next(file for file in FILES if f"{file.parent.name}/{file.stem}" == name)
    recipe = replace(small(file), calibration=str(token_file))
    first = quantize(folders["qwen3"], tmp_path / "first", recipe)
    again = quantize(folders["qwen3"], tmp_path / "again", Recipe.from_toml(tmp_path / "first" / "recipe.toml"))
    assert again.weights_sha256 == first.weights_sha256

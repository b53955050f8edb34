"""Arms of the benches: each resolves on every architecture, and no two are the same."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from arms import ARMS, recipe_of
from conftest import CONFIGS
from subnibble import Recipe, quantize
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.methods import find_method
from subnibble.model.skeleton import Skeleton
from subnibble.pipeline.check import checked_plan
from subnibble.pipeline.plan import plan_rotation

NAMED = [(bench, arm) for bench, arms in ARMS.items() for arm in arms]
BASE = {"group_size": 16, "num_windows": 4, "window": 32}


def small(bench: str, arm: str) -> Recipe:
    """The recipe for tiny models: small groups and ranks."""
    values = recipe_of(bench, arm).to_dict()
    options = {**values["options"]}
    method = find_method(values["method"])
    if hasattr(method.options(), "rank") and options.get("rank") != 0:
        options["rank"] = 16
    if "atom" in (values["method"], options.get("over")):
        options["outliers"] = 16
    if values["kv"].get("window"):
        values["kv"] = values["kv"] | {"window": 8} | ({"group_size": 4} if "group_size" in values["kv"] else {})
    return Recipe.from_dict(values | BASE | {"options": options})


@pytest.fixture(scope="module")
def skeletons(folders: dict[str, Path]) -> list[Skeleton]:
    """One of each architecture, without weights."""
    return [Skeleton(SafetensorsSource(folders[name]), torch.float32, torch.device("cpu")) for name in CONFIGS]


@pytest.mark.parametrize(("bench", "arm"), NAMED)
def test_an_arm_resolves_on_every_architecture(bench: str, arm: str, skeletons: list[Skeleton]) -> None:
    recipe = small(bench, arm)
    method = find_method(recipe.method)
    steps = method.build(method.configure(recipe.options))
    for skeleton in skeletons:
        plan = checked_plan(recipe, steps, skeleton)
        assert all((scheme is None) == (recipe.method == "none") for scheme in plan.schemes.values())
        bits = {None if scheme is None else scheme.bits for scheme in plan.activations.values()}
        assert bits == ({None} if bench == "weight_only" or recipe.method == "none" else {4})
        assert (plan.cache is not None) == (bench == "weight_activation_kv")
        assert (plan_rotation(recipe, steps, skeleton) is None) == (steps.rotation == "none")


def test_no_two_arms_are_the_same() -> None:
    resolved = []
    for bench, arm in NAMED:
        recipe = recipe_of(bench, arm)
        method = find_method(recipe.method)
        resolved.append(recipe.to_dict() | {"options": asdict(method.configure(recipe.options))})
    for i, one in enumerate(resolved):
        assert one not in resolved[:i], NAMED[i]


def test_an_arm_is_its_base_with_what_differs() -> None:
    base, arm = (recipe_of("weight_activation_kv", name) for name in ("atom-centered", "atom-centered-distilled"))
    assert arm == replace(base, distill_steps=112)
    assert recipe_of("weight_activation_kv", "kv-by-channel").kv == {
        "window": 32, "key_axis": "channel", "group_size": 32,
    }  # fmt: skip
    # Options of another method do not come along.
    assert recipe_of("weight_activation_kv", "bisup-atom-fast").options == {"over": "atom", "effort": "fast"}
    assert recipe_of("weight_only", "gptq-gar-sign", bits=3).bits == 3


@pytest.mark.parametrize(
    ("bench", "arm"),
    [
        ("weight_only", "d2quant"),
        ("weight_only", "d2quant-uniform"),
        ("weight_only", "d2quant-plus"),
        ("weight_only", "d2quant-plus-sign"),
        ("weight_only", "gptaq-rotated"),
        ("weight_activation", "serq"),
        ("weight_activation", "quarot"),
        ("weight_activation", "qera"),
        ("weight_activation_kv", "atom"),
        ("weight_activation_kv", "quarot"),
        ("weight_activation_kv", "bisup-atom-fast"),
        ("weight_activation_kv", "kv-by-channel"),
    ],
)
def test_recipe_written_beside_the_checkpoint_makes_the_same_bytes_again(
    bench: str, arm: str, short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    recipe = replace(small(bench, arm), calibration=str(token_file))
    first = quantize(short["qwen3"], tmp_path / "first", recipe)
    again = quantize(short["qwen3"], tmp_path / "again", Recipe.from_toml(tmp_path / "first" / "recipe.toml"))
    assert again.weights_sha256 == first.weights_sha256

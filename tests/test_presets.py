"""Presets: each is a recipe of the bits in its name, resolves on every architecture, and is what bits alone ask for."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import subnibble
from conftest import CONFIGS, Run
from subnibble import Recipe
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.errors import BadRecipe
from subnibble.methods import find_method
from subnibble.model.skeleton import Skeleton
from subnibble.pipeline.check import checked_plan
from subnibble.presets import PRESETS, preset, preset_for

FOLDER = Path(subnibble.__file__).parent / "presets"
# Rank and outliers for tiny models.
SMALL = {"serq-plus": {"rank": 16}, "atom": {"outliers": 16}}


def small(name: str) -> Recipe:
    recipe = preset(name)
    kv = {"group_size": 4, "window": 8} if recipe.kv.get("window") else {}
    return replace(
        recipe,
        group_size=min(recipe.group_size, 32),
        options={**recipe.options, **SMALL.get(recipe.method, {})},
        kv={**recipe.kv, **kv},
    )


def test_every_file_is_a_preset_and_says_what_it_is() -> None:
    assert {file.stem for file in FOLDER.glob("*.toml")} == set(PRESETS)
    for name in PRESETS:
        assert (FOLDER / f"{name}.toml").read_text().startswith("# ")


def test_a_preset_takes_changes_of_its_fields() -> None:
    assert preset("w3", calibration="a.txt", seed=3) == replace(preset("w3"), calibration="a.txt", seed=3)
    with pytest.raises(BadRecipe, match=r"num_window'.*num_windows"):
        preset("w3", num_window=3)
    with pytest.raises(BadRecipe, match="bits is 5"):
        preset("w3", bits=5)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_bits_of_its_name(name: str) -> None:
    recipe = preset(name)
    said = dict(re.findall(r"(w|a|kv)(\d)", "w4a4" if name == "mxfp4" else name))
    assert recipe.bits == int(said.get("w", recipe.bits))
    assert (recipe.method == "none") == ("w" not in said)
    assert recipe.activation_bits == int(said.get("a", 16))
    assert recipe.kv_bits == int(said.get("kv", 16))
    assert (recipe.grid == "mxfp4") == (name == "mxfp4")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_resolves_on_every_architecture(name: str, folders: dict[str, Path]) -> None:
    recipe = small(name)
    steps = find_method(recipe.method).steps(recipe.options)
    for model in CONFIGS:
        skeleton = Skeleton(SafetensorsSource(folders[model]), torch.float32, torch.device("cpu"))
        plan = checked_plan(recipe, steps, skeleton)
        assert all((scheme is None) == (recipe.method == "none") for scheme in plan.schemes.values())


@pytest.mark.parametrize("name", PRESETS)
def test_bits_alone_ask_for_their_preset(name: str) -> None:
    recipe = preset(name)
    grid = None if recipe.grid == "auto" else recipe.grid
    weights = (None, None) if recipe.method == "none" else (recipe.bits, recipe.activation_bits)
    assert preset_for(*weights, recipe.kv_bits, grid) == name


@pytest.mark.parametrize(
    "bits",
    [(5, None, None, None), (3, 4, None, None), (3, None, 4, None), (3, None, None, "sign"), (None, None, 5, None)],
)
def test_bits_without_a_preset_are_refused_by_name(bits: tuple) -> None:
    with pytest.raises(BadRecipe, match=r"there is no preset for (w|kv).*; name a method with --method"):
        preset_for(*bits)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(BadRecipe, match="preset is 'w5'; choose one of w2, w3"):
        subnibble.preset("w5")


def test_the_command_says_which_preset_bits_mean_and_writes_its_recipe(
    run: Run, folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    data = ("--calibration", token_file, "--num-windows", 4, "--window", 32, "--group-size", 16)
    code, _, err = run("quantize", folders["llama"], tmp_path / "a", "--bits", 3, *data)
    assert code == 0, err
    assert "no method is given: using --preset w3, whose method is d2quant-plus" in err
    code, _, err = run("quantize", folders["llama"], tmp_path / "b", "--preset", "w3", *data)
    assert code == 0, err
    assert "no method is given" not in err
    recipes = [Recipe.from_toml(tmp_path / name / "recipe.toml") for name in "ab"]
    assert recipes[0] == recipes[1]
    assert (recipes[0].method, recipes[0].bits, recipes[0].embedding_bits) == ("d2quant-plus", 3, 8)
    sums = [json.loads((tmp_path / name / "report.json").read_text())["weights_sha256"] for name in "ab"]
    assert sums[0] == sums[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--preset", "w3", "--method", "gptq"), "give it without --method"),
        (("--preset", "w9"), "preset is 'w9'"),
        (("--bits", 3, "--activation-bits", 4), "there is no preset for w3a4"),
    ],
)
def test_what_a_command_line_cannot_mean_is_refused(
    options: tuple, message: str, run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    for command in (("quantize", folders["llama"], tmp_path / "out"), ("estimate", folders["llama"])):
        code, _, err = run(*command, *options)
        assert code == 2
        assert message in err

"""One place says whether a recipe may run on a model: quantize, estimate and compare refuse in the same words."""

from __future__ import annotations

import ast
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import subnibble
from subnibble import Recipe, compare, estimate, quantize
from subnibble.errors import BadRecipe, CalibrationError, CheckpointError, SubnibbleError, UnsupportedModel
from subnibble.pipeline import check

A4 = {"activation_bits": 4}
# Which model, which recipe, and what is said.
REFUSED: dict[str, tuple[str, dict[str, Any], type[SubnibbleError], str]] = {
    "no method": ("llama", {"method": "nope"}, BadRecipe, "unknown method 'nope'"),
    "no option": ("llama", {"options": {"bogus": 1}}, BadRecipe, "has no option 'bogus'"),
    "factors of no width": (
        "llama", {"method": "l2qer", **A4, "options": {"factor_bits": 16}}, BadRecipe, "factor_bits"
    ),
    "nothing to do": ("llama", {"method": "none"}, BadRecipe, "there is nothing else to do"),
    "inputs alone": ("llama", {"method": "none", **A4}, BadRecipe, "linears unquantized, but activation_bits is 4"),
    "one window to tune on": ("llama", {"method": "bisup", "num_windows": 1}, BadRecipe, "tuning holds out some"),
    "no text for a prompt": (
        "llama", {"method": "rtn", "system_prompt": "auto", "calibration": None}, BadRecipe, "set calibration"
    ),
    "windows too long": ("llama", {"window": 4096}, CalibrationError, "longer than the model's 128 positions"),
    "a prompt too long": (
        "llama", {"system_prompt": " ".join(["w1"] * 100)}, CalibrationError, "after a system prompt of 100"
    ),
    "no prompt": ("llama", {"system_prompt": "default"}, BadRecipe, "tokenizer has no chat template"),
    "no such linear": (
        "llama", {"overrides": {"nope": {"skip": True}}}, BadRecipe, "override 'nope' matches no linear"
    ),
    "nothing left": ("llama", {"overrides": {"re:.*": {"skip": True}}}, BadRecipe, "the overrides skip every linear"),
    "groups too large": ("llama", {"group_size": 64}, BadRecipe, "group 64 is larger than the 48 inputs"),
    "groups of a table too large": (
        "llama",
        {"group_size": 64, "embedding_bits": 8, "overrides": {"re:.*": {"group_size": 16}}},
        BadRecipe, "group 64 is larger than the 48 inputs of model.embed_tokens",
    ),
    "groups of a cache too large": (
        "llama", {"kv_bits": 4, "kv": {"group_size": 32}}, BadRecipe, "larger than a head of 16 channels"
    ),
    "groups that no Hadamard matrix fits": ("llama", {"method": "d2quant", "group_size": 13}, BadRecipe, "rotation"),
    "a grid that a rounder has not": (
        "llama", {"method": "d2quant-plus", "bits": 4, "grid": "mxfp4", "group_size": 32}, BadRecipe, "need a uniform"
    ),
    "a grid that is not learned": (
        "llama", {"method": "omniquant", "bits": 2, "grid": "sign"}, BadRecipe, 'tuning needs grid = "uniform"'
    ),
    "clips of no inputs": (
        "llama", {"method": "bisup", "options": {"input_clipping": "site"}}, BadRecipe, "no linear has such"
    ),
    "a rank too large": ("llama", {"method": "serq", **A4}, BadRecipe, "rank 128 is larger"),
    "outliers alone": (
        "llama", {"method": "atom", **A4, "options": {"outliers": 48}}, BadRecipe, "leave none of the 48"
    ),
    "nothing to learn": (
        "llama",
        {"method": "rtn", "distill_steps": 3, "distill": {"tokens": 24, "scales": False, "norms": False}},
        BadRecipe, "the model has nothing to learn",
    ),
    "no such device": ("llama", {"device": "nope"}, SubnibbleError, "nope"),
    "a packed model": ("packed", {}, CheckpointError, "is quantized already"),
    "no architecture": ("strange", {}, UnsupportedModel, "model_type 'gpt2'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(
    folders: dict[str, Path], packed: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    strange = tmp_path_factory.mktemp("models") / "strange"
    shutil.copytree(folders["llama"], strange)
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    return folders | {"packed": packed["llama"], "strange": strange}


@pytest.mark.parametrize("case", REFUSED)
def test_quantize_estimate_and_compare_refuse_in_the_same_words(
    case: str, sources: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subnibble.pipeline.windows.calibration_windows", lambda *args: pytest.fail("text was read"))
    name, keys, kind, message = REFUSED[case]
    base = Recipe(bits=3, group_size=16, calibration=str(token_file), num_windows=4, window=32, device="cpu")
    model, recipe, said = sources[name], replace(base, **keys), []
    evaluation = {"text": "news", "window": 32}
    for ask in (
        lambda: estimate(model, recipe),
        lambda: quantize(model, tmp_path / "out", recipe),
        lambda: compare(model, [recipe], evaluation, tmp_path / "rows"),
    ):
        with pytest.raises(kind) as refused:
            ask()
        said.append((type(refused.value), str(refused.value)))
    assert said == [said[0]] * 3
    assert message in said[0][1]
    assert list(tmp_path.iterdir()) == []


def calls(tree: ast.AST) -> set[str]:
    """Names of the functions and methods that begin with "check", where they are called."""
    called = [ast.unparse(node.func).rpartition(".")[2] for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {name for name in called if name.startswith("check")}


def refusals(tree: ast.AST) -> set[str]:
    """Kinds of errors that are raised of a recipe or a model."""
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    return {ast.unparse(error.func) for error in raised if isinstance(error, ast.Call)} & {
        "BadRecipe",
        "UnsupportedModel",
    }


def test_no_second_place_asks() -> None:
    trees = {file: ast.parse(file.read_text()) for file in Path(check.__file__).parent.glob("*.py")}
    checks = trees.pop(Path(check.__file__))
    comparison = Path(subnibble.__file__).parent / "evaluation" / "compare.py"
    others = trees | {comparison: ast.parse(comparison.read_text())}
    defined = {node.name for node in ast.walk(checks) if isinstance(node, ast.FunctionDef)}
    asked = calls(checks) - defined
    assert {"check_positions", "check_width", "check_learns"} <= asked
    assert {file.name: calls(tree) & asked for file, tree in others.items() if calls(tree) & asked} == {}
    assert {file.name: refusals(tree) for file, tree in trees.items() if refusals(tree)} == {}
    assert refusals(checks) == {"BadRecipe", "UnsupportedModel"}

"""Distillation of a checkpoint that is there already."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from subnibble import Recipe, quantize
from subnibble.cli.main import app
from subnibble.distill_checkpoint import distill_checkpoint
from subnibble.errors import BadRecipe, CheckpointError, SubnibbleError
from test_distill import DATA, DISTILLED, METHODS, tensors_of


def recipe_of(kind: str, token_file: Path, **more: Any) -> Recipe:
    return Recipe(calibration=str(token_file), **{**DATA, **METHODS[kind], **more})


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(("kind", "name"), [("gptq", "llama"), ("quarot", "llama-tied"), ("atom", "llama")])
def test_later_is_as_good_as_at_once(
    kind: str, name: str, folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    plain, whole = recipe_of(kind, token_file), recipe_of(kind, token_file, **DISTILLED)
    wanted = quantize(folders[name], tmp_path / "once", whole)
    before = quantize(folders[name], tmp_path / "later", plain)
    found = distill_checkpoint(tmp_path / "later", folders[name], whole)
    assert found == wanted.distilled
    once, later = tensors_of(tmp_path / "once"), tensors_of(tmp_path / "later")
    assert once.keys() == later.keys()
    assert all(torch.equal(once[key], later[key]) for key in once)
    assert config_of(tmp_path / "once") == config_of(tmp_path / "later")
    # The report says so, and is of what is there now.
    report = json.loads((tmp_path / "later" / "report.json").read_text())
    assert report["distilled"]["after"] == found.after
    assert report["distilled_with"]["steps"] == DISTILLED["distill_steps"]
    assert report["weights_sha256"] != before.weights_sha256
    assert report["linears"][0]["path"] == before.linears[0].path


def test_the_recipe_and_other_files_stay_and_it_may_be_done_again(
    folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    out, recipe = tmp_path / "out", recipe_of("gptq", token_file, **DISTILLED)
    quantize(folders["llama"], out, recipe_of("gptq", token_file))
    (out / "notes.txt").write_text("mine")
    kept = (out / "recipe.toml").read_text()
    files = sorted(path.name for path in out.iterdir())
    first = distill_checkpoint(out, folders["llama"], recipe)
    assert first.after < first.before
    again = distill_checkpoint(out, folders["llama"], replace(recipe, seed=1))
    assert again.before == pytest.approx(first.after, rel=0.3)
    assert again.after <= again.before
    assert sorted(path.name for path in out.iterdir()) == files
    assert (out / "recipe.toml").read_text() == kept
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"distill_steps": 0, "distill": {}}, BadRecipe, "distill_steps is 0; give a positive number"),
        ({"calibration": "no-such-file.txt"}, SubnibbleError, "no-such-file.txt"),
        ({"num_windows": 1}, BadRecipe, "holds some text out"),
    ],
)
def test_what_cannot_be_leaves_the_checkpoint_as_it_was(
    change: dict[str, Any], error: type[Exception], said: str, folders: dict[str, Path], token_file: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    quantize(folders["llama"], out, recipe_of("gptq", token_file))
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    values = recipe_of("gptq", token_file, **DISTILLED).to_dict() | change

    def run() -> None:
        distill_checkpoint(out, folders["llama"], Recipe.from_dict(values))

    with pytest.raises(error, match=said):
        run()
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_both_models_must_be_what_they_should(folders: dict[str, Path], token_file: Path, tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", recipe_of("gptq", token_file, **DISTILLED)
    quantize(folders["llama"], out, recipe_of("gptq", token_file))
    with pytest.raises(CheckpointError, match=r"model_type is 'mistral', and .* has 'llama'; give the model"):
        distill_checkpoint(out, folders["mistral"], recipe)
    with pytest.raises(CheckpointError, match=r"num_attention_heads is 3, and .* has 6"):
        distill_checkpoint(out, folders["llama-tied"], recipe)
    with pytest.raises(CheckpointError, match="quantized already"):
        distill_checkpoint(out, out, recipe)
    with pytest.raises(CheckpointError, match="quantize the model first"):
        distill_checkpoint(folders["llama"], folders["llama"], recipe)
    with pytest.raises(CheckpointError, match="is no folder"):
        distill_checkpoint(tmp_path / "nowhere", folders["llama"], recipe)


def test_the_command_says_what_it_did(folders: dict[str, Path], token_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(folders["llama"], out, recipe_of("quarot", token_file))
    arguments = [
        "distill", str(out), "--original", str(folders["llama"]), "--steps", "32", "--distill-option", "tokens=192",
        "--distill-option", "rate=0.005", "--calibration", str(token_file), "--num-windows", "32", "--window", "24",
        "--dtype", "float32", "--device", "cpu",
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    assert f"distilled in 32 steps: KL from the original {report['distilled']['before']:.3f} before" in result.output
    quantize(folders["llama"], tmp_path / "once", recipe_of("quarot", token_file, **DISTILLED))
    once, later = tensors_of(tmp_path / "once"), tensors_of(out)
    assert all(torch.equal(once[key], later[key]) for key in once)

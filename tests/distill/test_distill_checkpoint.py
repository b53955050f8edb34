"""Distillation of a checkpoint that is there already."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_distill import DATA, DISTILLED, GENTLE, METHODS, tensors_of
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from spoiled_checkpoint import spoiled_copy
from subnibble import Recipe, quantize
from subnibble.checkpoint.checksums import CHECKSUMS
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.cli.main import app
from subnibble.errors import BadRecipe, CheckpointError, OutputError, SubnibbleError
from subnibble.generate.prefix import add_prefix
from subnibble.hf.attention import attached_cache
from subnibble.pipeline.distill_checkpoint import distill_checkpoint


def recipe_of(kind: str, token_file: Path, **more: Any) -> Recipe:
    return Recipe(calibration=str(token_file), **{**DATA, **METHODS[kind], **more})


def config_of(folder: Path) -> dict[str, Any]:
    """What config.json says, but for checksums of weights."""
    config = json.loads((folder / "config.json").read_text())
    config.get("quantization_config", {}).pop(CHECKSUMS, None)
    return config


@pytest.fixture(scope="module")
def gptq(short: dict[str, Path], token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkpoint, for tests to copy."""
    out = tmp_path_factory.mktemp("gptq") / "out"
    quantize(short["llama"], out, recipe_of("gptq", token_file))
    return out


@pytest.mark.parametrize(("kind", "name"), [("gptq", "llama"), ("quarot", "llama-tied"), ("atom", "llama")])
def test_later_is_as_good_as_at_once(
    kind: str, name: str, short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    plain, whole = recipe_of(kind, token_file), recipe_of(kind, token_file, **GENTLE)
    target = quantize(short[name], tmp_path / "once", whole)
    before = quantize(short[name], tmp_path / "later", plain)
    actual = distill_checkpoint(tmp_path / "later", short[name], whole)
    assert actual == target.distilled
    once, later = tensors_of(tmp_path / "once"), tensors_of(tmp_path / "later")
    assert once.keys() == later.keys()
    assert all(torch.equal(once[key], later[key]) for key in once)
    assert config_of(tmp_path / "once") == config_of(tmp_path / "later")
    # The report says so, and is of what is there now.
    report = json.loads((tmp_path / "later" / "report.json").read_text())
    assert [done["after"] for done in report["distilled_later"]] == [actual.after]
    assert report["distilled_later"][0]["steps"] == GENTLE["distill_steps"]
    assert report["distilled"] is None
    # Where training found nothing better, the start would be stored again.
    assert actual.after < actual.before
    assert report["weights_sha256"] != before.weights_sha256
    assert report["linears"][0]["path"] == before.linears[0].path


def test_the_recipe_and_other_files_stay_and_it_may_be_done_again(
    gptq: Path, short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    out, recipe = tmp_path / "out", recipe_of("gptq", token_file, **DISTILLED)
    shutil.copytree(gptq, out)
    (out / "notes.txt").write_text("mine")
    kept = (out / "recipe.toml").read_text()
    files = sorted(path.name for path in out.iterdir())
    first = distill_checkpoint(out, short["llama"], recipe)
    assert first.after < first.before
    again = distill_checkpoint(out, short["llama"], replace(recipe, seed=1))
    assert again.before == pytest.approx(first.after, rel=0.3)
    assert again.after <= again.before
    report = json.loads((out / "report.json").read_text())
    assert [done["seed"] for done in report["distilled_later"]] == [0, 1]
    assert sorted(path.name for path in out.iterdir()) == files
    assert (out / "recipe.toml").read_text() == kept
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["gptq", "quarot"])
def test_the_loss_that_is_reported_is_that_of_what_is_stored(
    kind: str, short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    # Gains of bfloat16, which hold little of what is learned of them.
    half, out, recipe = tmp_path / "half", tmp_path / "out", recipe_of(kind, token_file, **DISTILLED)
    shutil.copytree(short["llama"], half)
    AutoModelForCausalLM.from_pretrained(half, dtype=torch.bfloat16).save_pretrained(half)
    first = quantize(half, out, recipe).distilled
    assert first.after < first.before
    again = distill_checkpoint(out, half, recipe)
    assert again.before == pytest.approx(first.after, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"distill_steps": 0, "distill": {}}, BadRecipe, "distill_steps is 0; give a positive number"),
        ({"calibration": "no-such-file.txt"}, SubnibbleError, "no-such-file.txt"),
        ({"num_windows": 1}, BadRecipe, "text to hold out"),
    ],
)
def test_what_cannot_be_leaves_the_checkpoint_as_it_was(
    change: dict[str, Any], error: type[Exception], said: str, gptq: Path, short: dict[str, Path], token_file: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    shutil.copytree(gptq, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    values = recipe_of("gptq", token_file, **DISTILLED).to_dict() | change

    def run() -> None:
        distill_checkpoint(out, short["llama"], Recipe.from_dict(values))

    with pytest.raises(error, match=said):
        run()
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_centres_prompts_and_norm_biases_stay(short: dict[str, Path], token_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = {"kv_bits": 3, "kv": {"key_center": "mean"}}
    quantize(short["llama"], out, recipe_of("d2quant", token_file, **more))
    add_prefix(out, "w5 w9 w2", device="cpu")
    # What is not of the checkpoint is not taken for it.
    save_file({"lm_head.weight": torch.zeros(3)}, out / "adapter.safetensors")
    before, shards = config_of(out), SafetensorsSource(out).shards()
    result = distill_checkpoint(out, short["llama"], recipe_of("d2quant", token_file, **DISTILLED))
    assert result.after <= result.before
    assert config_of(out) == before
    assert SafetensorsSource(out).shards() == shards
    assert load_file(out / "adapter.safetensors")["lm_head.weight"].tolist() == [0, 0, 0]
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert attached_cache(model).scheme.key_center == "mean"
    assert attached_cache(model).prefix.ids == (5, 9, 2)


def test_a_checkpoint_that_is_not_whole_is_refused_before_training(
    gptq: Path, short: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, recipe = tmp_path / "out", recipe_of("gptq", token_file, **DISTILLED)
    shutil.copytree(gptq, out)
    monkeypatch.setattr("subnibble.pipeline.distill_checkpoint.distill", lambda *args: pytest.fail("it was trained"))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
        with pytest.raises(OutputError, match="GB are needed to replace it; free space"):
            distill_checkpoint(out, short["llama"], recipe)
    config = config_of(out)
    config["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"]["rows"] = 81
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"up_proj\.\S+ has shape .* do not belong together"):
        distill_checkpoint(out, short["llama"], recipe)


def test_a_checkpoint_whose_scales_are_no_numbers_is_refused_before_training(
    gptq: Path, short: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.1.mlp.up_proj.scales"
    folder = spoiled_copy(gptq, tmp_path / "spoiled", name, "not finite")
    monkeypatch.setattr("subnibble.distill.train._Training.run", lambda *args: pytest.fail("it was trained"))
    with pytest.raises(CheckpointError, match=f"{name} is not finite"):
        distill_checkpoint(folder, short["llama"], recipe_of("gptq", token_file, **DISTILLED))


@pytest.mark.parametrize("damaged", ["[1]", "{", '"report"', b"\xff\xfe"])
def test_a_damaged_report_is_refused_before_work(
    damaged: str | bytes,
    gptq: Path,
    short: dict[str, Path],
    token_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(gptq, out)
    (out / "report.json").write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    monkeypatch.setattr("subnibble.pipeline.distill_checkpoint.distill", lambda *args: pytest.fail("it was trained"))
    monkeypatch.setattr("subnibble.generate.prefix.load_model", lambda *args: pytest.fail("it was loaded"))
    with pytest.raises(CheckpointError, match=r"report\.json .* remove it, or quantize the model again"):
        distill_checkpoint(out, short["llama"], recipe_of("gptq", token_file, **DISTILLED))
    with pytest.raises(CheckpointError, match=r"report\.json .* remove it"):
        add_prefix(out, "w5 w9")


def test_nothing_to_learn_is_said(gptq: Path, short: dict[str, Path], token_file: Path, tmp_path: Path) -> None:
    out, nothing = tmp_path / "out", {"tokens": 192, "scales": False, "norms": False}
    shutil.copytree(gptq, out)
    with pytest.raises(BadRecipe, match="out has nothing to learn with distill scales = False, zero_points = True, "):
        distill_checkpoint(out, short["llama"], recipe_of("gptq", token_file, distill_steps=4, distill=nothing))


def test_both_models_must_be_what_they_should(
    gptq: Path, short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    out, recipe = tmp_path / "out", recipe_of("gptq", token_file, **DISTILLED)
    shutil.copytree(gptq, out)
    with pytest.raises(CheckpointError, match=r"model_type is 'mistral', and .* has 'llama'; give the model"):
        distill_checkpoint(out, short["mistral"], recipe)
    with pytest.raises(CheckpointError, match=r"num_attention_heads is 3, and .* has 6"):
        distill_checkpoint(out, short["llama-tied"], recipe)
    # The same shapes, another function.
    other = tmp_path / "other"
    shutil.copytree(short["llama"], other)
    config = config_of(other)
    config["rope_parameters"]["rope_theta"] = 77.0
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"rope_parameters is .*77\.0.*; give the model"):
        distill_checkpoint(out, other, recipe)
    with pytest.raises(CheckpointError, match="quantized already"):
        distill_checkpoint(out, out, recipe)
    with pytest.raises(CheckpointError, match="quantize the model first"):
        distill_checkpoint(short["llama"], short["llama"], recipe)
    with pytest.raises(CheckpointError, match="is no folder"):
        distill_checkpoint(tmp_path / "nowhere", short["llama"], recipe)


def test_the_command_says_what_it_did(short: dict[str, Path], token_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(short["llama"], out, recipe_of("quarot", token_file))
    arguments = [
        "distill", str(out), "--original", str(short["llama"]), "--steps", "8", "--distill-option", "tokens=192",
        "--distill-option", "rate=0.02", "--calibration", str(token_file), "--num-windows", "32", "--window", "24",
        "--dtype", "float32", "--device", "cpu",
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (done,) = json.loads((out / "report.json").read_text())["distilled_later"]
    assert f"distilled in 8 steps: KL from the original {done['before']:.3f} before" in result.output
    quantize(short["llama"], tmp_path / "once", recipe_of("quarot", token_file, **DISTILLED))
    once, later = tensors_of(tmp_path / "once"), tensors_of(out)
    assert all(torch.equal(once[key], later[key]) for key in once)

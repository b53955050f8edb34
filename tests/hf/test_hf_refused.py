"""A checkpoint that is not whole, of another model, of a newer format or quantized already is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import subnibble
from spoiled_checkpoint import spoiled_copy
from subnibble import Recipe
from subnibble.errors import CheckpointError
from subnibble.hf import load_model


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.scales"])
@pytest.mark.parametrize("how", ["missing", "misshapen", "another type", "one too many"])
def test_packed_checkpoint_that_is_not_whole_is_refused(
    how: str, name: str, packed: dict[str, Path], tmp_path: Path
) -> None:
    folder = spoiled_copy(packed["llama"], tmp_path / "spoiled", name, how)
    if how == "another type" and name == "model.norm.weight":
        assert AutoModelForCausalLM.from_pretrained(folder).model.norm.weight.dtype == torch.float32
        return
    with pytest.raises(CheckpointError, match=re.escape(name)):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.scales", "model.embed_tokens.scales"])
def test_scales_that_are_no_numbers_are_refused(name: str, packed: dict[str, Path], tmp_path: Path) -> None:
    folder = spoiled_copy(packed["llama"], tmp_path / "spoiled", name, "not finite")
    with pytest.raises(CheckpointError, match=re.escape(f"{name} is not finite; fetch or quantize the model again")):
        load_model(folder)


@pytest.mark.parametrize("name", ["key_center.mean", "prefix.values"])
def test_what_attentions_hold_beside_weights_is_refused_if_it_is_no_number(
    name: str, folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    recipe = Recipe(
        method="none", calibration=str(token_file), num_windows=2, window=32, device="cpu", kv_bits=4,
        kv={"key_center": "mean"}, system_prompt="w1 w2",
    )  # fmt: skip
    subnibble.quantize(folders["llama"], tmp_path / "out", recipe)
    name = f"model.layers.1.self_attn.{name}"
    folder = spoiled_copy(tmp_path / "out", tmp_path / "spoiled", name, "not finite")
    with pytest.raises(CheckpointError, match=re.escape(f"{name} is not finite; fetch or quantize the model again")):
        load_model(folder)


@pytest.mark.parametrize("how", ["missing", "misshapen", "one too many"])
def test_plain_checkpoint_that_is_not_whole_is_refused(how: str, folders: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    folder = spoiled_copy(folders["llama"], tmp_path / "spoiled", name, how)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load_model(folder)


def test_head_that_differs_from_a_tied_embedding_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "two-heads"
    folder.mkdir()
    for file in folders["llama-tied"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe(method="rtn", bits=4, group_size=16, embedding_bits=8)
    subnibble.quantize(folder, tmp_path / "same", recipe)
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        subnibble.quantize(folder, tmp_path / "other", recipe)
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        load_model(folder)


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("model.layers.0.mlp.up_proj", {"rows": 81}, "packs model.layers.0.mlp.up_proj as 81 x 48"),
        ("model.layers.9.mlp.up_proj", {}, "which this model does not have"),
    ],
)
def test_config_of_another_model_is_refused(
    path: str, change: dict[str, int], message: str, packed: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for file in packed["llama"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    modules[path] = modules["model.layers.0.mlp.up_proj"] | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_newer_format_is_refused(packed: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "newer"
    folder.mkdir()
    for file in packed["llama"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="format version 7"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_packed_model_is_not_quantized_again(packed: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="quantized already"):
        subnibble.quantize(packed["llama"], tmp_path / "out", Recipe(method="rtn"))

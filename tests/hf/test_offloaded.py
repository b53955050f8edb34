"""A packed model whose modules accelerate keeps on disk runs, and is saved, as it is in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import subnibble
from spoiled_checkpoint import renew_checksums
from subnibble.errors import BadArgument, CheckpointError
from subnibble.hf import packed_modules

IDS = torch.tensor([[5, 9, 12, 40, 3, 7, 1, 22]])
BLOCKS = [f"model.layers.{index}" for index in range(3)]
PLACES = ["model.embed_tokens", *BLOCKS, "model.norm", "model.rotary_emb", "lm_head"]
OFF = {"a block": BLOCKS[:1], "tables": ["model.embed_tokens", "lm_head"], "norm": ["model.norm"], "all": PLACES}
# Together: every kind of module that holds stored tensors, and every one that reads another's.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "norm biases": ("llama", {"method": "d2quant", "embedding_bits": 8}),
    "tied head": ("qwen2", {"method": "rtn", "embedding_bits": 8}),
    "salient": ("llama", {"method": "serq", "activation_bits": 4, "options": {"rank": 8}}),
    "low rank": ("llama", {"method": "qera", "activation_bits": 4, "options": {"rank": 8}}),
    "cache": (
        "llama",
        {
            "method": "quarot", "activation_bits": 4, "kv_bits": 4, "system_prompt": "w5 w9 w2",
            "kv": {"key_center": "mean", "key_rotation": "hadamard", "group_size": 16},
        },
    ),
    "matrix before a head": ("llama-tied", {"method": "quarot"}),
    "matrix before a table": ("qwen2", {"method": "quarot", "embedding_bits": 8}),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(
    folders: dict[str, Path], token_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Packed folders by what is in them."""
    root = tmp_path_factory.mktemp("offloaded")
    for name, (model, recipe) in RECIPES.items():
        settings = {"bits": 4, "group_size": 16, "calibration": token_file, "num_windows": 8, "window": 24}
        subnibble.quantize(folders[model], root / name, settings | recipe)
    return {name: root / name for name in RECIPES}


def load(folder: Path, off: list[str], disk: Path, buffers: bool = True) -> Any:
    device_map = dict.fromkeys(PLACES, "cpu") | dict.fromkeys(off, "disk")
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map=device_map, offload_folder=disk, offload_buffers=buffers
    ).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


@pytest.mark.pairwise
@pytest.mark.parametrize("buffers", [True, False])
@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_on_disk_runs_as_in_memory(
    name: str, off: str, buffers: bool, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(checkpoints[name], dtype=torch.float32).eval())
    model = load(checkpoints[name], OFF[off], tmp_path / "disk", buffers)
    if buffers and off == "all":
        assert all(buffer.is_meta for module in packed_modules(model).values() for buffer in module.buffers())
    assert torch.equal(logits(model), expected)
    # Once more, after all was taken away again.
    assert torch.equal(logits(model), expected)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_on_disk_is_saved_and_made_dense_as_in_memory(
    name: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = load(checkpoints[name], PLACES, tmp_path / "disk")
    whole = AutoModelForCausalLM.from_pretrained(checkpoints[name], dtype=torch.float32).eval()
    for path, module in packed_modules(model).items():
        assert torch.equal(module.dequantize(), whole.get_submodule(path).dequantize())
    model.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert torch.equal(logits(saved), logits(whole))


def test_damaged_numbers_on_disk_are_found_as_in_memory(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in checkpoints["norm biases"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    name = "model.layers.0.post_attention_layernorm.bias"
    shard = next(file for file in folder.glob("*.safetensors") if name in load_file(file))
    held = load_file(shard)
    held[name][0] = torch.inf
    save_file(held, shard, metadata={"format": "pt"})
    renew_checksums(folder)
    with pytest.raises(CheckpointError, match=r"post_attention_layernorm\.bias is not finite"):
        load(folder, BLOCKS, tmp_path / "disk")


def test_biases_are_not_folded_into_what_is_on_disk(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="give one that is in memory"):
        subnibble.fold_norm_biases_(load(checkpoints["norm biases"], BLOCKS, tmp_path / "disk"))

"""A model's tensors are found under the names that wrappers and tools give them, where there is no doubt."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import CONFIGS, random_model
from subnibble import Recipe, quantize
from subnibble.arch import find_arch
from subnibble.checkpoint.names import model_names
from subnibble.checkpoint.opening import open_source
from subnibble.checkpoint.weight_files import SINGLE
from subnibble.errors import CheckpointError
from subnibble.hf import load_model
from subnibble.model.skeleton import Skeleton

Rename = Callable[[str], str]
NAMES = list(random_model("llama").state_dict())
HERE = Path("here")


def nested(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def compiled_blocks(name: str) -> str:
    return name.replace("layers.1.", "layers.1._orig_mod.")


RENAMES: dict[str, Rename] = {
    "as they are": lambda name: name,
    "bare": lambda name: name.removeprefix("model."),
    "compiled": lambda name: f"_orig_mod.{name}",
    "blocks compiled": compiled_blocks,
    "distributed": lambda name: f"module.{name}",
    "sharded": lambda name: f"_fsdp_wrapped_module.{name.replace('.mlp.', '._fsdp_wrapped_module.mlp.')}",
    "trained": lambda name: f"model.{name}",
    "peft's": lambda name: f"base_model.model.{name}",
    "a wrapper's": lambda name: f"language_model.{name}",
    "in a multimodal model": nested,
    "compiled, distributed and peft's": lambda name: f"module._orig_mod.base_model.model.{name}",
}


@pytest.mark.parametrize("rename", RENAMES.values(), ids=RENAMES)
def test_a_models_tensors_are_found_under_other_names(rename: Rename) -> None:
    result = model_names(map(rename, NAMES), find_arch("llama"), False, HERE)
    assert result == {name: rename(name) for name in NAMES}


def test_a_table_under_the_heads_name_is_the_embeddings_of_a_model_that_ties_them() -> None:
    alone = [name for name in NAMES if name != "model.embed_tokens.weight"]
    arch = find_arch("llama")
    assert model_names(alone, arch, True, HERE)["model.embed_tokens.weight"] == "lm_head.weight"
    assert "model.embed_tokens.weight" not in model_names(alone, arch, False, HERE)
    both = model_names(NAMES, arch, True, HERE)
    assert both == {name: name for name in NAMES}


def test_of_two_decoders_none_is_chosen() -> None:
    two = [f"{root}.{name}" for name in NAMES for root in ("student", "teacher")]
    with pytest.raises(CheckpointError, match=r"2 decoders \(student\.model\.layers\.0.*, teacher\.model\.layers\.0"):
        model_names(two, find_arch("llama"), False, HERE)


def test_a_tensor_that_is_there_twice_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and _orig_mod\.lm_head\.weight are both"):
        model_names([*NAMES, "_orig_mod.lm_head.weight"], find_arch("llama"), False, HERE)


def test_the_models_own_names_go_before_others() -> None:
    result = model_names([*NAMES, *(f"ema.{name}" for name in NAMES)], find_arch("llama"), False, HERE)
    assert {name: result[name] for name in NAMES} == {name: name for name in NAMES}
    assert sum(name.startswith("ema.") for name in result) == len(NAMES)


def renamed(folders: dict[str, Path], name: str, folder: Path, rename: Rename) -> Path:
    shutil.copytree(folders[name], folder)
    held = {rename(key): tensor for key, tensor in load_file(folder / SINGLE).items()}
    save_file(held, folder / SINGLE, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("name", "kind"), [("llama", "bare"), ("llama-tied", "peft's"), ("qwen3", "blocks compiled")])
def test_renamed_checkpoints_give_the_same_model_and_the_same_bytes(
    name: str, kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    other = renamed(folders, name, tmp_path / "other", RENAMES[kind])
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        models = [load_model(folder, "float32", "cpu") for folder in (folders[name], other)]
        assert torch.equal(models[0](ids).logits, models[1](ids).logits)
    assert models[0].generation_config.to_dict() == models[1].generation_config.to_dict()
    recipe = Recipe(method="rtn", bits=8, group_size=16)
    reports = [
        quantize(folder, tmp_path / f"out-{index}", recipe) for index, folder in enumerate((folders[name], other))
    ]
    assert reports[0].weights_sha256 == reports[1].weights_sha256


def test_a_tied_head_alone_gives_the_same_model(folders: dict[str, Path], tmp_path: Path) -> None:
    assert CONFIGS["llama-tied"].tie_word_embeddings
    other = renamed(
        folders, "llama-tied", tmp_path / "other", lambda name: name.replace("model.embed_tokens", "lm_head")
    )
    assert "lm_head.weight" in load_file(other / SINGLE)
    read = load_model(other, "float32", "cpu")
    for key, parameter in random_model("llama-tied").named_parameters():
        assert torch.equal(read.get_parameter(key), parameter), key


def test_other_layouts_are_told_with_what_the_file_has(folders: dict[str, Path], tmp_path: Path) -> None:
    other = renamed(folders, "llama", tmp_path / "other", lambda name: name.replace("model.layers", "transformer.h", 1))
    with pytest.raises(CheckpointError, match=r"is missing \(\d+ of \d+ in all\).*has transformer\.h\.0\S+ instead"):
        Skeleton(open_source(other), torch.float32, torch.device("cpu"))

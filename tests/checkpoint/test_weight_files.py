"""Of all that lies in a folder, what `from_pretrained` reads is what is read; what it would not read is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import random_model, save_model
from subnibble.checkpoint.opening import open_source
from subnibble.checkpoint.weight_files import INDEX, SINGLE
from subnibble.errors import CheckpointError
from subnibble.hf import load_model

EXPLICIT = "transformers_weights"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return save_model("llama", tmp_path / "single")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_model("llama", tmp_path / "sharded", shard_size="60KB")


def with_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def other_shards(folder: Path) -> None:
    """Put the shards of another model into a folder, with their index."""
    random_model("llama", seed=5).save_pretrained(folder / "other", max_shard_size="60KB")
    for file in (folder / "other").glob("model*"):
        file.rename(folder / file.name)
    shutil.rmtree(folder / "other")


def assert_as_transformers_reads(folder: Path) -> None:
    source = open_source(folder)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert set(source.names()) == set(whole)
    for name, tensor in whole.items():
        assert torch.equal(source.load(name), tensor), name


def test_one_file_goes_before_shards_of_another_model(single: Path) -> None:
    other_shards(single)
    assert_as_transformers_reads(single)


def test_an_index_that_an_earlier_save_left_is_passed_over(sharded: Path) -> None:
    random_model("llama", seed=5).save_pretrained(sharded)
    assert (sharded / INDEX).is_file()
    assert (sharded / SINGLE).is_file()
    assert_as_transformers_reads(sharded)


def test_a_damaged_index_beside_the_one_file_is_passed_over(single: Path) -> None:
    (single / INDEX).write_text("{")
    assert_as_transformers_reads(single)


@pytest.mark.parametrize("name", ["consolidated.safetensors", "model.fp16.safetensors", "more.safetensors"])
def test_other_weights_beside_the_one_file_are_passed_over(name: str, single: Path) -> None:
    save_file({"tok_embeddings.weight": torch.zeros(2, 2)}, single / name)
    assert_as_transformers_reads(single)


def test_what_the_config_names_goes_before_all(single: Path) -> None:
    (single / SINGLE).rename(single / "mine.safetensors")
    other_shards(single)
    with_config(single, **{EXPLICIT: "mine.safetensors"})
    assert_as_transformers_reads(single)
    assert not hasattr(open_source(single).config, EXPLICIT)
    with_config(single, **{EXPLICIT: INDEX})
    assert_as_transformers_reads(single)


@pytest.mark.parametrize("name", ["../single/model.safetensors", "none.safetensors", "config.json"])
def test_what_the_config_names_and_is_not_there_is_told(name: str, single: Path) -> None:
    with_config(single, **{EXPLICIT: name})
    with pytest.raises(CheckpointError, match="as transformers_weights, which is no"):
        open_source(single)


def test_tensors_that_an_index_does_not_list_are_read_from_its_shards(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    del index["weight_map"]["model.layers.0.mlp.up_proj.weight"]
    (sharded / INDEX).write_text(json.dumps(index))
    assert_as_transformers_reads(sharded)


def test_an_index_of_another_upload_is_told_from_a_download_that_is_incomplete(sharded: Path) -> None:
    shards = sorted(sharded.glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=rf"shard {shards[1].name} is missing; fetch the model again"):
        open_source(sharded)
    shards[0].rename(sharded / "model-00001-of-00099.safetensors")
    with pytest.raises(CheckpointError, match=r"not list model-00001-of-00099\.safetensors .* of another upload"):
        open_source(sharded)


def test_a_tensor_in_two_shards_is_named(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    again = dict(list(load_file(first).items())[:1])
    save_file(load_file(second) | again, second, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{next(iter(again))} is in {first.name} and in {second.name}"):
        open_source(sharded)


def renamed(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / SINGLE).rename(folder / name)


def move_away(folder: Path) -> None:
    (folder / "checkpoint-500").mkdir()
    (folder / SINGLE).rename(folder / "checkpoint-500" / SINGLE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed("model.fp16.safetensors"), "variant, model.fp16.safetensors: remove"),
        (renamed("model.fp16-00001-of-00002.safetensors"), "variant, model.fp16-00001-of-00002.safetensors: remove"),
        (renamed("consolidated.00.safetensors"), "consolidated.00.safetensors has the maker's own layout"),
        (renamed("model-00001-of-00002.safetensors"), f"without their index: fetch {INDEX}"),
        (renamed("weights.safetensors"), f"if weights.safetensors holds the model, rename it to {SINGLE}"),
        (renamed("model.gguf"), "to read its GGUF file, give"),
        (renamed("model.bin"), "only pickle weights (model.bin)"),
        (lambda folder: (folder / SINGLE).unlink(), "no weights at all: fetch them"),
        (move_away, "give"),
    ],
)
def test_a_folder_without_the_weights_tells_what_it_has(
    change: Callable[[Path], object], message: str, single: Path
) -> None:
    change(single)
    with pytest.raises(CheckpointError, match=f"neither {SINGLE} nor {INDEX}; ") as error:
        open_source(single)
    assert message in str(error.value)
    assert (str(single / "checkpoint-500") in str(error.value)) == (change is move_away)


def test_a_git_lfs_pointer_is_told_from_a_truncated_file(single: Path) -> None:
    for name in (SINGLE, "config.json"):
        (single / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
        with pytest.raises(CheckpointError, match=rf"{name} is a (Git LFS pointer|pointer of Git LFS).*git lfs pull"):
            open_source(single)
    (single / "model.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(CheckpointError, match=r"model\.gguf is a Git LFS pointer"):
        open_source(single / "model.gguf")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_the_weights_is_not_passed_over(name: str, single: Path) -> None:
    (single / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"holds a PEFT adapter \({name}\) .*merge_and_unload"):
        open_source(single)


def test_an_adapter_alone_names_its_base_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(CheckpointError, match=r"is a PEFT adapter .* and no model; merge it into .* owner/base"):
        open_source(tmp_path)


def test_a_folder_without_config_tells_what_it_has(single: Path) -> None:
    (single / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json; give the folder of a Hugging Face checkpoint"):
        open_source(single)
    (single / "m.gguf").touch()
    with pytest.raises(CheckpointError, match=rf"has no config\.json; to read its GGUF file, give {single}/m\.gguf"):
        open_source(single)


def test_a_config_that_starts_with_a_byte_order_mark_is_read(single: Path) -> None:
    config, target = single / "config.json", load_model(single)
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    actual = load_model(single)
    assert all(torch.equal(*pair) for pair in zip(actual.parameters(), target.parameters(), strict=True))


def test_a_weight_file_as_model_leads_to_its_folder(single: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"no \.gguf file; give its folder, {single}"):
        open_source(single / SINGLE)

"""Reading checkpoints: what is intact is read, what is not is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import save_model
from subnibble import Recipe, quantize
from subnibble.checkpoint import opening
from subnibble.checkpoint.opening import open_source
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.checkpoint.size import measure
from subnibble.checkpoint.weight_files import INDEX, SINGLE
from subnibble.errors import CheckpointError, UnsupportedModel
from subnibble.hf import load_model
from subnibble.model.skeleton import Skeleton


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = save_model("llama", tmp_path / "sharded", shard_size="60KB")
    assert (folder / INDEX).is_file()
    return folder


@pytest.fixture
def single(tmp_path: Path) -> Path:
    folder = save_model("llama", tmp_path / "single")
    assert (folder / SINGLE).is_file()
    return folder


def open_fully(folder: Path) -> None:
    """Everything that is checked before any weight is read."""
    Skeleton(open_source(folder), torch.float32, torch.device("cpu"))


def rewrite(folder: Path, change: object) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)  # type: ignore[operator]
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def test_shards_hold_the_same_tensors_as_one_file(sharded: Path, single: Path) -> None:
    one, many = SafetensorsSource(single), SafetensorsSource(sharded)
    assert set(one.names()) == set(many.names())
    for name in one.names():
        assert torch.equal(one.load(name), many.load(name))
        assert one.shape(name) == many.shape(name)
    assert measure(one).effective_bits == measure(many).effective_bits == 32


def test_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"shard {shard.name} is missing"):
        open_source(sharded)


def test_truncated_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{shard.name} is truncated"):
        open_source(sharded)


def test_index_that_misplaces_a_tensor_is_found(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    name = next(n for n, f in index["weight_map"].items() if f == files[0])
    index["weight_map"][name] = files[1]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="which does not hold it"):
        open_source(sharded)


def test_index_may_not_point_outside_the_folder(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "../other.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside the folder"):
        open_source(sharded)


def test_damaged_index_is_named(sharded: Path) -> None:
    (sharded / INDEX).write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        open_source(sharded)


def test_missing_tensor_is_found_before_any_weight_is_read(single: Path) -> None:
    rewrite(single, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        open_fully(single)


def test_wrong_shape_is_found_before_any_weight_is_read(single: Path) -> None:
    rewrite(single, lambda t: t.update({"lm_head.weight": torch.zeros(95, 48)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \(95, 48\) where config.json asks for"):
        open_fully(single)


def test_tensor_without_a_place_is_found(single: Path) -> None:
    rewrite(single, lambda t: t.update({"model.layers.0.mlp.extra.weight": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match="has no place"):
        open_fully(single)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(bad: float, single: Path) -> None:
    rewrite(single, lambda t: t["model.layers.0.mlp.up_proj.weight"].view(-1)[5].fill_(bad))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight has 1 NaN or infinite"):
        open_source(single).load("model.layers.0.mlp.up_proj.weight")


def test_integer_weights_are_refused(single: Path) -> None:
    rewrite(single, lambda t: t.update({"lm_head.weight": torch.zeros(96, 48, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match="quantized already"):
        open_source(single).load("lm_head.weight")


def test_pickle_weights_are_never_read(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (single / SINGLE).unlink()
    torch.save({"x": torch.zeros(1)}, single / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a pickle was loaded"))
    with pytest.raises(CheckpointError, match="only pickle weights"):
        open_source(single)


def test_unknown_architecture_lists_the_supported_ones(single: Path) -> None:
    config = json.loads((single / "config.json").read_text())
    config |= {"model_type": "gpt2", "n_layer": 2, "architectures": ["GPT2LMHeadModel"]}
    (single / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"'gpt2' is not supported; supported: llama, mistral, qwen2, qwen3"):
        open_fully(single)


@pytest.mark.parametrize("content", ["{", "[]", '{"hidden_size": 3}'])
def test_bad_config_is_named(content: str, single: Path) -> None:
    (single / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_source(single)


@pytest.mark.parametrize("name", ["/no/such/folder", "nowhere", "./x/y", "missing.gguf"])
def test_path_that_is_nowhere_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_source(name)


def test_truncated_gguf_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(CheckpointError, match="truncated or no GGUF"):
        open_source(file)


def test_hub_id_is_fetched_without_pickles_or_code(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, object] = {}

    def fetch(repo: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.update(repo=repo, patterns=allow_patterns, others=ignore_patterns)
        return str(single)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert open_source("owner/name").path == single
    assert asked["repo"] == "owner/name"
    files = ["model.safetensors", "tokenizer.json", "consolidated.safetensors", "original/model.safetensors", "x.bin"]
    files += ["model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors", "adapter_model.safetensors"]
    target = filter_repo_objects(files, allow_patterns=asked["patterns"], ignore_patterns=asked["others"])
    assert list(target) == ["model.safetensors", "tokenizer.json"]
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in asked["patterns"])  # type: ignore[attr-defined]


def test_hub_id_that_cannot_be_fetched_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*args: object, **kwargs: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match="the hub did not give it"):
        opening.open_source("owner/name")


def test_sizes_of_a_packed_folder_count_every_stored_bit(single: Path, tmp_path: Path, token_file: Path) -> None:
    import subnibble

    recipe = subnibble.Recipe(method="rtn", bits=3, group_size=32, embedding_bits=8)
    report = subnibble.quantize(single, tmp_path / "out", recipe)
    result = measure(open_source(tmp_path / "out"))
    bits = weights = 0
    for file in (tmp_path / "out").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if ".layers." in name and name.endswith((".codes", ".scales", ".zeros")):
                bits += 8 * tensor.nbytes
    for linear in report.linears:
        weights += linear.shape[0] * linear.shape[1]
    assert result.effective_bits == bits / weights
    assert result.file_bytes == sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert result.parameters == sum(t.numel() for t in load_file(single / SINGLE).values())


@pytest.mark.parametrize("file", [3, None, ["model-00001-of-00002.safetensors"]])
def test_an_index_of_other_things_than_names_is_damaged(file: object, sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = file
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="is damaged"):
        open_source(sharded)


def with_config(folder: Path, **values: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


@pytest.mark.parametrize("table", ["gptq", 4, ["gptq"]])
def test_a_quantization_config_that_is_no_table_is_named(table: object, single: Path) -> None:
    with pytest.raises(CheckpointError, match="quantization_config is no table"):
        open_source(with_config(single, quantization_config=table))


def test_what_others_quantized_is_named_and_not_read(single: Path) -> None:
    with_config(single, quantization_config={"quant_method": "gptq", "bits": 4})
    for use in (measure, load_model):
        with pytest.raises(CheckpointError, match=r"quantized as 'gptq' and cannot be .*`subnibble convert`"):
            use(open_source(single))


def test_parameters_of_a_stored_tied_head_count_once(folders: dict[str, Path], tmp_path: Path) -> None:
    once = measure(open_source(folders["llama-tied"]))
    twice = shutil.copytree(folders["llama-tied"], tmp_path / "twice")
    tensors = load_file(twice / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, twice / "model.safetensors", metadata={"format": "pt"})
    assert measure(open_source(twice)).parameters == once.parameters


@pytest.mark.parametrize(("method", "ending"), [("d2quant", "norm.bias"), ("d2quant-plus", "o_proj.column_scale")])
def test_a_packed_tensor_that_is_missing_is_named(
    method: str, ending: str, folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    recipe = Recipe(method, bits=2, group_size=16, calibration=str(token_file), num_windows=4, window=32)
    quantize(folders["llama"], tmp_path / "out", recipe)
    source = SafetensorsSource(tmp_path / "out")
    shard, name = next(
        (file, name) for file, names in source.shards().items() for name in names if name.endswith(ending)
    )
    save_file({key: part for key, part in load_file(shard).items() if key != name}, shard, metadata={"format": "pt"})
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    del index["weight_map"][name]
    (tmp_path / "out" / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        measure(open_source(tmp_path / "out"))

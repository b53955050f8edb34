"""A packed checkpoint is an ordinary transformers model to its users."""

from __future__ import annotations

import copy
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import subnibble
from subnibble import Recipe
from subnibble.errors import CheckpointError
from subnibble.hf import load_model, memory_bytes, packed_modules
from test_conformance import dense_twin


@pytest.fixture(scope="module")
def packed(folders: dict[str, Path], token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("packed")
    for name in ("llama", "qwen2"):
        recipe = Recipe(
            bits=4, group_size=16, embedding_bits=8, calibration=str(token_file), num_windows=8, window=32
        )  # fmt: skip
        subnibble.quantize(folders[name], root / name, recipe)
    return {name: root / name for name in ("llama", "qwen2")}


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_that_of_the_dense_model(
    name: str, beams: int, packed: dict[str, Path], folders: dict[str, Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed[name], dtype=torch.float32)
    twin = dense_twin(folders[name], model)
    ids = torch.tensor([[0, 0, 5, 9, 12], [3, 4, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings), twin.generate(ids, **settings))


def test_left_padding_in_a_batch_changes_nothing(packed: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed["llama"], dtype=torch.float32)
    ids = torch.tensor([[0, 0, 5, 9, 12], [3, 4, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    alone = model.generate(ids[:1, 2:], max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(batch[0, 5:], alone[0, 3:])


def test_linears_keep_packed_codes_in_memory(packed: dict[str, Path], folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed["llama"], dtype=torch.float32)
    modules = packed_modules(model)
    assert len(modules) == 3 * 7 + 2
    for path, module in modules.items():
        assert not hasattr(module, "weight"), path
        stored = 8 * sum(buffer.nbytes for buffer in module.buffers())
        assert stored == module.layout.stored_bits
    assert memory_bytes(model) < 0.3 * memory_bytes(AutoModelForCausalLM.from_pretrained(folders["llama"]))


def test_tied_head_stays_tied(packed: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed["qwen2"])
    assert "lm_head" not in {name.split(".")[0] for name in model.state_dict()}
    twin = copy.deepcopy(model)
    twin.model.embed_tokens.scales.zero_()
    ids = torch.tensor([[1, 2, 3]])
    assert not bool(twin(ids).logits.any())
    assert bool(model(ids).logits.any())
    model.tie_weights()
    assert bool(model(ids).logits.any())


def test_dtype_of_loading_leaves_scales_alone(packed: dict[str, Path]) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(packed["llama"], dtype=dtype)
        assert {m.scales.dtype for m in packed_modules(model).values()} == {torch.float16}
        assert model.model.norm.weight.dtype == dtype
        assert model(torch.tensor([[1, 2]])).logits.dtype == dtype


def test_folder_holds_what_users_expect(packed: dict[str, Path]) -> None:
    names = {file.name for file in packed["llama"].iterdir()}
    assert {"config.json", "recipe.toml", "report.json", "tokenizer.json", "generation_config.json"} <= names
    assert AutoTokenizer.from_pretrained(packed["llama"])("w3 w5")["input_ids"] == [3, 5]
    report = json.loads((packed["llama"] / "report.json").read_text())
    assert len(report["linears"]) == 21
    assert all(0 < linear["output_error"] < 1 for linear in report["linears"])
    assert Recipe.from_toml(packed["llama"] / "recipe.toml").options["order"] == "gar"


def test_recipe_beside_a_checkpoint_makes_the_same_bytes(
    packed: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    recipe = Recipe.from_toml(packed["llama"] / "recipe.toml")
    report = subnibble.quantize(folders["llama"], tmp_path / "again", recipe)
    assert report.weights_sha256 == json.loads((packed["llama"] / "report.json").read_text())["weights_sha256"]


def test_norm_bias_is_loaded_and_added(packed: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "biased"
    folder.mkdir()
    for file in packed["llama"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = "model.layers.1.post_attention_layernorm"
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules"][path] = {"kind": "norm_bias", "rows": 48}
    (folder / "config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = index["weight_map"][f"{path}.weight"]
    index["weight_map"][f"{path}.bias"] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    bias = torch.linspace(-1, 1, 48)
    save_file(load_file(folder / file) | {f"{path}.bias": bias}, folder / file, metadata={"format": "pt"})
    plain = AutoModelForCausalLM.from_pretrained(packed["llama"], dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    x = torch.randn(2, 48)
    assert torch.equal(model.get_submodule(path)(x), plain.get_submodule(path)(x) + bias)


def spoiled_copy(source: Path, folder: Path, name: str, how: str) -> Path:
    """A copy of a checkpoint with one tensor missing, misshapen, of another type, or one too many."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    index = folder / "model.safetensors.index.json"
    shard = json.loads(index.read_text())["weight_map"][name] if index.is_file() else "model.safetensors"
    tensors = load_file(folder / shard)
    if how == "missing":
        del tensors[name]
    elif how == "misshapen":
        tensors[name] = tensors[name][1:].contiguous()
    elif how == "another type":
        tensors[name] = tensors[name].double()
    else:
        tensors[name + "_more"] = torch.zeros(1)
    save_file(tensors, folder / shard, metadata={"format": "pt"})
    return folder


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


def test_weights_are_rounded_in_float32_whatever_the_type_of_computing(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    reports = [
        subnibble.quantize(folders["llama"], tmp_path / dtype, Recipe(method="rtn", bits=8, group_size=16, dtype=dtype))
        for dtype in ("float32", "bfloat16")
    ]
    assert reports[0].weights_sha256 == reports[1].weights_sha256


def test_default_dtype_of_torch_does_not_matter(folders: dict[str, Path], token_file: Path, tmp_path: Path) -> None:
    recipe = Recipe(bits=3, group_size=16, calibration=str(token_file), num_windows=4, window=32)
    hashes = [subnibble.quantize(folders["llama"], tmp_path / "a", recipe).weights_sha256]
    torch.set_default_dtype(torch.float64)
    try:
        hashes.append(subnibble.quantize(folders["llama"], tmp_path / "b", recipe).weights_sha256)
    finally:
        torch.set_default_dtype(torch.float32)
    assert hashes[0] == hashes[1]


def test_files_are_as_readable_as_their_folder(packed: dict[str, Path]) -> None:
    modes = {file.stat().st_mode & 0o777 for file in packed["llama"].iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_keep_their_type(
    dtype: torch.dtype, folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=dtype).save_pretrained(tmp_path / "half")
    recipe = Recipe(bits=4, group_size=16, calibration=str(token_file), num_windows=4, window=32)
    subnibble.quantize(tmp_path / "half", tmp_path / "out", recipe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == dtype
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert torch.equal(model.model.embed_tokens.weight, original.model.embed_tokens.weight)
    assert torch.equal(model.model.norm.weight, original.model.norm.weight)


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
    config["quantization_config"]["format_version"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="format version 3"):
        AutoModelForCausalLM.from_pretrained(folder)


O_PROJ = "model.layers.1.self_attn.o_proj"


@pytest.fixture(scope="module")
def scaled(folders: dict[str, Path], token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama` with column scales of every linear; those of o_proj have nothing to absorb them."""
    out = tmp_path_factory.mktemp("scaled") / "llama"
    recipe = Recipe(
        method="d2quant", bits=3, group_size=16, embedding_bits=8, calibration=str(token_file), num_windows=4,
        window=32, options={"columns": "all", "iterations": 3},
    )  # fmt: skip
    subnibble.quantize(folders["llama"], out, recipe)
    return out


def test_column_scales_are_loaded_in_float16_whatever_the_type_of_loading(scaled: Path) -> None:
    ids = torch.arange(24).view(2, 12)
    outputs = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = AutoModelForCausalLM.from_pretrained(scaled, dtype=dtype)
        stored = {path: module.column_scale for path, module in packed_modules(model).items() if path in linears(model)}
        assert {path for path, scale in stored.items() if scale is not None} == {
            f"model.layers.{i}.self_attn.o_proj" for i in range(3)
        }
        scale = stored[O_PROJ]
        assert scale.dtype == torch.float16
        assert scale.shape == (96,)
        assert torch.equal(scale, tensor_of(scaled, f"{O_PROJ}.column_scale"))
        assert bool((scale > 0).all())
        assert len(scale.unique()) > 32
        with torch.no_grad():
            outputs[dtype] = model(ids).logits.float()
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        difference = (outputs[dtype] - outputs[torch.float32]).norm() / outputs[torch.float32].norm()
        assert float(difference) < tolerance


def linears(model: torch.nn.Module) -> set[str]:
    return {path for path in packed_modules(model) if "layers" in path}


def tensor_of(folder: Path, name: str) -> torch.Tensor:
    from safetensors.torch import load_file

    shard = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    return load_file(folder / shard)[name]


def test_generation_with_column_scales_is_that_of_the_dense_model(scaled: Path, folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(scaled, dtype=torch.float32)
    twin = dense_twin(folders["llama"], model)
    ids = torch.tensor([[1, 2, 5, 9, 12], [3, 4, 5, 6, 7]])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings), twin.generate(ids, **settings))
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(logits, twin(ids).logits)
        # The scales matter: without one of them the model is another.
        model.get_submodule(O_PROJ).column_scale.fill_(1)
        assert float((model(ids).logits - logits).norm() / logits.norm()) > 1e-3


def test_column_scales_survive_save_pretrained_bit_for_bit(scaled: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(scaled, dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    assert config["modules"][O_PROJ]["kind"] == "scaled_linear"
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(ids).logits
            for folder in (scaled, tmp_path / "saved")
        )
    assert torch.equal(before, after)


@pytest.mark.parametrize("how", ["missing", "misshapen", "another type", "one too many"])
def test_a_checkpoint_whose_column_scale_is_not_whole_is_refused(how: str, scaled: Path, tmp_path: Path) -> None:
    name = f"{O_PROJ}.column_scale"
    folder = spoiled_copy(scaled, tmp_path / "spoiled", name, how)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "version", "message"),
    [
        ("linear", 2, f"tensor {O_PROJ}.column_scale has no place"),
        ("linear", 1, "scaled_linear came with version 2"),
        ("scaled_linear", 1, "scaled_linear came with version 2"),
    ],
)
def test_a_column_scale_that_the_config_does_not_name_is_refused(
    kind: str, version: int, message: str, scaled: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    folder.mkdir()
    for file in scaled.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = version
    config["quantization_config"]["modules"][O_PROJ]["kind"] = kind
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        AutoModelForCausalLM.from_pretrained(folder)


def test_recipe_beside_a_scaled_checkpoint_makes_the_same_bytes(
    scaled: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    report = subnibble.quantize(folders["llama"], tmp_path / "again", Recipe.from_toml(scaled / "recipe.toml"))
    assert report.weights_sha256 == json.loads((scaled / "report.json").read_text())["weights_sha256"]


def test_column_scales_are_counted_in_the_effective_bits(scaled: Path) -> None:
    report = json.loads((scaled / "report.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(scaled, dtype=torch.float32)
    bits = weights = 0
    for path in linears(model):
        module = model.get_submodule(path)
        found = 8 * sum(buffer.nbytes for buffer in module.buffers())
        bits, weights = bits + found, weights + module.in_features * module.out_features
        (row,) = [row for row in report["linears"] if row["path"] == path]
        assert row["effective_bits"] == pytest.approx(found / (module.in_features * module.out_features))
    # Four norms have a bias of 48 float16 numbers.
    assert report["size"]["effective_bits"] == pytest.approx((bits + 4 * 48 * 16) / weights)


def test_packed_model_is_not_quantized_again(packed: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="quantized already"):
        subnibble.quantize(packed["llama"], tmp_path / "out", Recipe(method="rtn"))


def test_load_model_takes_plain_and_packed(packed: dict[str, Path], folders: dict[str, Path]) -> None:
    assert load_model(folders["llama"]).dtype == torch.float32
    assert packed_modules(load_model(packed["llama"], "bfloat16", "cpu"))


def test_plugin_registers_once_on_reload() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    before = AUTO_QUANTIZER_MAPPING["subnibble"], AUTO_QUANTIZATION_CONFIG_MAPPING["subnibble"]
    importlib.reload(subnibble)
    importlib.reload(sys.modules["subnibble.hf"])
    assert (AUTO_QUANTIZER_MAPPING["subnibble"], AUTO_QUANTIZATION_CONFIG_MAPPING["subnibble"]) == before


@pytest.mark.parametrize(
    "order",
    ["import subnibble, transformers", "import transformers, subnibble", "import subnibble.hf, transformers"],
)
def test_import_in_any_order_registers(order: str, packed: dict[str, Path]) -> None:
    code = f"{order}; transformers.AutoModelForCausalLM.from_pretrained({str(packed['llama'])!r})"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_import_is_light() -> None:
    code = "import sys, subnibble, subnibble.cli.main; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

"""A packed checkpoint is an ordinary transformers model to its users."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import subnibble
from spoiled_checkpoint import renew_checksums
from subnibble import Recipe
from subnibble.hf import load_model, memory_bytes, packed_modules
from test_conformance import dense_copy


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_that_of_the_dense_model(
    name: str, beams: int, packed: dict[str, Path], folders: dict[str, Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed[name], dtype=torch.float32)
    dense = dense_copy(folders[name], model)
    ids = torch.tensor([[0, 0, 5, 9, 12], [3, 4, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings), dense.generate(ids, **settings))


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
    dense = copy.deepcopy(model)
    dense.model.embed_tokens.scales.zero_()
    ids = torch.tensor([[1, 2, 3]])
    assert not bool(dense(ids).logits.any())
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
    renew_checksums(folder)
    plain = AutoModelForCausalLM.from_pretrained(packed["llama"], dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    x = torch.randn(2, 48)
    assert torch.equal(model.get_submodule(path)(x), plain.get_submodule(path)(x) + bias)


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


def test_load_model_takes_plain_and_packed(packed: dict[str, Path], folders: dict[str, Path]) -> None:
    assert load_model(folders["llama"]).dtype == torch.float32
    assert packed_modules(load_model(packed["llama"], "bfloat16", "cpu"))


def test_plugin_registers_once_on_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    before = AUTO_QUANTIZER_MAPPING["subnibble"], AUTO_QUANTIZATION_CONFIG_MAPPING["subnibble"]
    plugin = sys.modules["subnibble.hf.plugin"]
    for name in ("SubnibbleConfig", "SubnibbleQuantizer"):
        # To be there again for other tests: what is registered pickles by its name.
        monkeypatch.setattr(plugin, name, getattr(plugin, name))
    importlib.reload(subnibble)
    importlib.reload(plugin)
    assert (AUTO_QUANTIZER_MAPPING["subnibble"], AUTO_QUANTIZATION_CONFIG_MAPPING["subnibble"]) == before


# Each program in a process of its own, which has torch already, to be quick, and nothing that imports transformers.
PROGRAMS = """
import os, sys, traceback, torch
assert not {"transformers", "subnibble"} & set(sys.modules)
for program in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            exec(program, {})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(program)
"""


def test_import_in_any_order_registers(packed: dict[str, Path]) -> None:
    load = f"transformers.AutoModelForCausalLM.from_pretrained({str(packed['llama'])!r})"
    orders = ("import subnibble, transformers", "import transformers, subnibble", "import subnibble.hf, transformers")
    programs = [f"{order}; {load}" for order in orders]
    done = subprocess.run([sys.executable, "-c", PROGRAMS, *programs], check=True, capture_output=True, text=True)
    assert done.stdout == "", done.stderr


def test_public_names_are_there_after_a_plain_import() -> None:
    code = (
        "import subnibble\n"
        "for name in subnibble.__all__ * 2:\n"
        "    assert name == '__version__' or callable(getattr(subnibble, name)), name\n"
        "assert not hasattr(subnibble, 'nonsense')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_import_is_light() -> None:
    code = "import sys, subnibble, subnibble.cli.main; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

"""What config.json says is checked before anything is built of it; a run's switches change no model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Run
from subnibble import Recipe, quantize
from subnibble.checkpoint.config import read_config
from subnibble.errors import CheckpointError, UnsupportedModel
from subnibble.hf import load_model

RECIPE = Recipe("rtn", bits=4, group_size=16)


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(folders["llama"], tmp_path / "model")


def changed(folder: Path, **values: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("auto", None),
        (None, None),
        ("float16", torch.float16),
        ("torch.bfloat16", torch.bfloat16),
        ("half", torch.float16),
        ("float8_e4m3fn", torch.bfloat16),
        ("float8_e5m2", torch.bfloat16),
    ],
)
def test_a_type_word_means_what_torch_means_by_it(key: str, word: str | None, expected: Any, folder: Path) -> None:
    changed(folder, dtype=None)
    assert read_config(changed(folder, **{key: word})).dtype == expected


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("word", ["fp16", "bf16", "int8", "bool", "complex64", "nn", "", 16, True, ["float16"], {}])
def test_a_word_that_is_no_type_of_weights_is_named_with_those_that_are(key: str, word: Any, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} is .*; write float32, bfloat16 or float16, or"):
        read_config(changed(folder, **{key: word}))


def test_a_model_of_type_auto_is_quantized_and_runs(folder: Path, tmp_path: Path, run: Run) -> None:
    quantize(changed(folder, dtype="auto"), tmp_path / "out", RECIPE)
    assert load_model(folder).dtype == torch.float32
    for model in (folder, tmp_path / "out"):
        assert run("generate", model, "--prompt", "w1 w2", "--max-new-tokens", 2)[0] == 0


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_with_a_byte_order_mark_reads_as_without(
    encoding: str, folder: Path, text_file: Path, run: Run
) -> None:
    plain = read_config(folder).to_dict()
    _, before, _ = run("evaluate", folder, "--text", text_file, "--window", 32, "--json")
    (folder / "config.json").write_bytes((folder / "config.json").read_text().encode(encoding))
    assert read_config(folder).to_dict() == plain
    code, after, _ = run("evaluate", folder, "--text", text_file, "--window", 32, "--json")
    assert code == 0
    assert json.loads(after)["perplexity"] == json.loads(before)["perplexity"]


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": "48"},
        {"num_hidden_layers": 3.0},
        {"num_attention_heads": 0},
        {"vocab_size": None},
        {"rms_norm_eps": "1e-5"},
        {"tie_word_embeddings": "false"},
        {"layer_types": ["full_attention"]},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        {"id2label": "x"},
        {"quantization_config": "gptq"},
    ],
    ids=str,
)
def test_values_of_the_wrong_kind_are_the_users_to_mend(values: dict[str, Any], folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        read_config(changed(folder, **values))


@pytest.mark.parametrize("value", [0, -1, 10**15])
@pytest.mark.parametrize(
    "key", ["vocab_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "max_position_embeddings"]
)
def test_sizes_that_no_model_has_are_refused_before_one_is_built(key: str, value: int, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} is {value}, and must be above 0 and at most"):
        read_config(changed(folder, **{key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_theta", "10000"),
        ("rope_theta", None),
        ("rope_theta", 0),
        ("rope_theta", -1.0),
        ("rope_theta", math.nan),
        ("factor", "8"),
        ("factor", -2.0),
        ("rope_type", ["default"]),
    ],
)
def test_rotary_parameters_of_which_nothing_can_be_computed_are_named(key: str, value: Any, folder: Path) -> None:
    parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, key: value}
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{key}"):
        read_config(changed(folder, rope_parameters=parameters))


def test_a_sliding_layer_needs_a_window(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["qwen2"], tmp_path / "model")
    with pytest.raises(CheckpointError, match="layer_types has sliding_attention, but there is no sliding_window"):
        read_config(changed(folder, layer_types=["sliding_attention"] * 3))


def test_layers_that_differ_make_a_mistral_another_model(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["mistral"], tmp_path / "model")
    types = ["sliding_attention", "full_attention", "full_attention"]
    with pytest.raises(UnsupportedModel, match="'ministral' is not supported"):
        quantize(changed(folder, layer_types=types), tmp_path / "out", RECIPE)


@pytest.mark.parametrize(
    "values",
    [
        {"use_cache": False},
        {"return_dict": False},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "nowhere"},
        {"auto_map": {"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.OwnConfig"}},
        {"auto_map": None},
    ],
    ids=str,
)
def test_switches_of_a_run_change_neither_the_model_nor_what_is_written(
    values: dict[str, Any], folder: Path, tmp_path: Path, run: Run
) -> None:
    plain = read_config(folder).to_dict()
    assert read_config(changed(folder, **values)).to_dict() == plain
    quantize(folder, tmp_path / "out", RECIPE)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert all(written.get(key, "nothing") != value for key, value in values.items())
    assert run("generate", tmp_path / "out", "--prompt", "w1 w2", "--max-new-tokens", 2)[0] == 0


def test_a_type_that_transformers_does_not_know_is_named_and_its_code_not_run(folder: Path) -> None:
    (folder / "own.py").write_text("raise SystemExit('ran')")
    changed(folder, model_type="own")
    with pytest.raises(UnsupportedModel, match=r"transformers \d\S+ knows no model_type 'own'; give another model"):
        read_config(folder)
    changed(folder, auto_map={"AutoConfig": "own.OwnConfig"})
    with pytest.raises(UnsupportedModel, match="'own', and code that comes with a model is never run; give another"):
        read_config(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"", b"\xef\xbb\xbf{}", b"\xff\xfe{"])
def test_a_generation_config_that_transformers_would_pass_over_is_refused(content: bytes, folder: Path) -> None:
    (folder / "generation_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        read_config(folder)

"""What a GGUF file's metadata say of a model is what is computed, or the file is refused by the key's name."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import CONFIGS, random_model
from gguf_files import Extra, write_gguf
from subnibble.checkpoint.opening import open_source
from subnibble.errors import CheckpointError, UnsupportedModel
from subnibble.hf import load_model

IDS = torch.arange(96).view(1, 96)
S = gguf.RopeScalingType
BASE = 10000.0


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


def rotated(name: str, rope: dict[str, Any]) -> Any:
    """The tiny model of this name with other rotary positions."""
    config = copy.deepcopy(CONFIGS[name])
    config.rope_parameters = {"rope_theta": BASE, **rope}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(random_model(name).state_dict())
    return model


def scaling(kind: gguf.RopeScalingType, factor: float, original: int | None = None) -> Extra:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(factor)
        if original is not None:
            writer.add_rope_scaling_orig_ctx_len(original)

    return add


def scaled_linearly_as_it_once_was(writer: gguf.GGUFWriter) -> None:
    writer.add_float32("llama.rope.scale_linear", 4.0)


def factor_alone(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_factor(4.0)


def fast_and_slow(writer: gguf.GGUFWriter) -> None:
    scaling(S.YARN, 4.0, 32)(writer)
    writer.add_rope_scaling_yarn_beta_fast(16.0)
    writer.add_rope_scaling_yarn_beta_slow(2.0)


LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("name", "arch", "rope", "extra"),
    [
        ("llama", "llama", LINEAR, scaling(S.LINEAR, 4.0)),
        ("qwen2", "qwen2", LINEAR, scaling(S.LINEAR, 4.0)),
        ("llama", "llama", LINEAR, scaled_linearly_as_it_once_was),
        ("llama", "llama", LINEAR, factor_alone),
        ("llama", "llama", YARN, scaling(S.YARN, 4.0, 32)),
        ("qwen2", "qwen2", YARN, scaling(S.YARN, 4.0, 32)),
        ("qwen2", "qwen2", YARN | {"original_max_position_embeddings": 128}, scaling(S.YARN, 4.0)),
        ("llama", "llama", YARN | {"beta_fast": 16.0, "beta_slow": 2.0}, fast_and_slow),
        ("llama", "llama", {"rope_type": "default"}, scaling(S.NONE, 4.0)),
        ("llama", "llama", {"rope_type": "default"}, scaling(S.LINEAR, 1.0)),
    ],
)
def test_scaled_positions_are_the_models(
    name: str, arch: str, rope: dict[str, Any], extra: Extra, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "model.gguf", name, arch, extra)
    target = rotated(name, rope)
    read = load_model(tmp_path / "model.gguf", "float32", "cpu")
    assert torch.equal(logits(read), logits(target))
    if rope["rope_type"] != "default":
        assert not torch.allclose(logits(target), logits(random_model(name)), atol=1e-3)


def divisors(width: int, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """As llama.cpp's converter computes `rope_freqs.weight` of a Llama 3."""
    result = []
    for frequency in (1 / BASE ** (torch.arange(0, width, 2).float() / width)).tolist():
        wave = 2 * math.pi / frequency
        smooth = (original / wave - low) / (high - low)
        result.append(1 / ((1 - smooth) / factor + smooth) if 0 < smooth < 1 else 1 if smooth >= 1 else factor)
    return np.array(result, dtype=np.float32)


@pytest.mark.parametrize(
    ("factor", "low", "high", "original"),
    [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (8.0, 1.0, 4.0, 64), (4.0, 1.5, 40.0, 512)],
)
def test_divided_frequencies_are_llama_3s(
    factor: float, low: float, high: float, original: int, tmp_path: Path
) -> None:
    held = divisors(16, factor, low, high, original)
    assert len(set(held.tolist())) > 2
    write_gguf(tmp_path / "model.gguf", "llama", "llama", lambda w: w.add_tensor("rope_freqs.weight", held))
    rope = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
    target = rotated("llama", {"rope_type": "llama3", "factor": factor, **rope})
    read = load_model(tmp_path / "model.gguf", "float32", "cpu")
    assert read.config.rope_parameters["rope_type"] == "llama3"
    assert torch.allclose(logits(read), logits(target), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(target), logits(random_model("llama")), atol=1e-2)


@pytest.mark.parametrize(("divisor", "kind"), [(1.0, "default"), (3.0, "linear")])
def test_frequencies_that_are_all_divided_alike_are_scaled_linearly(divisor: float, kind: str, tmp_path: Path) -> None:
    held = np.full(8, divisor, dtype=np.float32)
    write_gguf(tmp_path / "model.gguf", "llama", "llama", lambda w: w.add_tensor("rope_freqs.weight", held))
    target = rotated("llama", {"rope_type": kind} | ({"factor": divisor} if kind == "linear" else {}))
    assert torch.equal(logits(load_model(tmp_path / "model.gguf", "float32", "cpu")), logits(target))


def freqs(values: np.ndarray) -> Extra:
    return lambda writer: writer.add_tensor("rope_freqs.weight", values.astype(np.float32))


def both(writer: gguf.GGUFWriter) -> None:
    scaling(S.LINEAR, 4.0)(writer)
    freqs(divisors(16, 8.0, 1.0, 4.0, 8192))(writer)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (freqs(np.linspace(1, 8, 8)), "rope_freqs.weight"),
        (freqs(np.array([1, 8, 1, 8, 1, 8, 1, 8])), "rope_freqs.weight"),
        (freqs(divisors(32, 8.0, 1.0, 4.0, 8192)), "16 rope_freqs for 16 channels"),
        (both, "rope.scaling.type 'linear' with 8 rope_freqs"),
        (lambda w: w.add_rope_scaling_type(S.LONGROPE), "rope.scaling.type is 'longrope'"),
        (lambda w: w.add_sliding_window(16), "llama.attention.sliding_window = 16"),
        (lambda w: w.add_causal_attention(False), "llama.attention.causal = False"),
        (lambda w: w.add_logit_scale(2.0), "llama.logit_scale = 2.0"),
        (lambda w: w.add_expert_count(8), "llama.expert_count = 8"),
        (lambda w: w.add_rope_scaling_yarn_attn_factor(0.5), "yarn_attn_factor = 0.5"),
        (lambda w: w.add_rope_scaling_yarn_ext_factor(1.0), "yarn_ext_factor is 1.0"),
        (lambda w: w.add_uint32("llama.a_key_of_tomorrow", 3), "llama.a_key_of_tomorrow = 3"),
        (lambda w: w.add_value_length(8), "llama.attention.value_length is 8, but heads have 16 channels"),
        (lambda w: w.add_type("adapter"), "of type 'adapter'"),
    ],
)
def test_metadata_that_change_the_model_unread_are_named(extra: Extra, named: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "llama", "llama", extra)
    with pytest.raises(UnsupportedModel) as error:
        open_source(tmp_path / "model.gguf")
    assert named in str(error.value)


def test_metadata_that_change_nothing_are_passed_over(tmp_path: Path) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_sliding_window(128)
        writer.add_causal_attention(True)
        writer.add_logit_scale(1.0)
        writer.add_expert_count(0)
        writer.add_rope_scaling_attn_factors(1.0)
        writer.add_rope_scaling_yarn_ext_factor(-1.0)
        writer.add_tensor_data_layout("Meta AI original pth")

    model = write_gguf(tmp_path / "model.gguf", "llama", "llama", extra)
    assert torch.equal(logits(load_model(tmp_path / "model.gguf", "float32", "cpu")), logits(model))


@pytest.mark.parametrize("key", ["embedding_length", "block_count", "attention.layer_norm_rms_epsilon"])
@pytest.mark.parametrize("value", [None, 0])
def test_a_size_that_is_not_there_is_named(key: str, value: int | None, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "llama", "llama", **{key.replace(".", "__"): value})
    with pytest.raises(CheckpointError, match=f"for llama.{key}, but subnibble needs one number above 0"):
        open_source(tmp_path / "model.gguf")


def test_what_the_metadata_leave_out_is_as_llama_cpp_has_it(tmp_path: Path) -> None:
    left_out = {"attention__head_count_kv": None, "attention__key_length": None, "rope__dimension_count": None}
    model = write_gguf(
        tmp_path / "model.gguf", "llama-tied", "llama", **left_out, rope__freq_base=None, vocab_size=None
    )
    read = load_model(tmp_path / "model.gguf", "float32", "cpu")
    assert read.config.vocab_size == model.config.vocab_size
    assert torch.equal(logits(read), logits(model))


def test_heads_of_several_widths_are_named(tmp_path: Path) -> None:
    write_gguf(
        tmp_path / "model.gguf", "llama", "llama", lambda w: w.add_array("llama.attention.head_count_kv", [2, 1, 2]),
        attention__head_count_kv=None,
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"\[2, 1, 2\] for llama.attention.head_count_kv"):
        open_source(tmp_path / "model.gguf")


def test_tokens_are_those_of_the_file(tmp_path: Path) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_bos_token_id(5)
        writer.add_eos_token_id(6)
        writer.add_eot_token_id(7)

    write_gguf(tmp_path / "model.gguf", "llama", "llama", extra)
    source = open_source(tmp_path / "model.gguf")
    assert (source.config.bos_token_id, source.config.eos_token_id, source.config.pad_token_id) == (5, 6, None)
    source.copy_side_files(tmp_path)
    generation_config = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation_config == {"bos_token_id": 5, "eos_token_id": [6, 7]}


def test_a_gguf_without_its_head_is_tied_and_one_without_its_table_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tied.gguf", "llama", "llama", only=lambda key: key != "lm_head.weight")
    assert open_source(tmp_path / "tied.gguf").config.tie_word_embeddings
    write_gguf(tmp_path / "none.gguf", "llama", "llama", only=lambda key: key != "model.embed_tokens.weight")
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight is missing, and no other tensor is") as error:
        load_model(tmp_path / "none.gguf")
    assert "config.json" not in str(error.value)


def test_a_type_that_cannot_be_dequantized_is_named_before_any_weight_is_read(tmp_path: Path) -> None:
    whole = np.ones(48, dtype=np.int8)
    write_gguf(
        tmp_path / "model.gguf", "llama", "llama", lambda w: w.add_tensor("output_norm.weight", whole),
        only=lambda key: key != "model.norm.weight",
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is stored as I8"):
        load_model(tmp_path / "model.gguf")


def test_doubles_are_read(tmp_path: Path) -> None:
    gains = np.linspace(0.5, 1.5, 48)
    write_gguf(
        tmp_path / "model.gguf", "llama", "llama", lambda w: w.add_tensor("output_norm.weight", gains),
        only=lambda key: key != "model.norm.weight",
    )  # fmt: skip
    read = load_model(tmp_path / "model.gguf", "float32", "cpu")
    assert torch.equal(read.model.norm.weight, torch.from_numpy(gains).float())

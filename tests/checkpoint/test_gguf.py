"""A GGUF file reads back as the model that was written into it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from conftest import CONFIGS, VOCABULARY, random_model
from subnibble.checkpoint import gguf_source
from subnibble.checkpoint.opening import open_source
from subnibble.errors import UnsupportedModel
from subnibble.hf import load_model
from subnibble.model.site import Heads


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows: the two halves of each head's rotary pairs in turn."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(file: Path, name: str, arch: str) -> torch.nn.Module:
    model, config = random_model(name), CONFIGS[name]
    heads = Heads.of(config)
    writer = gguf.GGUFWriter(file, arch)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads.query)
    writer.add_head_count_kv(heads.key_value)
    writer.add_key_length(heads.width)
    writer.add_rope_dimension_count(heads.width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"w{i}" for i in range(VOCABULARY)])
    writer.add_token_merges(["w 1"])
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), 8)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, kind = key.rpartition(".")
        array = tensor.numpy()
        if arch == "llama" and (".q_proj" in key or ".k_proj" in key):
            array = interleave(array, heads.query if ".q_proj" in key else heads.key_value)
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize(("name", "arch"), [("llama-tied", "llama"), ("qwen2", "qwen2"), ("qwen2-untied", "qwen2")])
def test_gguf_reads_back_as_the_model_that_was_written(name: str, arch: str, tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "model.gguf", name, arch)
    read = load_model(tmp_path / "model.gguf", "float32", "cpu")
    assert set(dict(read.named_parameters())) == set(dict(model.named_parameters()))
    for key, parameter in model.named_parameters():
        assert torch.equal(read.get_parameter(key), parameter), key
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert torch.equal(read(ids).logits, model(ids).logits)


def test_rows_left_interleaved_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_gguf(tmp_path / "model.gguf", "llama-tied", "llama")
    monkeypatch.setitem(gguf_source._INTERLEAVED, "llama", False)
    read = load_model(tmp_path / "model.gguf", "float32", "cpu")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(read.get_parameter(name), model.get_parameter(name))


def test_gguf_with_a_tensor_nobody_maps_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = gguf.GGUFWriter.write_header_to_file

    def one_more(self: gguf.GGUFWriter) -> None:
        self.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))
        original(self)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", one_more)
    write_gguf(tmp_path / "model.gguf", "llama-tied", "llama")
    with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight .* has no place"):
        open_source(tmp_path / "model.gguf")


def test_gguf_of_another_architecture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "model.gguf", "qwen2", "qwen2")
    monkeypatch.delitem(gguf_source._INTERLEAVED, "qwen2")
    with pytest.raises(UnsupportedModel, match="'qwen2' is not supported; supported: llama"):
        open_source(tmp_path / "model.gguf")

"""A GGUF file reads back as the model that was written into it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gguf_files import write_gguf
from subnibble.checkpoint import gguf_source
from subnibble.checkpoint.opening import open_source
from subnibble.errors import UnsupportedModel
from subnibble.hf import load_model


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("llama-tied", "llama"),
        ("llama", "llama"),
        ("qwen2", "qwen2"),
        ("qwen2-untied", "qwen2"),
        ("qwen3", "qwen3"),
    ],
)
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


def test_gguf_with_a_tensor_nobody_maps_is_refused(tmp_path: Path) -> None:
    ones = np.ones(8, dtype=np.float32)
    write_gguf(tmp_path / "model.gguf", "llama-tied", "llama", lambda w: w.add_tensor("rope_factors_long.weight", ones))
    with pytest.raises(UnsupportedModel, match=r"rope_factors_long\.weight .* has no place"):
        open_source(tmp_path / "model.gguf")


def test_gguf_of_another_architecture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "model.gguf", "qwen2", "qwen2")
    monkeypatch.delitem(gguf_source._INTERLEAVED, "qwen2")
    with pytest.raises(UnsupportedModel, match="'qwen2' is not supported; supported: llama, qwen3"):
        open_source(tmp_path / "model.gguf")

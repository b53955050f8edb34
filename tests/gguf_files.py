"""Write the tiny models of `conftest.py` as GGUF files, as llama.cpp's converter does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from conftest import VOCABULARY, random_model
from subnibble.arch.site import Heads

Extra = Callable[[gguf.GGUFWriter], object]


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows: the two halves of each head's rotary pairs in turn."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    file: Path,
    name: str,
    arch: str,
    extra: Extra = lambda writer: None,
    only: Callable[[str], bool] = lambda key: True,
    **values: Any,
) -> torch.nn.Module:
    """Write a tiny model and give it.

    extra: adds metadata or tensors. only: which of the model's tensors are written. values: of keys, in place of the
    writer's own; None leaves the key out.
    """
    model = random_model(name)
    writer = gguf.GGUFWriter(file, arch)
    for key, value in metadata_of(model.config, arch, values).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["w", "1", "w1", *(f"x{i}" for i in range(3, VOCABULARY))])
    writer.add_token_merges(["w 1"])
    extra(writer)
    add_tensors(writer, model, arch, only)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def metadata_of(config: Any, arch: str, values: Mapping[str, Any]) -> dict[str, Any]:
    heads = Heads.of(config)
    architecture_keys = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads.query,
        "attention.head_count_kv": heads.key_value,
        "attention.key_length": heads.width,
        "rope.dimension_count": heads.width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": VOCABULARY,
    }
    metadata = {f"{arch}.{key}": value for key, value in architecture_keys.items()} | {
        f"{arch}.{key.replace('__', '.')}": value for key, value in values.items()
    }
    return {key: value for key, value in metadata.items() if value is not None}


def add_tensors(writer: gguf.GGUFWriter, model: Any, arch: str, only: Callable[[str], bool]) -> None:
    heads = Heads.of(model.config)
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), 8)
    for key, tensor in model.state_dict().items():
        if not only(key) or (key == "lm_head.weight" and model.config.tie_word_embeddings):
            continue
        stem, _, kind = key.rpartition(".")
        array = tensor.numpy()
        if arch == "llama" and (".q_proj" in key or ".k_proj" in key):
            array = interleave(array, heads.query if ".q_proj" in key else heads.key_value)
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", np.ascontiguousarray(array))

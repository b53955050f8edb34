"""Write tiny models as GGUF files of quantized types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from conftest import VOCABULARY
from gguf_files import interleave, metadata_of
from subnibble.arch.site import Heads

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": None,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES, head_dim=64, attention_bias=True, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=64, tie_word_embeddings=True),
}


def random_blocks(kind: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """Random blocks of a type, (rows, bytes of a row), every 7th of them with a scale 0."""
    rng, quant = np.random.default_rng(seed), gguf.GGMLQuantizationType[kind]
    size, count = gguf.GGML_QUANT_SIZES[quant]
    blocks = rng.integers(0, 256, (rows * columns // size, count), dtype=np.uint8)
    # Where a block has its float16 numbers.
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind, (0, 2) if kind in MINIMA else (0,))
    for place in places:
        scale = rng.uniform(0.5, 1.5, len(blocks)) * (0.001 if "K" in kind else 0.01)
        scale[::7] = 0 if place == places[0] else scale[::7]
        blocks[:, place : place + 2] = scale.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


MINIMA = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")


def write_quantized(
    file: Path,
    arch: str,
    type_of: Callable[[str], str],
    order: Callable[[np.ndarray, int], np.ndarray] = interleave,
    **keys: Any,
) -> Any:
    """Write a tiny model and give the dequantized one.

    type_of: type of each matrix, by the model's name; types without a quantizer in Python get random blocks.
    order: of q and k rows of llama.
    """
    config = CONFIGS[arch]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    writer = gguf.GGUFWriter(file, arch)
    for key, value in metadata_of(config, arch, keys).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["w", "1", "w1", *(f"x{i}" for i in range(3, VOCABULARY))])
    writer.add_token_merges(["w 1"])
    dense = _add_tensors(writer, model, arch, type_of, order)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_state_dict(dense)
    model.tie_weights()
    return model


def _add_tensors(
    writer: Any, model: Any, arch: str, type_of: Callable[[str], str], order: Callable[[np.ndarray, int], np.ndarray]
) -> Mapping[str, torch.Tensor]:
    heads, dense = Heads.of(model.config), dict[str, torch.Tensor]()
    ordered = {"q_proj": heads.query, "k_proj": heads.key_value}
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), 8)
    for number, (key, tensor) in enumerate(model.state_dict().items()):
        stem, _, ending = key.rpartition(".")
        name, dense[key] = f"{names.get_name(stem)}.{ending}", tensor
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            dense[key] = dense["model.embed_tokens.weight"]
            continue
        reorder = None if arch != "llama" else ordered.get(stem.rpartition(".")[2])
        array = tensor.numpy()
        if tensor.dim() == 1 or type_of(key) == "F32":
            writer.add_tensor(name, np.ascontiguousarray(array if reorder is None else order(array, reorder)))
            continue
        kind = gguf.GGMLQuantizationType[type_of(key)]
        try:
            blocks = gguf.quantize(array * (1 if kind.name == "F16" else 4), kind)
        except NotImplementedError:
            blocks = random_blocks(kind.name, *array.shape, seed=number)
        if kind.name == "F16":
            writer.add_tensor(name, blocks)
        dense[key] = torch.from_numpy(gguf.dequantize(blocks, kind).astype(np.float32).reshape(array.shape))
        if kind.name != "F16":
            stored = blocks if reorder is None else order(blocks, reorder)
            writer.add_tensor(name, np.ascontiguousarray(stored), raw_dtype=kind)
    return dense

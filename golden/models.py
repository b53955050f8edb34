"""Toy models with tokenizer and calibration text, computed from an integer formula: the same bits on every machine.

Random generators may differ between versions and CPUs. So every weight is a small whole number, from a hash in integer
arithmetic, times a power of two. `_add_irregularities_` adds outliers, constant rows and the like.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

VOCABULARY = 96
WORDS = 3000
TEXT, TOKENS = "text.txt", "tokens.npy"
_PRIME = 2**31 - 1
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "eos_token_id": None,
}

# Groups of 32 do not divide 80, 88 and 72; every width has a Hadamard matrix.
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(
        hidden_size=80, intermediate_size=88, num_attention_heads=5, num_key_value_heads=5, head_dim=16,
        tie_word_embeddings=False, **_SIZES,
    ),
    "llama-tied": LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=4, head_dim=16,
        tie_word_embeddings=True, **_SIZES,
    ),
    "qwen2": Qwen2Config(
        hidden_size=64, intermediate_size=72, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, **_SIZES,
    ),
    "qwen3": Qwen3Config(
        hidden_size=64, intermediate_size=88, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        tie_word_embeddings=False, **_SIZES,
    ),
}  # fmt: skip
_TYPES = {"llama": torch.float32, "llama-tied": torch.bfloat16, "qwen2": torch.bfloat16, "qwen3": torch.float32}


def hashed(count: int, salt: int) -> Tensor:
    """Return (count,) int64 pseudo-random numbers from 0 to 2**31 - 2. salt: selects the sequence."""
    index = torch.arange(1, count + 1, dtype=torch.int64)
    value = (index * 48271 + salt * 69621) % _PRIME
    value = (value * value + index) % _PRIME
    value = (value * 16807 + salt) % _PRIME
    return value * value % _PRIME


def numbers(shape: torch.Size, salt: int) -> Tensor:
    """Return float32 whole numbers of `shape` from -1536 to 1533, bell-shaped with standard deviation 512."""
    count = shape.numel()
    parts = [hashed(count, 3 * salt + index) % 1024 for index in range(3)]
    return (sum(parts) - 1536).float().view(shape)  # type: ignore[union-attr]


def write_models(folder: Path) -> dict[str, Path]:
    """Write every toy model, with calibration text, as a Hugging Face folder under `folder`; return name -> folder."""
    models = {name: _write_model(name, folder / name) for name in CONFIGS}
    for model in models.values():
        write_text(model)
    return models


def write_text(folder: Path) -> None:
    """Write calibration text, and the same text as token ids. Its words are tokens; low ids occur more often."""
    bounds = 1 + hashed(WORDS, 901) % (VOCABULARY - 1)
    words = hashed(WORDS, 902) % bounds
    (folder / TEXT).write_text(" ".join(f"w{word}" for word in words.tolist()))
    np.save(folder / TOKENS, words.numpy().astype(np.int32))


def _write_model(name: str, folder: Path) -> Path:
    config = CONFIGS[name]
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.dtype = _TYPES[name]
    config.save_pretrained(folder)
    tensors = {path: numbers(shape, salt) for salt, (path, shape) in enumerate(_shapes(config).items(), 1)}
    _add_irregularities_(tensors)
    save_file({path: tensor.to(_TYPES[name]) for path, tensor in tensors.items()}, folder / "model.safetensors")
    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"<unk>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="w0").save_pretrained(folder)
    return folder


def _shapes(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Shapes of a model's tensors, by name."""
    width, hidden = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, width)}
    for index in range(config.num_hidden_layers):
        block = f"model.layers.{index}"
        attention = {"q_proj": (queries, width), "k_proj": (keys, width), "v_proj": (keys, width)}
        for name, shape in attention.items():
            shapes[f"{block}.self_attn.{name}.weight"] = shape
            if config.model_type == "qwen2":
                shapes[f"{block}.self_attn.{name}.bias"] = shape[:1]
        shapes[f"{block}.self_attn.o_proj.weight"] = (width, queries)
        if config.model_type == "qwen3":
            shapes |= {f"{block}.self_attn.{name}.weight": (head,) for name in ("q_norm", "k_norm")}
        shapes |= {f"{block}.mlp.{name}.weight": (hidden, width) for name in ("gate_proj", "up_proj")}
        shapes[f"{block}.mlp.down_proj.weight"] = (width, hidden)
        shapes |= {f"{block}.{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes["model.norm.weight"] = (width,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (VOCABULARY, width)
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def _add_irregularities_(tensors: dict[str, Tensor]) -> None:
    """Scale by powers of two; add outliers, a constant row, a group of zeros, and a channel that is always 0."""
    for path, tensor in tensors.items():
        if "norm" in path:
            tensor.copy_(1 + tensor * 2.0**-11)
            tensor[5] *= 4
        elif path.endswith(".bias"):
            tensor.mul_(2.0**-10)
        elif "embed" in path or "lm_head" in path:
            tensor.mul_(2.0**-9)
            tensor[:, 9] *= 4
        else:
            # Divide by about the square root of the width, as a power of two, to keep outputs as large as inputs.
            tensor.mul_(2.0 ** -(9 + tensor.shape[1].bit_length() // 2))
            tensor[:, 17] *= 4
            tensor[1] = 0.375
            tensor[2, 32:64] = 0
        if "up_proj" in path:
            tensor[3] *= 8
            tensor[11] = 0

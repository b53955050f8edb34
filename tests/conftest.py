"""Tiny random models of each supported architecture, as Hugging Face folders with a tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 96
SIZES = {"vocab_size": VOCABULARY, "num_hidden_layers": 3, "max_position_embeddings": 128, "eos_token_id": None}

CONFIGS = {
    # head_dim 16 is not hidden / heads = 8; 48 and 80 are no multiples of 32
    "llama": LlamaConfig(
        hidden_size=48, intermediate_size=80, num_attention_heads=6, num_key_value_heads=2, head_dim=16,
        tie_word_embeddings=False, attention_bias=True, mlp_bias=True, **SIZES,
    ),
    "llama-tied": LlamaConfig(
        hidden_size=48, intermediate_size=80, num_attention_heads=3, num_key_value_heads=3,
        tie_word_embeddings=True, **SIZES,
    ),
    # a window shorter than the calibration windows
    "mistral": MistralConfig(
        hidden_size=48, intermediate_size=80, num_attention_heads=6, num_key_value_heads=2, head_dim=16,
        sliding_window=8, tie_word_embeddings=False, **SIZES,
    ),
    "qwen3": Qwen3Config(
        hidden_size=48, intermediate_size=72, num_attention_heads=6, num_key_value_heads=3, head_dim=16,
        tie_word_embeddings=True, **SIZES,
    ),
    "qwen2": Qwen2Config(
        hidden_size=64, intermediate_size=72, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, **SIZES,
    ),
    "qwen2-untied": Qwen2Config(
        hidden_size=64, intermediate_size=72, num_attention_heads=4, num_key_value_heads=1,
        tie_word_embeddings=False, **SIZES,
    ),
}  # fmt: skip


def random_model(name: str, seed: int = 0) -> torch.nn.Module:
    """A model with random weights, gains and biases, some channels much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.15 * noise)
        for block in model.model.layers:
            for linear in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                if linear.bias is not None:
                    linear.bias.copy_(0.5 * torch.randn(linear.bias.shape, generator=generator))
            block.mlp.up_proj.weight[3] *= 8
    return model


def save_model(name: str, folder: Path, shard_size: str = "1GB") -> Path:
    random_model(name).save_pretrained(folder, max_shard_size=shard_size)
    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"<unk>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="w0").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name of a tiny model -> its folder."""
    root = tmp_path_factory.mktemp("models")
    return {name: save_model(name, root / name) for name in CONFIGS}


@pytest.fixture(scope="session")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids with some structure: 24 windows of 32."""
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(file, (rng.zipf(1.3, size=24 * 32) % VOCABULARY).astype(np.int32))
    return file


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kind of text as words of the tiny tokenizer."""
    rng = np.random.default_rng(1)
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"w{i}" for i in rng.zipf(1.3, size=400) % (VOCABULARY - 1)))
    return file

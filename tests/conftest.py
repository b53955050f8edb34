"""Tiny random models of each supported architecture, as Hugging Face folders, plain and packed; the command."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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

import subnibble
from pairs import cover
from subnibble import Recipe
from subnibble.cli.main import main
from subnibble.resume.places import runs_in

Run = Callable[..., tuple[int, str, str]]

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "eos_token_id": None,
}

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


def random_model(name: str, seed: int = 0, blocks: int = SIZES["num_hidden_layers"]) -> torch.nn.Module:
    """A model with random weights, gains and biases, some channels much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    config = CONFIGS[name]
    if blocks != config.num_hidden_layers:
        values = {name: value for name, value in config.to_dict().items() if name != "layer_types"}
        config = type(config).from_dict(values | {"num_hidden_layers": blocks})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
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


def save_model(name: str, folder: Path, shard_size: str = "1GB", blocks: int = SIZES["num_hidden_layers"]) -> Path:
    random_model(name, blocks=blocks).save_pretrained(folder, max_shard_size=shard_size)
    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"<unk>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="w0").save_pretrained(folder)
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run cases that are left out to be quick (make test-all)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --all, leave out tests marked `slow`, and cases of tests marked `pairwise` or `each_value` whose pairs or
    values others have.
    """
    if config.getoption("--all"):
        return
    crossed: dict[tuple[str, int], list[pytest.Function]] = {}
    for item in items:
        for mark, strength in (("each_value", 1), ("pairwise", 2)):
            if isinstance(item, pytest.Function) and item.get_closest_marker(mark):
                crossed.setdefault((item.nodeid.partition("[")[0], strength), []).append(item)
    left_out = {item for item in items if item.get_closest_marker("slow")}
    for (_, strength), cases in crossed.items():
        values = [{name: repr(value) for name, value in case.callspec.params.items()} for case in cases]
        kept = cover(values, strength)
        left_out |= set(cases) - {cases[index] for index in kept}
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


class _Deprecations(logging.Handler):
    """Keeps what transformers logs of names that it will drop; what it warns of is an error by pytest's settings."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in record.getMessage():
            self.messages.append(record.getMessage())


@pytest.fixture(autouse=True)
def no_deprecated_names() -> Iterator[None]:
    """A name that transformers says it will drop fails the test that used it."""
    handler, logger = _Deprecations(), logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert handler.messages == []


@pytest.fixture(scope="session", autouse=True)
def no_runs_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither see nor leave unfinished runs in the user's cache folder."""
    with runs_in(tmp_path_factory.mktemp("runs")):
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks() -> Iterator[None]:
    """What tests write need not outlive a power failure; `resume/power.py` has a disk for tests of those."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name of a tiny model -> its folder."""
    root = tmp_path_factory.mktemp("models")
    return {name: save_model(name, root / name) for name in CONFIGS}


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As `folders`, of two blocks: one that others follow, and a last one."""
    root = tmp_path_factory.mktemp("short")
    return {name: save_model(name, root / name, blocks=2) for name in CONFIGS}


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


@pytest.fixture(scope="session")
def packed(folders: dict[str, Path], token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name of a tiny model -> its folder, packed."""
    root = tmp_path_factory.mktemp("packed")
    for name in ("llama", "qwen2"):
        recipe = Recipe(
            bits=4, group_size=16, embedding_bits=8, calibration=str(token_file), num_windows=8, window=32
        )  # fmt: skip
        subnibble.quantize(folders[name], root / name, recipe)
    return {name: root / name for name in ("llama", "qwen2")}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["subnibble", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def arguments(folders: dict[str, Path], token_file: Path, tmp_path: Path) -> list[object]:
    """A quantization that works, for tests to spoil."""
    return [
        "quantize", folders["llama"], tmp_path / "out", "--method", "gptq", "--bits", 3, "--group-size", 32,
        "--embedding-bits", 8, "--calibration", token_file, "--num-windows", 4, "--window", 32, "--seed", 1,
    ]  # fmt: skip

"""The embedded real model, end to end: what `make demo` does, in small."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from subnibble import Recipe, quantize
from subnibble.calibrate.windows import evaluation_windows
from subnibble.checkpoint.gguf_source import GgufSource
from subnibble.checkpoint.size import measure
from subnibble.cli.demo import demo
from subnibble.evaluation.perplexity import score
from subnibble.generate.speak import chat_prompt, speak
from subnibble.hf import load_model, memory_bytes, packed_modules
from subnibble.packaged.model import find_model


@pytest.fixture(scope="module")
def source() -> GgufSource:
    return GgufSource(find_model())


@pytest.fixture(scope="module")
def original(source: GgufSource) -> torch.nn.Module:
    return load_model(source)


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    demo(bits="3", num_windows=8, window=512, max_windows=2, out=folder)
    return folder


def test_gguf_gives_the_weights_that_transformers_gives(source: GgufSource, original: torch.nn.Module) -> None:
    file = find_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ours = dict(original.named_parameters())
    assert set(ours) == set(dict(theirs.named_parameters()))
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours[name], parameter), name
    size = measure(source)
    assert size.effective_bits == 5.0
    assert size.parameters == 134_515_008


def test_each_method_is_nearer_to_the_original_than_the_one_before(demo_folder: Path, source: GgufSource) -> None:
    quantize(source, demo_folder / "rtn-w3g128", Recipe(method="rtn", bits=3, embedding_bits=8))
    names = ("rtn", "gptq", "dualfit")
    windows = evaluation_windows("news", source.load_tokenizer(), 512, 2)
    models = {name: load_model(demo_folder / f"{name}-w3g128") for name in names}
    scores = score(models, windows, None, load_model(source))
    for worse, better in itertools.pairwise(names):
        assert scores[better].perplexity < 0.8 * scores[worse].perplexity
        assert scores[better].kl_divergence < 0.8 * scores[worse].kl_divergence
    reports = [json.loads((demo_folder / f"{name}-w3g128" / "report.json").read_text()) for name in names]
    bits = [report["size"]["effective_bits"] for report in reports]
    assert bits[0] == bits[1]
    assert 3.0 < bits[0] < 3.2
    assert bits[2] - bits[1] <= 0.12


def test_packed_real_model_is_small_and_equal_to_its_dense_form(demo_folder: Path, original: torch.nn.Module) -> None:
    packed = load_model(demo_folder / "gptq-w3g128")
    assert memory_bytes(packed) < 0.14 * memory_bytes(original)
    for path, module in packed_modules(packed).items():
        original.get_submodule(path).weight.data = module.packed.dequantize()
    ids = torch.arange(100, 164).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, original(ids).logits)


def test_packed_real_model_speaks(demo_folder: Path, source: GgufSource) -> None:
    packed = load_model(demo_folder / "gptq-w3g128")
    words = speak(packed, source.load_tokenizer(), "The capital of France is", 8)
    assert len(words.split()) >= 3
    prompt = chat_prompt(source.load_tokenizer(), "Say hello.")
    assert speak(packed, source.load_tokenizer(), prompt, 4, temperature=0.7, seed=1)

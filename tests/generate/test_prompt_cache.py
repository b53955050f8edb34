"""A saved prompt gives the tokens of one that runs, and is refused by another model, cache scheme or prefix."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import CACHES, model_with
from safetensors.torch import load_file, save_file

from conftest import Run, random_model, save_model
from subnibble import Generator
from subnibble.checkpoint.opening import open_source
from subnibble.errors import CheckpointError, OutputError

PROMPT = "w4 w5 w6 w7 w8 w9 w10 w11 w12 w3 w44 w2"


@pytest.fixture(scope="module")
def tokenizer(folders: dict[str, Path]) -> Any:
    return open_source(folders["llama"]).load_tokenizer()


@pytest.mark.parametrize("cache", CACHES)
def test_a_saved_prompt_gives_the_same_tokens(cache: str, tokenizer: Any, tmp_path: Path) -> None:
    file, model = tmp_path / "prompt.safetensors", model_with(cache, cache != "dynamic")
    generator = Generator(model, tokenizer)
    assert generator.save_prompt(file, PROMPT) == 11
    other = Generator(model_with(cache, cache != "dynamic"), tokenizer)
    prompts = [PROMPT, f"{PROMPT} w9 w8 w7"]
    for settings in ({"temperature": 0}, {"temperature": 0.9, "seed": 4}):
        expected = generator.generate(prompts, max_new_tokens=10, **settings)
        actual = other.generate(prompts, prompt_cache=file, max_new_tokens=10, **settings)
        assert [completion.ids for completion in actual] == [completion.ids for completion in expected]
        assert [completion.cached_tokens for completion in actual] == [11, 11]
        streamed = "".join(other.stream(PROMPT, prompt_cache=file, max_new_tokens=10, **settings))
        assert streamed == expected[0].text
    # The test can fail: keys and values that are not those of the prompt change the tokens.
    tensors = load_file(file)
    changed = {name: tensor if name == "ids" else tensor.flip(1) for name, tensor in tensors.items()}
    rewrite(file, changed)
    assert other.generate(PROMPT, prompt_cache=file, max_new_tokens=10, temperature=0).ids != expected[0].ids


def rewrite(file: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> None:
    """Write other tensors and metadata into a saved prompt."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        before = opened.metadata()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, before | metadata)


def test_a_prompt_that_parts_from_the_saved_one_runs_from_there(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompt.safetensors"
    # A cache with a window cannot drop quantized tokens and runs the whole prompt.
    for cache, expected in (("by token", 5), ("dynamic", 5), ("hadamard with a window", 0)):
        generator = Generator(model_with(cache, cache != "dynamic"), tokenizer)
        generator.save_prompt(file, PROMPT)
        prompt = "w4 w5 w6 w7 w8 w20 w21"
        completion = generator.generate(prompt, prompt_cache=file, max_new_tokens=8, temperature=0)
        assert completion.cached_tokens == expected
        assert completion.ids == generator.generate(prompt, max_new_tokens=8, temperature=0).ids


def test_a_prompt_of_another_model_is_refused_with_both_names(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "prompt.safetensors"
    save_model("llama", tmp_path / "first")
    Generator(tmp_path / "first").save_prompt(file, PROMPT)
    # The same weights in another folder are the same model.
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    assert Generator(tmp_path / "copy").generate(PROMPT, prompt_cache=file).cached_tokens == 11
    with pytest.raises(CheckpointError, match=r"is a prompt of first and not of llama-tied, or .* have changed"):
        Generator(folders["llama-tied"]).generate(PROMPT, prompt_cache=file)
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="is a prompt of first and not of copy"):
        Generator(tmp_path / "copy").generate(PROMPT, prompt_cache=file)


def test_a_prompt_of_another_cache_or_prefix_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompt.safetensors"
    Generator(model_with("by token", prefixed=True), tokenizer).save_prompt(file, PROMPT)
    with pytest.raises(CheckpointError, match=r'saved with the KV cache \{"bits": 4.* the model has null'):
        Generator(random_model("llama"), tokenizer).generate(PROMPT, prompt_cache=file)
    with pytest.raises(CheckpointError, match=r"saved with the system prompt \{.*5, 9, 2.* the model has null"):
        Generator(model_with("by token", prefixed=False), tokenizer).generate(PROMPT, prompt_cache=file)
    loaded = Generator(model_with("by token", prefixed=True), tokenizer)
    assert loaded.generate(PROMPT, prompt_cache=file).cached_tokens == 11


def test_what_is_no_saved_prompt_is_refused(folders: dict[str, Path], tokenizer: Any, tmp_path: Path) -> None:
    generator, file = Generator(random_model("llama"), tokenizer), tmp_path / "prompt.safetensors"
    for path in (tmp_path / "none", folders["llama"] / "config.json"):
        with pytest.raises(CheckpointError, match="cannot be read as a saved prompt"):
            generator.generate(PROMPT, prompt_cache=path)
    with pytest.raises(CheckpointError, match="is no saved prompt of subnibble"):
        generator.generate(PROMPT, prompt_cache=folders["llama"] / "model.safetensors")
    generator.save_prompt(file, PROMPT)
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match="cannot be read as a saved prompt"):
        generator.generate(PROMPT, prompt_cache=file)
    with pytest.raises(OutputError, match="the prompt cannot be saved"):
        generator.save_prompt(tmp_path / "no folder" / "prompt", PROMPT)


def test_a_prompt_of_one_token_has_nothing_to_save_and_works(tokenizer: Any, tmp_path: Path) -> None:
    generator = Generator(random_model("llama"), tokenizer)
    assert generator.save_prompt(tmp_path / "prompt", "w4") == 0
    completion = generator.generate("w4 w5", prompt_cache=tmp_path / "prompt", max_new_tokens=3)
    assert completion == generator.generate("w4 w5", max_new_tokens=3)


def test_the_command_saves_a_prompt_and_then_reads_it(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "prompt"
    words = ("generate", folders["llama"], "--prompt", PROMPT, "--max-new-tokens", 5)
    code, expected, err = run(*words)
    assert code == 0, err
    for said in ("11 tokens of the prompt saved", ""):
        code, out, err = run(*words, "--prompt-cache", file)
        assert code == 0, err
        assert out == expected
        assert said in err
    assert "saved" not in err
    code, _, err = run("generate", folders["llama-tied"], "--prompt", PROMPT, "--prompt-cache", file)
    assert code == 2
    assert "is a prompt of llama and not of llama-tied" in err

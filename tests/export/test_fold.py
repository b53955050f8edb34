"""Norm biases folded into linear biases: the same function, stored where any engine has room for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from subnibble import Recipe, quantize
from subnibble.checkpoint.manifest import packed_config_of
from subnibble.checkpoint.module_specs import NormBiasSpec
from subnibble.errors import CheckpointError
from subnibble.export.fold import fold_norm_biases_
from subnibble.runtime.modules import HeadInputMatrix, add_head_input_

IDS = torch.arange(40).view(2, 20) % 96


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def packed(
    source: Path, tokens: Path, out: Path, options: dict[str, str], dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    recipe = Recipe(
        method="d2quant", bits=3, group_size=16, embedding_bits=8, calibration=str(tokens), num_windows=4, window=32,
        options=options,
    )  # fmt: skip
    quantize(source, out, recipe)
    return AutoModelForCausalLM.from_pretrained(out, dtype=dtype)


def biased(model: torch.nn.Module) -> set[str]:
    return {path for path, e in packed_config_of(model.config).modules.items() if isinstance(e, NormBiasSpec)}


@pytest.mark.parametrize("columns", ["down", "all"])
@pytest.mark.parametrize("name", ["llama", "qwen2-untied"])
def test_folded_model_is_the_same_function_without_norm_biases(
    name: str, columns: str, folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    model = packed(folders[name], token_file, tmp_path / "a", {"columns": columns})
    before, norms = logits(model), biased(model)
    assert len(norms) == 4
    fold_norm_biases_(model)
    assert biased(model) == set()
    assert not any(path in norms and "bias" in dict(m.named_parameters()) for path, m in model.named_modules())
    scale = before.abs().max()
    assert float((logits(model) - before).abs().max() / scale) < 2e-5
    model.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_16_bits_runs_folded(
    dtype: torch.dtype, folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    # Some of the linears have a bias of their own, some get one.
    model = packed(folders["qwen2-untied"], token_file, tmp_path / "a", {}, dtype)
    before, norms = logits(model).double(), biased(model)
    fold_norm_biases_(model)
    after = logits(model)
    assert after.dtype == dtype
    assert float((after.double() - before).abs().max() / before.abs().max()) < 4 * torch.finfo(dtype).eps
    assert norms
    assert not any(hasattr(model.get_submodule(path), "bias") for path in norms)


def test_cache_centres_and_prompt_stay(folders: dict[str, Path], token_file: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        method="d2quant", bits=3, group_size=16, embedding_bits=8, calibration=str(token_file), num_windows=4,
        window=32, kv_bits=8, kv={"key_center": "mean"}, system_prompt="w5 w9",
    )  # fmt: skip
    quantize(folders["llama"], tmp_path / "a", recipe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    before, held = logits(model), packed_config_of(model.config)
    fold_norm_biases_(model)
    result = packed_config_of(model.config)
    assert biased(model) == set()
    assert (result.cache, result.prefix) == (held.cache, held.prefix)
    model.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    # A rounding difference may move a code of the cache, of 256.
    assert float((logits(again) - before).norm() / before.norm()) < 1e-3
    dropped = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    for path in biased(dropped):
        dropped.get_submodule(path).bias.data.zero_()
    assert float((logits(dropped) - before).norm() / before.norm()) > 5e-3


def test_dropping_the_biases_instead_is_rejected(folders: dict[str, Path], token_file: Path, tmp_path: Path) -> None:
    model = packed(folders["llama"], token_file, tmp_path / "a", {})
    before = logits(model)
    for path in biased(model):
        model.get_submodule(path).bias.data.zero_()
    assert float((logits(model) - before).abs().max() / before.abs().max()) > 1e-3


@pytest.mark.parametrize("rotation", ["none", "groups"])
def test_a_tied_head_keeps_the_final_norms_bias(
    rotation: str, folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    model = packed(folders["llama-tied"], token_file, tmp_path / rotation, {"rotation": rotation})
    before = logits(model)
    fold_norm_biases_(model)
    assert biased(model) == {"model.norm"}
    assert float((logits(model) - before).abs().max() / before.abs().max()) < 2e-5


def test_a_model_that_cannot_be_folded_whole_is_left_as_it_is(
    folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    recipe = Recipe(
        method="d2quant", bits=3, group_size=16, calibration=str(token_file), num_windows=4, window=32,
        overrides={r"re:model\.layers\.1\.mlp": {"activation_bits": 8}},
    )  # fmt: skip
    quantize(folders["llama"], tmp_path / "a", recipe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    before, norms = logits(model), biased(model)
    with pytest.raises(CheckpointError, match="quantize their inputs"):
        fold_norm_biases_(model)
    assert biased(model) == norms
    assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    assert torch.equal(logits(again), before)


def test_a_plain_model_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="is not packed"):
        fold_norm_biases_(AutoModelForCausalLM.from_pretrained(folders["llama"]))


def test_a_bias_goes_through_what_stands_in_front_of_a_head(
    folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    model = packed(folders["llama"], token_file, tmp_path / "a", {})
    width = model.config.hidden_size
    matrix = torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    add_head_input_(model.lm_head, HeadInputMatrix(matrix, (width,)))
    before = logits(model)
    fold_norm_biases_(model)
    assert biased(model) == set()
    assert float((logits(model) - before).abs().max() / before.abs().max()) < 2e-5

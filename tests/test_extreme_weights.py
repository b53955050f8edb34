"""Weights and activations at the ends of their range: a model that runs, or an error that says why there is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from subnibble import Recipe, quantize
from subnibble.errors import CheckpointError, NumericalFailure

IDS = torch.arange(40).view(2, 20) % 96
LAST = "model.layers.2.mlp.down_proj.weight"


def edited(folder: Path, out: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """A model's folder with some of its weights changed."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    edit(model.state_dict())
    model.save_pretrained(out)
    return out


def recipe(tokens: Path, method: str, **values: Any) -> Recipe:
    return Recipe(
        method=method, bits=3, group_size=16, embedding_bits=8, calibration=str(tokens), num_windows=4, window=32,
        device="cpu", **values,
    )  # fmt: skip


def nearly_pruned(weights: dict[str, Tensor], layers: tuple[int, ...]) -> None:
    """13 of every 16 input channels of down projections are next to nothing."""
    for layer in layers:
        weight = weights[f"model.layers.{layer}.mlp.down_proj.weight"]
        weight[:, torch.arange(weight.shape[1]) % 16 < 13] *= 1e-9


@pytest.mark.parametrize("layers", [(2,), (0, 1, 2)])
@pytest.mark.parametrize("method", ["d2quant", "dualfit", "gptq"])
def test_columns_next_to_nothing_spoil_nothing(
    method: str, layers: tuple[int, ...], folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    source = edited(folders["llama"], tmp_path / "model", lambda weights: nearly_pruned(weights, layers))
    report = quantize(source, tmp_path / "out", recipe(token_file, method))
    errors = [linear.output_error for linear in report.linears]
    assert all(error is not None and math.isfinite(error) for error in errors)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        wanted, found = (model(IDS).logits for model in (original, packed))
    assert float((found - wanted).norm() / wanted.norm()) < 0.5


def test_outputs_beyond_the_compute_type_are_an_error_and_no_model(
    folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    source = edited(folders["llama"], tmp_path / "model", lambda weights: weights[LAST].mul_(2e4))
    with pytest.raises(NumericalFailure, match='use dtype = "bfloat16" or "float32"'):
        quantize(source, tmp_path / "out", recipe(token_file, "d2quant", dtype="float16"))
    assert not (tmp_path / "out").exists()
    quantize(source, tmp_path / "out", recipe(token_file, "d2quant", dtype="float32"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert bool(torch.isfinite(model(IDS).logits).all())


def test_a_norm_bias_that_holds_no_number_is_not_loaded(
    folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(folders["llama"], out, recipe(token_file, "d2quant"))
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.norm.bias" in tensors:
            tensors["model.norm.bias"][3] = torch.nan
            save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"model\.norm\.bias is not finite"):
        AutoModelForCausalLM.from_pretrained(out)

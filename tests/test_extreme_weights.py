"""Weights and activations at the ends of their range: a model that runs, or an error that says why there is none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from spoiled_checkpoint import renew_checksums
from subnibble import Recipe, quantize
from subnibble.errors import CheckpointError, NumericalFailure

IDS = torch.arange(40).view(2, 20) % 96
LAST = "model.layers.2.mlp.down_proj.weight"
MIDDLE = "model.layers.1"
LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip
# Small ones for small models.
RANKS = {"serq": {"rank": 16}, "bisup": {"effort": "fast", "rank": 4}}


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
@pytest.mark.parametrize("method", ["d2quant", "d2quant-plus", "gptq"])
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
        target, actual = (model(IDS).logits for model in (original, packed))
    assert float((actual - target).norm() / target.norm()) < 0.5


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


IDLE: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "adds nothing": lambda weights: silence(weights, "self_attn.o_proj", "mlp.down_proj"),
    "is all zero": lambda weights: silence(weights, *LINEARS),
    "reads nothing": lambda weights: weights[f"{MIDDLE}.input_layernorm.weight"].zero_(),
    "has an idle MLP": lambda weights: silence(weights, "mlp.gate_proj"),
    "has idle values": lambda weights: silence(weights, "self_attn.v_proj"),
    "has idle channels": lambda weights: weights[f"{MIDDLE}.post_attention_layernorm.weight"][::3].zero_(),
    "has constant rows": lambda weights: [weights[f"{MIDDLE}.{name}.weight"][::2].fill_(0.1) for name in LINEARS],
}


def silence(weights: dict[str, Tensor], *names: str) -> None:
    """Zero a middle block's linears."""
    for name in names:
        weights[f"{MIDDLE}.{name}.weight"].zero_()
        weights[f"{MIDDLE}.{name}.bias"].zero_()


def scaled(weights: dict[str, Tensor], factor: float, *names: str) -> None:
    """Multiply a middle block's linears."""
    for name in names:
        weights[f"{MIDDLE}.{name}.weight"].mul_(factor)
        weights[f"{MIDDLE}.{name}.bias"].mul_(factor)


def run_and_compare(source: Path, out: Path, chosen: Recipe) -> float:
    """How far the packed model is from its original; all that the report says is finite."""
    report = quantize(source, out, chosen)
    errors = [(one.weight_error, one.output_error, one.nearest_error) for one in report.linears]
    assert all(number is not None and math.isfinite(number) for actual in errors for number in actual)
    original, packed = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (source, out))
    with torch.no_grad():
        target, actual = (model(IDS).logits for model in (original, packed))
    assert bool(torch.isfinite(actual).all())
    return float((actual - target).norm() / target.norm())


@pytest.mark.parametrize(
    ("method", "how"),
    [
        *(("gptq", how) for how in IDLE),
        *(
            (method, how)
            for method in ("awq", "serq", "d2quant", "qera", "omniquant")
            for how in ("is all zero", "has an idle MLP")
        ),
    ],
)
def test_a_block_that_is_idle_on_the_text_is_quantized_as_well_as_others(
    method: str, how: str, folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    source = edited(folders["llama"], tmp_path / "model", IDLE[how])
    options = {"serq": {"rank": 16}, "qera": {"rank": 4}, "omniquant": {"effort": "fast"}}
    chosen = recipe(token_file, method, activation_bits=8, options=options.get(method, {}))
    assert run_and_compare(source, tmp_path / "out", chosen) < 0.35


def test_weights_that_no_calibration_token_reaches_are_rounded_to_nearest_and_not_to_zero(
    folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    source = edited(folders["llama"], tmp_path / "model", IDLE["reads nothing"])
    report = quantize(source, tmp_path / "out", recipe(token_file, "gptq"))
    unfed = [linear for linear in report.linears if linear.path.startswith(MIDDLE) and "v_proj" in linear.path]
    assert [linear.output_error for linear in unfed] == [0]
    assert all(linear.weight_error < 0.1 for linear in unfed)


@pytest.mark.parametrize("method", ["gptq", "awq", "d2quant", "serq"])
def test_activations_whose_squares_leave_float32_are_calibrated_on(
    method: str, folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    """Hidden channels of about 1e20 in one block, brought back by its down projection."""

    def edit(weights: dict[str, Tensor]) -> None:
        scaled(weights, 1e10, "mlp.gate_proj", "mlp.up_proj")
        weights[f"{MIDDLE}.mlp.down_proj.weight"].mul_(1e-20)

    source = edited(folders["llama"], tmp_path / "model", edit)
    chosen = recipe(token_file, method, dtype="bfloat16", scale_type="float32", options=RANKS.get(method, {}))
    assert run_and_compare(source, tmp_path / "out", chosen) < 0.35


@pytest.mark.parametrize("method", ["gptq", "gptaq", "rtn", "awq"])
def test_activations_whose_squares_underflow_are_fed_all_the_same(
    method: str, folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    def edit(weights: dict[str, Tensor]) -> None:
        scaled(weights, 1e-13, "mlp.gate_proj", "mlp.up_proj")

    source = edited(folders["llama"], tmp_path / "model", edit)
    run_and_compare(source, tmp_path / "out", recipe(token_file, method, scale_type="float32"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (down,) = (linear for linear in report["linears"] if linear["path"] == f"{MIDDLE}.mlp.down_proj")
    assert down["weight_error"] < 0.2
    assert down["output_error"] < 0.2


@pytest.mark.parametrize(
    ("method", "name", "said"),
    [
        ("gptq", "mlp.down_proj", "its output is not"),
        ("gptq", "self_attn.v_proj", "the input of self_attn.o_proj is not"),
        *((method, "mlp.down_proj", "its output is not") for method in ("rtn", "serq", "awq", "bisup")),
    ],
)
def test_activations_beyond_the_compute_type_are_named_and_not_the_text(
    method: str, name: str, said: str, folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    source = edited(folders["llama"], tmp_path / "model", lambda weights: scaled(weights, 1e6, name))
    chosen = recipe(token_file, method, dtype="float16", scale_type="float32", options=RANKS.get(method, {}))
    chosen = replace(chosen, activation_bits=8 if method == "bisup" else 16)
    with pytest.raises(NumericalFailure) as raised:
        quantize(source, tmp_path / "out", chosen)
    assert f"{MIDDLE}: {said} finite: activations exceed the range of float16" in str(raised.value)
    assert 'use dtype = "bfloat16" or "float32"' in str(raised.value)
    assert not (tmp_path / "out").exists()
    if method == "gptq":
        assert run_and_compare(source, tmp_path / "out", replace(chosen, dtype="bfloat16")) < 0.5


@pytest.mark.parametrize(("factor", "said"), [(1e-8, "too small"), (1e8, "too much")])
@pytest.mark.parametrize("values", [{"method": "gptq"}, {"method": "d2quant"}, {"method": "rtn", "grid": "sign"}])
def test_weights_beyond_the_scales_type_are_named_and_the_type_that_is_told_of_holds_them(
    values: dict[str, str], factor: float, said: str, folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    def edit(weights: dict[str, Tensor]) -> None:
        scaled(weights, factor, "self_attn.v_proj")
        weights[f"{MIDDLE}.self_attn.o_proj.weight"].div_(factor)

    source = edited(folders["llama"], tmp_path / "model", edit)
    chosen = recipe(token_file, **values)
    with pytest.raises(NumericalFailure, match=rf"model\.layers\.1.*{said} for scales of type float16; set scale_type"):
        quantize(source, tmp_path / "out", chosen)
    assert run_and_compare(source, tmp_path / "out", replace(chosen, scale_type="float32")) < 0.5


def test_a_skipped_linear_keeps_weights_beyond_float16(
    folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    name = "mlp.up_proj"
    for factor in (1e-9, 1e9):
        source = edited(folders["llama"], tmp_path / "model", lambda weights, f=factor: scaled(weights, f, name))
        chosen = recipe(token_file, "rtn", overrides={f"re:.*{name}": {"skip": True}})
        quantize(source, tmp_path / "out", chosen, overwrite=True)
        target, actual = (
            AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)
            .get_submodule(f"{MIDDLE}.{name}")
            .weight.detach()
            for f in (source, tmp_path / "out")
        )
        assert float((actual - target).norm() / target.norm()) < 2e-3


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
    renew_checksums(out)
    with pytest.raises(CheckpointError, match=r"model\.norm\.bias is not finite"):
        AutoModelForCausalLM.from_pretrained(out)

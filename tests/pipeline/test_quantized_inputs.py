"""Methods that quantize inputs, end to end on tiny models: what the options of SERQ and its baselines must bring."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from conftest import CONFIGS
from spoiled_checkpoint import renew_checksums
from subnibble import Recipe, quantize
from subnibble.arch.site import Site
from subnibble.calibrate.stream import BlockStream
from subnibble.checkpoint.manifest import packed_config_of
from subnibble.errors import BadRecipe, CheckpointError
from subnibble.export.fold import fold_norm_biases_
from subnibble.hf import packed_modules
from subnibble.pipeline import round as rounding
from subnibble.report import Report
from subnibble.runtime.modules import PackedLinear

IDS = (torch.arange(80).view(4, 20) * 7) % 96
BASE = {"bits": 4, "group_size": 16, "num_windows": 8, "window": 32, "dtype": "float32", "embedding_bits": 16}
SERQ = {"method": "serq", "activation_bits": 4}
RANK = 16


def make(folder: Path, tokens: Path, out: Path, **values: Any) -> tuple[Report, torch.nn.Module]:
    report = quantize(folder, out, Recipe(**{**BASE, "calibration": str(tokens), **values}), overwrite=True)
    return report, AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def departure(model: torch.nn.Module, folder: Path) -> float:
    target = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    return float((logits(model) - target).norm() / target.norm())


STAGES: dict[str, dict[str, Any]] = {
    "published": {},
    "to nearest": {"rounding": "rtn"},
    "residual": {"residual": "salient"},
    "offline orders": {"permutation": "offline"},
    "no flattening": {"flattening": "none"},
    "searched": {"flattening": "search"},
    "quantized inputs": {"inputs": "quantized"},
}


@pytest.mark.each_value
@pytest.mark.parametrize("options", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_stage_of_serq_leaves_the_function_where_bits_are_many(
    name: str, options: dict[str, Any], short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    """At 8 bits with a second weight hardly anything is lost: a fold, order or gather gone wrong would show."""
    values = {"method": "serq", "bits": 8, "activation_bits": 8, "options": {"rank": RANK, **options}}
    _, model = make(short[name], token_file, tmp_path / "out", **values)
    assert departure(model, short[name]) < 0.06


@pytest.mark.each_value
@pytest.mark.parametrize("method", ["quarot", "smoothquant", "qera", "l2qer"])
@pytest.mark.parametrize("name", CONFIGS)
def test_baselines_leave_the_function_where_bits_are_many(
    name: str, method: str, short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    _, model = make(short[name], token_file, tmp_path / "out", method=method, bits=8, activation_bits=8)
    assert departure(model, short[name]) < 0.04


def test_serq_is_better_than_its_baselines_and_twice_the_input_better_still(
    short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    # Of the tiny models, this one has outlier channels enough for flattening and salient channels to matter.
    name = "llama"

    def result(method: str, **options: Any) -> float:
        values = {"method": method, "activation_bits": 4, "options": options}
        return departure(make(short[name], token_file, tmp_path / "out", **values)[1], short[name])

    serq = result("serq", rank=RANK)
    assert serq < min(result("rtn"), result("smoothquant"))
    assert result("serq", rank=RANK, residual="salient") < 0.9 * serq


def test_output_error_of_every_linear_falls_with_the_rank(
    short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    errors = []
    for rank in (0, 16, 32, 48):
        options = {"rank": rank, "rounding": "rtn"}
        report, _ = make(short["llama"], token_file, tmp_path / "out", **SERQ, options=options)
        errors.append([linear.output_error for linear in report.linears])
        assert all(linear.output_error is not None for linear in report.linears)
    for one, more in itertools.pairwise(errors):
        assert all(b < a for a, b in zip(one, more, strict=True))


def test_offline_orders_store_no_gather(short: dict[str, Path], token_file: Path, tmp_path: Path) -> None:
    def gathers(**options: Any) -> set[str]:
        _, model = make(short["llama"], token_file, tmp_path / "out", **SERQ, options={"rank": RANK, **options})
        linears = {path: m for path, m in packed_modules(model).items() if isinstance(m, PackedLinear)}
        assert all(m.linear.input.gather is m.input.gather for m in linears.values())
        return {path.split(".")[-1] for path, module in linears.items() if module.gather is not None}

    # The first reader of a tensor holds it for all.
    assert gathers() == {"q_proj", "o_proj", "gate_proj"}
    assert gathers(permutation="offline") == set()


def test_a_global_order_keeps_a_tied_head_tied(short: dict[str, Path], token_file: Path, tmp_path: Path) -> None:
    options = {"rank": RANK, "permutation": "offline"}
    _, model = make(short["llama-tied"], token_file, tmp_path / "out", **SERQ, options=options)
    assert model.config.tie_word_embeddings
    assert "lm_head" not in packed_config_of(model.config).modules


def test_bits_are_what_the_stored_terms_take(short: dict[str, Path], token_file: Path, tmp_path: Path) -> None:
    report, model = make(short["llama"], token_file, tmp_path / "out", **SERQ, options={"rank": RANK})
    bits = weights = channels = tokens = 0
    for path, module in packed_modules(model).items():
        if isinstance(module, PackedLinear) and path.startswith("model.layers."):
            stored = [t for n, t in module.state_dict().items() if n != "bias"]
            bits += 8 * sum(tensor.nbytes for tensor in stored)
            k = module.in_features
            weights += module.out_features * k
            channels += k
            # 4 bits a code, a scale of 16 bits and a zero-point of 4 for each group, salient channels twice.
            tokens += 4 * k + 20 * -(-k // 16) + 4 * RANK + 20
    assert report.size["effective_bits"] == pytest.approx(bits / weights)
    assert report.size["activation_bits"] == pytest.approx(tokens / channels)
    each = [linear.effective_bits * linear.shape[0] * linear.shape[1] for linear in report.linears]
    assert sum(each) == pytest.approx(bits)


def test_an_override_keeps_one_linears_input(short: dict[str, Path], token_file: Path, tmp_path: Path) -> None:
    overrides = {"re:.*down_proj": {"activation_bits": 8}, "re:.*o_proj": {"activation_bits": 16}}
    _, model = make(short["llama"], token_file, tmp_path / "out", method="rtn", activation_bits=4, overrides=overrides)
    result = {
        path.split(".")[-1]: None if module.activation is None else module.activation.bits
        for path, module in packed_modules(model).items()
        if isinstance(module, PackedLinear)
    }
    assert (result["down_proj"], result["o_proj"], result["q_proj"]) == (8, None, 4)


def test_wider_inputs_come_closer_to_those_that_are_not_quantized(
    short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    _, model = make(short["llama"], token_file, tmp_path / "out", method="rtn", activation_bits=8)
    eight = logits(model)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.activation = None
    exact = logits(model)
    assert 0 < float((eight - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize(("values", "message"), [
    ({"method": "serq", "options": {"rank": 200}}, "rank 200 is larger than the 48 inputs"),
    ({"method": "serq", "options": {"rotation": "groups"}}, "has no option 'rotation'"),
    ({"method": "serq-plus", "options": {"order": "gar"}}, "has no option 'order'"),
    ({"method": "serq", "options": {"flattening": "flat"}}, "choose one of none, powers, search"),
    ({"method": "rtn", "activation_bits": 5}, "activation bits are 5; choose one of 3, 4, 8"),
    ({"method": "rtn", "grid": "mxfp4"}, "an mxfp4 grid has 4 bits, groups of 32"),
    ({"method": "d2quant-plus", "grid": "mxfp4", "group_size": 32}, "q_proj: column scales and refitted rows need"),
    ({"method": "serq", "options": {"rank": 0, "residual": "salient"}}, "residual is 'salient' but rank is 0"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(
    values: dict[str, Any], message: str, short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadRecipe, match=message):
        make(short["llama"], token_file, tmp_path / "out", **values)
    assert not list(tmp_path.iterdir())


def test_norm_biases_are_not_folded_behind_quantized_inputs(
    short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    values = {"method": "d2quant", "activation_bits": 8, "options": {"rotation": "none"}}
    _, model = make(short["llama"], token_file, tmp_path / "out", **values)
    with pytest.raises(CheckpointError, match="the linears that read it quantize their inputs"):
        fold_norm_biases_(model)


def test_a_model_without_norm_biases_has_nothing_to_fold(
    short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    _, model = make(short["llama"], token_file, tmp_path / "out", **SERQ, options={"rank": RANK})
    before = logits(model)
    fold_norm_biases_(model)
    assert torch.equal(logits(model), before)


def test_readers_of_one_site_are_calibrated_on_what_each_of_them_sees(
    short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    """One reader whose input stays as it is must not decide for the others."""
    options = {"inputs": "quantized", "rounding": "gptq"}
    values = {"method": "smoothquant", "activation_bits": 3, "options": options}
    alike, _ = make(short["llama"], token_file, tmp_path / "alike", **values)
    overrides = {"re:.*q_proj": {"activation_bits": 16}}
    mixed, _ = make(short["llama"], token_file, tmp_path / "mixed", **values, overrides=overrides)
    errors = [
        {linear.path: linear.output_error for linear in report.linears if ".layers.0." in linear.path}
        for report in (alike, mixed)
    ]
    for name in ("k_proj", "v_proj"):
        path = f"model.layers.0.self_attn.{name}"
        assert errors[0][path] == pytest.approx(errors[1][path], rel=1e-4)
    assert errors[0]["model.layers.0.self_attn.q_proj"] != errors[1]["model.layers.0.self_attn.q_proj"]


def test_a_reader_is_not_calibrated_on_what_the_one_before_it_sees(
    short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    """k_proj's input stays as it is: q_proj's, quantized and rounded first, must not take its place."""
    values = {"method": "smoothquant", "activation_bits": 3, "options": {"inputs": "quantized", "rounding": "gptq"}}
    errors = []
    for pattern in ("re:.*k_proj", "re:.*[qkv]_proj"):
        overrides = {pattern: {"activation_bits": 16}}
        report, _ = make(short["llama"], token_file, tmp_path / "out", **values, overrides=overrides)
        errors.append({linear.path: linear.output_error for linear in report.linears})
    path = "model.layers.0.self_attn.k_proj"
    assert errors[0][path] == pytest.approx(errors[1][path], rel=1e-4)


def test_a_site_is_streamed_once_however_many_ways_its_readers_see_it(
    short: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passages: list[str] = []
    at = BlockStream.at

    def noted(self: BlockStream, site: Site) -> Iterator[Tensor]:
        passages.append(site.name)
        return at(self, site)

    monkeypatch.setattr(BlockStream, "at", noted)
    overrides = {"re:.*q_proj": {"activation_bits": 8}, "re:.*k_proj": {"activation_bits": 16}}
    options = {"inputs": "quantized", "rounding": "gptq"}
    values = {"method": "quarot", "activation_bits": 4, "options": options, "overrides": overrides}
    make(short["llama"], token_file, tmp_path / "out", **values)
    assert passages == ["attention_in", "attention_out", "mlp_in", "mlp_hidden"] * 2


@pytest.mark.parametrize("fault", ["twice", "beyond"])
def test_a_gather_that_is_no_permutation_is_refused_at_load(
    fault: str, short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    make(short["llama"], token_file, tmp_path / "out", **SERQ, options={"rank": RANK})
    file = tmp_path / "out" / "model.safetensors"
    files = [file] if file.is_file() else sorted((tmp_path / "out").glob("*.safetensors"))
    for one in files:
        tensors = load_file(one)
        for name, tensor in tensors.items():
            if name.endswith("gather"):
                tensor[0] = tensor[1] if fault == "twice" else 99
        save_file(tensors, one, metadata={"format": "pt"})
    renew_checksums(tmp_path / "out")
    with pytest.raises(CheckpointError, match="gather does not hold each channel once"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)


def test_layers_in_another_order_are_not_compared_with_the_original(
    short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    options = {"rank": RANK, "flattening": "none", "permutation": "offline"}
    report, _ = make(short["llama"], token_file, tmp_path / "out", **SERQ, options=options)
    assert all(linear.basis_changed for linear in report.linears)
    bits = [linear.effective_bits * linear.shape[0] * linear.shape[1] for linear in report.linears]
    weights = [linear.shape[0] * linear.shape[1] for linear in report.linears]
    assert sum(bits) / sum(weights) == pytest.approx(report.size["effective_bits"])


@pytest.mark.parametrize("inputs", ["quantized", "exact"])
def test_calibration_sees_keys_and_values_as_the_cache_quantizes_them(
    inputs: str, short: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first block, whose inputs are the same in calibration and in the running model."""
    grams: list[Tensor] = []
    observe = rounding._observe

    def noted(site: Site, *others: Any) -> Any:
        actual = observe(site, *others)
        if site.name == "attention_out":
            grams.append(actual[None].gram)
        return actual

    monkeypatch.setattr(rounding, "_observe", noted)
    _, model = make(
        short["llama"], token_file, tmp_path / "out", method="serq", options={"rank": RANK, "inputs": inputs},
        activation_bits=16, kv_bits=2, num_windows=24,
    )  # fmt: skip
    captured: list[Tensor] = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: captured.append(args[0].flatten(0, -2))
    )
    with torch.no_grad():
        model(torch.from_numpy(np.load(token_file)).long().view(-1, 32))
    target = captured[0].double().T @ captured[0].double()
    error = float((grams[0].double() - target).norm() / target.norm())
    assert error < 1e-4 if inputs == "quantized" else error > 1e-2

"""What distillation learns: each space by itself, stored as it was trained, and never silently left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distill import DATA, METHODS, clips_of, keep_every_look, tensors_of, trainings
from torch import nn
from transformers import AutoModelForCausalLM

from subnibble import Recipe, quantize
from subnibble.checkpoint.module_specs import matrices_of
from subnibble.distill.models import Student
from subnibble.distill.settings import SPACES
from subnibble.errors import BadRecipe, SilentFailure
from subnibble.kernels.native import TORCH, chosen
from subnibble.pipeline.distill_checkpoint import distill_checkpoint
from subnibble.runtime import site_input
from subnibble.runtime.modules import PackedLinear, remove_output_bias_

SHORT = {"distill_steps": 6, "distill": {"tokens": 96, "rate": 0.01}}
# Everything at once; under grouped-query attention output projections store their column scales.
ALL: dict[str, Any] = {
    "method": "d2quant-plus", "bits": 2, "group_size": 16, "activation_bits": 8, "options": {"mean_shift": "published"},
}  # fmt: skip
STORED: dict[str, dict[str, Any]] = {
    "uniform": METHODS["gptq"],
    "real": {"method": "gptq", "bits": 2, "group_size": 16, "zero_point": "real"},
    "real, bfloat16": {"method": "rtn", "bits": 3, "group_size": 16, "zero_point": "real", "scale_type": "bfloat16"},
    "sign": {"method": "rtn", "bits": 2, "group_size": 16, "grid": "sign"},
    "mxfp4": METHODS["mxfp4"],
    "column scales and norm biases": METHODS["d2quant-plus"],
    "all": ALL,
    "branches": METHODS["qera"],
    "salient": METHODS["serq"],
}


def quantized(folder: Path, out: Path, tokens: Path, **settings: Any) -> Path:
    quantize(folder, out, Recipe(calibration=str(tokens), **{**DATA, **settings}))
    return out


@pytest.mark.each_value
@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", STORED)
def test_the_loaded_checkpoint_is_the_student_bit_for_bit(
    kind: str,
    name: str,
    short: dict[str, Path],
    token_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained, _ = trainings(monkeypatch), keep_every_look(monkeypatch)
    folder = quantized(short[name], tmp_path / "out", token_file, **STORED[kind], **SHORT)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    student, ids, exact = trained[0].student, trained[0].samples.held_out, True
    with torch.no_grad(), student.as_stored():
        for path, learned in student._linears.items():
            linear = model.get_submodule(path)
            assert isinstance(linear, PackedLinear)
            terms, x = linear.linear, torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(3))
            parts = zip(matrices_of(terms.weight).values(), learned._learned_matrices.values(), strict=True)
            assert all(torch.equal(matrix.dequantize(), part.dense()) for matrix, part in parts)
            assert torch.equal(site_input.enter(x, terms.input), learned.entrance(x)[0])
            assert terms.input.activation == learned.entrance.scheme
            exact = exact and terms.input.activation is None
        student.forget()
        for name_, parameter in student._norms.items():
            assert torch.equal(parameter, model.get_parameter(name_))
        with chosen(TORCH):
            expected, actual = model(ids).logits, student.logits(ids)
    # Products of quantized inputs are added in another order, and an input may fall on the next code.
    if exact:
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def plain(short: dict[str, Path], token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything, before anything is learned."""
    return quantized(short["llama"], tmp_path_factory.mktemp("plain") / "out", token_file, **ALL)


@pytest.mark.parametrize("space", SPACES)
def test_one_space_alone_moves_nothing_else(
    space: str, plain: Path, short: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_every_look(monkeypatch)
    alone = SHORT["distill"] | {name: name == space for name in SPACES}
    folder = quantized(short["llama"], tmp_path / "out", token_file, **ALL, distill_steps=6, distill=alone)

    before, after = tensors_of(plain), tensors_of(folder)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    ends = {
        "scales": ".scales", "zero_points": ".zeros", "column_scales": "o_proj.column_scale", "norms": "norm.weight",
        "norm_biases": "norm.bias",
    }  # fmt: skip
    assert changed == {key for key in before if space in ends and key.endswith(ends[space])}
    assert bool(changed) == (space != "clips")
    assert (clips_of(plain) != clips_of(folder)) == (space == "clips")


def test_later_learns_as_much_as_at_once(short: dict[str, Path], token_file: Path, tmp_path: Path) -> None:
    recipe = {**METHODS["d2quant-plus"], **SHORT}
    once = tensors_of(quantized(short["llama"], tmp_path / "once", token_file, **recipe))
    later = quantized(short["llama"], tmp_path / "later", token_file, **METHODS["d2quant-plus"])
    distill_checkpoint(later, short["llama"], Recipe(calibration=str(token_file), **{**DATA, **recipe}))

    actual = tensors_of(later)

    assert once.keys() == actual.keys()
    assert all(torch.equal(once[key], actual[key]) and once[key].dtype == actual[key].dtype for key in once)


def without_linear(model: Any) -> None:
    # The gate takes the place of the product of both.
    mlp = model.get_submodule("model.layers.1.mlp")
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)))


def without_norm(model: Any) -> None:
    norm = model.get_submodule("model.layers.1.post_attention_layernorm")
    norm.forward = lambda x: x


def without_bias(model: Any) -> None:
    norm, bias = model.get_submodule("model.norm"), model.get_parameter("model.norm.bias")
    remove_output_bias_(norm)
    norm.register_parameter("bias", bias)


def without_column_scales(model: Any) -> None:
    linear = model.get_submodule("model.layers.1.self_attn.o_proj")
    linear.entrance.forward = lambda x: (x.flatten(0, -2), x.flatten(0, -2))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (without_linear, r"model\.layers\.1\.mlp\.up_proj\.scales"),
        (without_norm, r"model\.layers\.1\.post_attention_layernorm\.weight"),
        (without_bias, r"model\.norm\.bias"),
        (without_column_scales, r"model\.layers\.1\.self_attn\.o_proj\.column_scale"),
    ],
)
def test_what_the_model_does_not_run_is_an_error_that_names_it(
    fault: Callable[[Any], None],
    said: str,
    short: dict[str, Path],
    token_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = Student.of

    def spoiled(*args: Any) -> Student:
        student = usual(*args)
        fault(student._model.model)
        return student

    monkeypatch.setattr(Student, "of", spoiled)
    with pytest.raises(SilentFailure, match=f"^no gradient reaches the learned parameter {said} "):
        quantized(short["llama"], tmp_path / "out", token_file, **METHODS["d2quant-plus"], **SHORT)
    assert not (tmp_path / "out").exists()


def test_a_packed_linear_that_would_stay_as_it_is_is_an_error(
    short: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = nn.Module.set_submodule

    def skips(self: nn.Module, target: str, module: nn.Module, *args: Any, **named: Any) -> None:
        if type(module).__name__ != "StudentLinear" or target != "mlp.down_proj":
            usual(self, target, module, *args, **named)

    monkeypatch.setattr(nn.Module, "set_submodule", skips)
    with pytest.raises(
        SilentFailure, match=r"^model\.layers\.0\.mlp\.down_proj is packed but has no learned parameters"
    ):
        quantized(short["llama"], tmp_path / "out", token_file, **METHODS["rtn"], **SHORT)


@pytest.mark.parametrize(
    ("name", "recipe", "spaces"),
    [
        ("llama", METHODS["rtn"], {"scales", "norms"}),
        ("llama", METHODS["rtn"], {"scales", "norms", "clips"}),
        ("llama", METHODS["mxfp4"], {"norms"}),
        ("llama", {"method": "none", "kv_bits": 4}, {"norms"}),
        # Every site of this one hands its column scales on.
        ("llama-tied", {"method": "d2quant-plus", "bits": 2, "group_size": 16}, {"scales", "norms", "zero_points"}),
        ("llama", METHODS["d2quant-plus"] | {"zero_point": "integer"}, set(SPACES) - {"zero_points", "clips"}),
    ],
)
def test_nothing_to_learn_is_said_before_any_work(
    name: str,
    recipe: dict[str, Any],
    spaces: set[str],
    short: dict[str, Path],
    token_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("subnibble.pipeline.windows.calibration_windows", lambda *args: pytest.fail("text was read"))
    with pytest.raises(BadRecipe, match="the model has nothing to learn with distill scales = "):
        quantized(
            short[name], tmp_path / "out", token_file,
            **recipe, distill_steps=3, distill={"tokens": 24} | dict.fromkeys(spaces, False),
        )  # fmt: skip
    assert [item.name for item in tmp_path.iterdir()] == []


@pytest.mark.parametrize("space", ["zero_points", "column_scales", "norm_biases"])
def test_a_checkpoint_is_known_to_have_it_as_its_plan_did(
    space: str, short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    alone = {"distill_steps": 2, "distill": {"tokens": 96} | {name: name == space for name in SPACES}}
    recipe = Recipe(calibration=str(token_file), **{**DATA, **METHODS["d2quant-plus"], **alone})
    out = quantized(short["llama"], tmp_path / "out", token_file, **METHODS["d2quant-plus"], **alone)
    distill_checkpoint(out, short["llama"], recipe)

    quantized(short["llama"], tmp_path / "plain", token_file, **METHODS["rtn"])
    with pytest.raises(BadRecipe, match="plain has nothing to learn with distill scales = False"):
        distill_checkpoint(tmp_path / "plain", short["llama"], recipe)

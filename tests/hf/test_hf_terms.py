"""Column scales and every other term of a linear in a transformers model: loaded, run, saved and counted."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import subnibble
from linears import built, changed
from spoiled_checkpoint import spoiled_copy
from subnibble import Recipe
from subnibble.checkpoint.manifest import PackedConfig
from subnibble.checkpoint.module_specs import linear_spec
from subnibble.checkpoint.opening import open_source
from subnibble.checkpoint.size import measure
from subnibble.errors import CheckpointError
from subnibble.hf import packed_modules
from subnibble.kernels.native import TORCH, chosen
from subnibble.rounding.grid import Clip, quantized
from subnibble.runtime.modules import PackedLinear
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.linear import Linear
from subnibble.tensor.packed import PackedRange, PackedTensor
from subnibble.tensor.scheme import Scheme
from test_conformance import dense_copy

O_PROJ = "model.layers.1.self_attn.o_proj"


@pytest.fixture(scope="module")
def scaled(folders: dict[str, Path], token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama` with column scales of every linear; those of o_proj have nothing to absorb them."""
    out = tmp_path_factory.mktemp("scaled") / "llama"
    recipe = Recipe(
        method="d2quant", bits=3, group_size=16, embedding_bits=8, calibration=str(token_file), num_windows=4,
        window=32, options={"columns": "all", "iterations": 3},
    )  # fmt: skip
    subnibble.quantize(folders["llama"], out, recipe)
    return out


def test_column_scales_are_loaded_in_float16_whatever_the_type_of_loading(scaled: Path) -> None:
    ids = torch.arange(24).view(2, 12)
    outputs = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = AutoModelForCausalLM.from_pretrained(scaled, dtype=dtype)
        stored = {path: module.column_scale for path, module in packed_modules(model).items() if path in linears(model)}
        assert {path for path, scale in stored.items() if scale is not None} == {
            f"model.layers.{i}.self_attn.o_proj" for i in range(3)
        }
        scale = stored[O_PROJ]
        assert scale.dtype == torch.float16
        assert scale.shape == (96,)
        assert torch.equal(scale, tensor_of(scaled, f"{O_PROJ}.column_scale"))
        assert bool((scale > 0).all())
        assert len(scale.unique()) > 32
        with torch.no_grad():
            outputs[dtype] = model(ids).logits.float()
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        difference = (outputs[dtype] - outputs[torch.float32]).norm() / outputs[torch.float32].norm()
        assert float(difference) < tolerance


def linears(model: torch.nn.Module) -> set[str]:
    return {path for path in packed_modules(model) if "layers" in path}


def tensor_of(folder: Path, name: str) -> torch.Tensor:
    from safetensors.torch import load_file

    shard = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    return load_file(folder / shard)[name]


def test_generation_with_column_scales_is_that_of_the_dense_model(scaled: Path, folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(scaled, dtype=torch.float32)
    dense = dense_copy(folders["llama"], model)
    ids = torch.tensor([[1, 2, 5, 9, 12], [3, 4, 5, 6, 7]])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings), dense.generate(ids, **settings))
    with torch.no_grad():
        logits = model(ids).logits
        with chosen(TORCH):
            assert torch.equal(model(ids).logits, dense(ids).logits)
        # Kernels sum in another order: a few rounding errors of float32.
        torch.testing.assert_close(logits, dense(ids).logits, rtol=1e-5, atol=1e-5)
        # The scales matter: without one of them the model is another.
        model.get_submodule(O_PROJ).column_scale.fill_(1)
        assert float((model(ids).logits - logits).norm() / logits.norm()) > 1e-3


def test_column_scales_survive_save_pretrained_bit_for_bit(scaled: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(scaled, dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config["modules"][O_PROJ]["column_scale"] is True
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(ids).logits
            for folder in (scaled, tmp_path / "saved")
        )
    assert torch.equal(before, after)


@pytest.mark.parametrize("how", ["missing", "misshapen", "another type", "one too many"])
def test_a_checkpoint_whose_column_scale_is_not_whole_is_refused(how: str, scaled: Path, tmp_path: Path) -> None:
    name = f"{O_PROJ}.column_scale"
    folder = spoiled_copy(scaled, tmp_path / "spoiled", name, how)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_column_scale_that_the_config_does_not_name_is_refused(scaled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    folder.mkdir()
    for file in scaled.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["modules"][O_PROJ]["column_scale"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=re.escape(f"tensor {O_PROJ}.column_scale has no place")):
        AutoModelForCausalLM.from_pretrained(folder)


def test_recipe_beside_a_scaled_checkpoint_makes_the_same_bytes(
    scaled: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    report = subnibble.quantize(folders["llama"], tmp_path / "again", Recipe.from_toml(scaled / "recipe.toml"))
    assert report.weights_sha256 == json.loads((scaled / "report.json").read_text())["weights_sha256"]


def test_column_scales_are_counted_in_the_effective_bits(scaled: Path) -> None:
    report = json.loads((scaled / "report.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(scaled, dtype=torch.float32)
    bits = weights = 0
    for path in linears(model):
        module = model.get_submodule(path)
        result = 8 * sum(buffer.nbytes for buffer in module.buffers())
        bits, weights = bits + result, weights + module.in_features * module.out_features
        (row,) = [row for row in report["linears"] if row["path"] == path]
        assert row["effective_bits"] == pytest.approx(result / (module.in_features * module.out_features))
    # Four norms have a bias of 48 float16 numbers.
    assert report["size"]["effective_bits"] == pytest.approx((bits + 4 * 48 * 16) / weights)


UP_PROJ = "model.layers.1.mlp.up_proj"
WHOLE_NAMES = {
    "codes", "scales", "zeros", "bias", "column_scale", "gather",
    "salient.codes", "salient.scales", "down.codes", "down.scales", "up.codes", "up.scales",
}  # fmt: skip


def rounded(rows: int, columns: int, scheme: Scheme, seed: int) -> PackedTensor:
    weight = 0.1 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return PackedTensor((PackedRange.pack(quantized(weight, scheme, Clip("minmax")), scheme),))


def every_term(bias: torch.Tensor) -> Linear:
    """A linear of 48 inputs, 80 outputs and every term."""
    generator = torch.Generator().manual_seed(7)
    return built(
        rounded(80, 48, Scheme(3, 16), 0),
        bias=bias,
        column_scale=(0.5 + torch.rand(48, generator=generator)).half(),
        gather=torch.randperm(48, generator=generator).to(torch.int16),
        blocks=(32, 16),
        activation=ActivationScheme(4, 24, clip=0.95),
        salient=rounded(80, 33, Scheme(4, 32, "none", "e8m0", "mxfp4"), 1),
        requantized=33,
        low_rank=(rounded(5, 48, Scheme(8, -1, "none"), 2), rounded(80, 5, Scheme(8, -1, "none", "bfloat16"), 3)),
    )


@pytest.fixture(scope="module")
def composed(packed: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama` in which one linear has every term, and nothing else has changed."""
    model = AutoModelForCausalLM.from_pretrained(packed["llama"], dtype=torch.float32)
    bias = model.get_submodule(UP_PROJ).bias
    assert bias is not None
    linear = PackedLinear(every_term(bias.detach().clone()))
    model.set_submodule(UP_PROJ, linear)
    before = model.config.quantization_config.packed
    model.config.quantization_config.packed = PackedConfig({**before.modules, UP_PROJ: linear_spec(linear.linear)})
    folder = tmp_path_factory.mktemp("composed") / "llama"
    model.save_pretrained(folder)
    with torch.no_grad():
        torch.save(model(torch.arange(24).view(2, 12)).logits, folder.parent / "logits.pt")
    return folder


def bits_of(state: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, bytes]]:
    return {name: (t.dtype, t.contiguous().view(torch.uint8).numpy().tobytes()) for name, t in state.items()}


def test_a_linear_with_every_term_survives_save_and_load_bit_for_bit(composed: Path, tmp_path: Path) -> None:
    config = json.loads((composed / "config.json").read_text())["quantization_config"]
    assert {"gather", "salient", "low_rank"} < config["modules"][UP_PROJ].keys()
    assert list(config["activations"]) == ["a4g24-clip0.95"]
    ids = torch.arange(24).view(2, 12)
    model = AutoModelForCausalLM.from_pretrained(composed, dtype=torch.float32)
    linear = model.get_submodule(UP_PROJ)
    assert bits_of(linear.state_dict()) == bits_of(PackedLinear(every_term(linear.bias)).state_dict())
    assert set(linear.state_dict()) == WHOLE_NAMES
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(logits, torch.load(composed.parent / "logits.pt"))
        # Every term matters: a model without one is another.
        for change in ({"activation": None}, {"blocks": ()}, {"gather": None}, {"salient": None, "requantized": 0},
                       {"requantized": 0}, {"low_rank": None}, {"column_scale": None}):  # fmt: skip
            other = copy.deepcopy(model)
            other.set_submodule(UP_PROJ, PackedLinear(changed(linear.linear, **change)))
            assert not torch.equal(other(ids).logits, logits), change
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert bits_of(again.state_dict()) == bits_of(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_type_of_loading_leaves_every_term_alone(dtype: torch.dtype, composed: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(composed, dtype=dtype)
    linear = model.get_submodule(UP_PROJ)
    stored = bits_of(every_term(linear.bias).weight.main.state())
    assert {name: value for name, value in bits_of(linear.state_dict()).items() if name in stored} == stored
    types = {name: buffer.dtype for name, buffer in linear.named_buffers()}
    assert types["gather"] == torch.int16
    assert types["column_scale"] == torch.float16
    assert types["salient.scales"] == torch.uint8
    assert types["down.scales"] == torch.float16
    assert types["up.scales"] == torch.bfloat16
    assert linear.bias.dtype == dtype
    ids = torch.arange(12).view(1, 12)
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)(ids).logits
        assert torch.equal(model(ids).logits, after)


@pytest.mark.parametrize("name", sorted(WHOLE_NAMES - {"bias"}))
@pytest.mark.parametrize("how", ["missing", "misshapen", "another type", "one too many"])
def test_a_checkpoint_with_a_term_that_is_not_whole_is_refused(
    how: str, name: str, composed: Path, tmp_path: Path
) -> None:
    folder = spoiled_copy(composed, tmp_path / "spoiled", f"{UP_PROJ}.{name}", how)
    with pytest.raises(CheckpointError, match=re.escape(f"{UP_PROJ}.{name}")):
        AutoModelForCausalLM.from_pretrained(folder)


def test_every_term_is_counted_in_bits_and_none_in_parameters(composed: Path, packed: dict[str, Path]) -> None:
    plain, whole = measure(open_source(packed["llama"])), measure(open_source(composed))
    model = AutoModelForCausalLM.from_pretrained(composed, dtype=torch.float32)
    bits = weights = inputs = quantized = 0
    for path in linears(model):
        module = model.get_submodule(path)
        if not isinstance(module, PackedLinear):
            continue
        bits += 8 * sum(buffer.nbytes for buffer in module.buffers())
        weights += module.in_features * module.out_features
        inputs += module.in_features
        quantized += 16 * module.in_features
    # 48 codes, 33 of the salient columns twice and 5 of the branch, of 4 bits; 2, 2 x 2 and 1 groups of 20.
    quantized += -16 * 48 + 4 * (48 + 2 * 33 + 5) + 20 * (2 + 4 + 1)
    assert whole.effective_bits == bits / weights
    assert whole.activation_bits == quantized / inputs
    assert plain.activation_bits == 16
    assert whole.parameters == plain.parameters

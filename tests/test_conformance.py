"""One suite over every method and every architecture."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import subnibble
from conftest import CONFIGS
from subnibble import Recipe
from subnibble.calibrate.stream import BlockStream
from subnibble.checkpoint.manifest import packed_config_of
from subnibble.checkpoint.module_specs import NormBiasSpec
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.checkpoint.writer import CheckpointWriter, Shard
from subnibble.hf import packed_modules
from subnibble.kernels.native import TORCH, chosen
from subnibble.methods import METHODS
from subnibble.model.skeleton import Skeleton
from subnibble.model.transformers_api.blocks import run_block
from subnibble.pipeline.plan import plan_rotation
from subnibble.report import Report
from subnibble.rounding.error import relative_errors
from subnibble.runtime import activations
from subnibble.runtime.integer import multiply_add_
from subnibble.runtime.modules import HeadInputMatrix, PackedEmbedding, PackedLinear, TiedHead, add_output_bias_
from subnibble.tensor import hadamard
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.packed import PackedRange, QuantizedMatrix
from subnibble.tensor.scheme import Scheme
from subnibble.transforms.rotate_values import make_value_rotation

SETTINGS = {
    "w3-ragged": {"bits": 3, "group_size": 32, "embedding_bits": 8},
    "w2-channel-real": {"bits": 2, "group_size": -1, "zero_point": "real", "embedding_bits": 16},
    "w2-sign": {"bits": 2, "group_size": 32, "grid": "sign", "embedding_bits": 8},
    "w4-symmetric": {"bits": 4, "group_size": 16, "zero_point": "none", "embedding_bits": 4},
}


# Inputs quantized, too; small ranks for small models.
INPUT_SETTINGS = {
    "w4a4": {"bits": 4, "group_size": 32, "activation_bits": 4, "embedding_bits": 8},
    "mxfp4": {"bits": 4, "group_size": 32, "grid": "mxfp4", "activation_bits": 4, "embedding_bits": 8},
    "w3a8-token": {
        "bits": 3, "group_size": 16, "activation_bits": 8, "activation_group_size": -1,
        "activation_zero_point": "none", "embedding_bits": 16,
    },
}  # fmt: skip
OPTIONS = {
    "serq": {"rank": 32}, "serq-plus": {"rank": 16}, "l2qer": {"rank": 4}, "qera": {"rank": 4}, "atom": {"outliers": 8},
    "omniquant": {"effort": "fast"}, "bisup": {"effort": "fast", "rank": 4},
}  # fmt: skip
WITH_INPUTS = (
    "rtn",
    "gptq",
    "smoothquant",
    "l2qer",
    "qera",
    "quarot",
    "serq",
    "serq-plus",
    "atom",
    "omniquant",
    "bisup",
)
# Outlier channels are coded, and ranges learned, on uniform grids alone (`test_prefix.py`, `tuning/`).
UNIFORM_ONLY = ("atom", "omniquant", "bisup")
COMBINATIONS = [(m, s) for m in WITH_INPUTS for s in INPUT_SETTINGS if m not in UNIFORM_ONLY or s != "mxfp4"]
# One rounds nothing (`test_prefix.py`).
WEIGHT_ONLY = tuple(method for method in METHODS if method not in (*WITH_INPUTS[2:], "none"))


def recipe_of(method: str, tokens: Path, settings: dict[str, object]) -> Recipe:
    own: dict[str, Any] = {"options": OPTIONS.get(method, {}), **settings}
    return Recipe(method=method, calibration=str(tokens), num_windows=6, window=32, device="cpu", **own)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        result |= load_file(file)
    return result


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(40).view(2, 20) % 96
    with torch.no_grad():
        return model(ids).logits


def dense_copy(source: Path, packed: torch.nn.Module) -> torch.nn.Module:
    """The original model, holding everything that the packed one stores, its packed matrices dense."""
    config = AutoConfig.from_pretrained(source)
    config.tie_word_embeddings = False
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    stored = dict(packed.named_parameters(remove_duplicate=False))
    for path, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            stored[f"{path}.weight"] = module.packed.dequantize()
            if module.column_scale is not None:
                scale = module.column_scale.float()
                dense.get_submodule(path).register_forward_pre_hook(lambda _, args, scale=scale: args[0] * scale)
        elif isinstance(module, PackedEmbedding):
            stored[f"{path}.weight"] = module.packed.dequantize()
        elif isinstance(module, TiedHead):
            stored[f"{path}.weight"] = module._embedding[0].packed.dequantize()
        elif isinstance(module, HeadInputMatrix):
            head = dense.get_submodule(path.rpartition(".")[0])
            head.register_forward_pre_hook(lambda _, args, matrix=module: (matrix(args[0]),))
    for path, spec in packed_config_of(packed.config).modules.items():
        if isinstance(spec, NormBiasSpec):
            add_output_bias_(dense.get_submodule(path), torch.empty(spec.rows))
    assert set(stored) == set(dict(dense.named_parameters()))
    for name, parameter in dense.named_parameters():
        parameter.data = stored[name].data
    return dense


def check_quantized_linears(model: torch.nn.Module) -> None:
    """Every linear gives what its stored terms say, on the inputs that it meets, by a per-element bound."""
    met = {}

    def note(module: PackedLinear, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        met[module] = (args[0].flatten(0, -2), output.flatten(0, -2))

    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    handles = [linear.register_forward_hook(note) for linear in linears if linear.activation is not None]
    logits(model)
    assert len(met) == len(handles) > 0
    for handle in handles:
        handle.remove()
    for linear, (x, y) in met.items():
        terms = linear.linear
        inner = x if terms.input.gather is None else x[:, terms.input.gather.long()]
        inner = hadamard.multiply(inner, terms.input.blocks) if terms.input.blocks else inner
        quantized = activations.quantize(inner, terms.input.activation)
        values, branches = quantized.values(), []
        if terms.weight.low_rank is not None:
            # Exact (`test_integer.py`): one that is not may lie on the other side of a code's edge.
            down, up = terms.weight.low_rank
            between = torch.zeros(x.shape[0], down.shape[0])
            multiply_add_(between, quantized, down)
            branches.append((activations.quantize(between, terms.input.activation).values(), up.dequantize()))
        if terms.weight.salient is not None:
            branches.append((values[:, : terms.weight.salient.shape[1]], terms.weight.salient.dequantize()))
        if terms.input.requantized:
            rank = terms.weight.salient.shape[1]
            rest = activations.quantize(inner[:, :rank] - values[:, :rank], terms.input.activation).values()
            branches.append((rest, terms.weight.salient.dequantize()))
        branches.append((values, terms.weight.main.dequantize()))
        target = sum(a.double() @ w.double().T for a, w in branches)
        size = sum(a.abs() @ w.abs().T for a, w in branches)
        if terms.weight.bias is not None:
            target, size = target + terms.weight.bias, size + terms.weight.bias.abs()
        assert bool(((y - target).abs() <= 1e-5 * size + 1e-6).all())


@lru_cache(maxsize=len(CONFIGS))
def original_of(source: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return model


def check_reported(report: Report, source: Path, packed: torch.nn.Module) -> int:
    """Linears that the report calls comparable with the original's are as far from them as it says; how many are."""
    compared = 0
    original = original_of(source)
    for linear in report.linears:
        if not linear.basis_changed:
            weight = original.get_submodule(linear.path).weight.detach()
            stored = packed.get_submodule(linear.path).dequantize()
            (error,) = relative_errors(weight, stored, None, [weight.shape[0]])
            assert error.weight == pytest.approx(linear.weight_error, rel=1e-3, abs=1e-6), linear.path
            compared += 1
    return compared


def check_method(method: str, source: Path, tokens: Path, out: Path, settings: dict[str, object]) -> None:
    """What every method must keep on every architecture."""
    recipe = recipe_of(method, tokens, settings)
    skeleton = Skeleton(SafetensorsSource(source), torch.float32, torch.device("cpu"))
    linears = list(skeleton.linear_shapes())

    residents, quantized = [], []
    write_shard, pack = CheckpointWriter.write_shard, PackedRange.pack

    def count_resident(self: CheckpointWriter, tensors: dict[str, torch.Tensor]) -> Shard:
        blocks = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
        residents.append(blocks)
        return write_shard(self, tensors)

    def check_codes(part: QuantizedMatrix, scheme: Scheme) -> PackedRange:
        assert int(part.codes.min()) >= 0
        assert int(part.codes.max()) < scheme.levels
        quantized.append(part.codes.shape)
        return pack(part, scheme)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "write_shard", count_resident)
        patch.setattr(PackedRange, "pack", check_codes)
        report = subnibble.quantize(source, out / "a", recipe)

    # every linear is rounded exactly once, and written with its own block
    assert [linear.path for linear in report.linears] == linears
    assert residents == [{str(i)} for i in range(skeleton.num_blocks)] + [set()]

    # rotations and transforms leave the function alone
    steps = METHODS[method].build(METHODS[method].configure(OPTIONS.get(method, {})))
    block, call = skeleton.load_block(1), skeleton.block_calls(12)[1]
    hidden = torch.randn(1, 12, skeleton.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = run_block(block.module, hidden, call)
        edit = plan_rotation(recipe, steps, skeleton)
        if edit is not None:
            hidden, before = (edit.embedding(states[0]).unsqueeze(0) for states in (hidden, before))
            edit.edit_block_(block)
        values = make_value_rotation(steps.value_rotation, block.heads.width, recipe.seed)
        if values is not None:
            values.edit_block_(block)
        stream = BlockStream(block, [hidden], call)
        names = block.arch.linears
        result = stream.statistics(dict.fromkeys(names, Scheme(3, 16)), dict.fromkeys(names, ActivationScheme(4)))
        for transform in steps.transforms:
            transform(block, result)
        after = run_block(block.module, hidden, call)
    assert float((after - before).norm() / (before - hidden).norm()) < 1e-5

    # what is stored evaluates as the same weights do in memory, bit for bit
    model = AutoModelForCausalLM.from_pretrained(out / "a", dtype=torch.float32)
    assert {p for p, m in packed_modules(model).items() if isinstance(m, PackedLinear)} >= set(linears)
    if recipe.activation is None:
        dense = logits(dense_copy(source, model))
        with chosen(TORCH):
            assert torch.equal(logits(model), dense)
        # Kernels round inputs to 24 bits; a quantized cache may then store another code.
        if recipe.cache_scheme() is None:
            assert float((logits(model) - dense).norm() / dense.norm()) < 1e-5
    else:
        check_quantized_linears(model)
    check_reported(report, source, model)

    # save and load are bit-exact
    model.save_pretrained(out / "c")
    saved = tensors_of(out / "c")
    for name, tensor in tensors_of(out / "a").items():
        assert torch.equal(saved[name], tensor.to(saved[name].dtype)), name
        assert saved[name].dtype == tensor.dtype or name.endswith(
            ("embed_tokens.weight", "lm_head.weight", "norm.bias")
        )
    reloaded = AutoModelForCausalLM.from_pretrained(out / "c", dtype=torch.float32)
    assert packed_config_of(reloaded.config) == packed_config_of(model.config)
    assert torch.equal(logits(reloaded), logits(model))


def check_seed(method: str, source: Path, tokens: Path, out: Path, settings: dict[str, object]) -> None:
    """The same seed gives the same bytes."""
    recipe = recipe_of(method, tokens, settings)
    first, again = (subnibble.quantize(source, out / name, recipe) for name in ("first", "again"))
    assert again.weights_sha256 == first.weights_sha256


@pytest.mark.pairwise
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("method", WEIGHT_ONLY)
def test_method_conforms(
    method: str, model: str, settings: dict[str, object], short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    check_method(method, short[model], token_file, tmp_path, settings)


@pytest.mark.pairwise
@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize(("method", "settings"), COMBINATIONS)
def test_method_conforms_with_quantized_inputs(
    method: str, settings: str, model: str, short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    check_method(method, short[model], token_file, tmp_path, INPUT_SETTINGS[settings])


@pytest.mark.each_value
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("method", WEIGHT_ONLY)
def test_the_same_seed_gives_the_same_bytes(
    method: str, model: str, settings: dict[str, object], short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    check_seed(method, short[model], token_file, tmp_path, settings)


@pytest.mark.each_value
@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize(("method", "settings"), COMBINATIONS)
def test_the_same_seed_gives_the_same_bytes_with_quantized_inputs(
    method: str, settings: str, model: str, short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    check_seed(method, short[model], token_file, tmp_path, INPUT_SETTINGS[settings])


@pytest.mark.parametrize(
    ("options", "compared"),
    [
        ({"rotation": "none"}, 15), ({"value_rotation": "none"}, 0),
        ({"rotation": "none", "value_rotation": "none"}, 21),
    ],
)  # fmt: skip
def test_report_names_the_linears_that_rotations_move(
    options: dict[str, str], compared: int, folders: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    recipe = Recipe("quarot", group_size=32, calibration=str(token_file), num_windows=2, window=32, options=options)
    report = subnibble.quantize(folders["llama"], tmp_path / "out", recipe)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert check_reported(report, folders["llama"], packed) == compared


def test_only_one_block_is_resident(
    folders: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident: list[int] = []
    load_block = Skeleton.load_block

    def watched(self: Skeleton, index: int) -> object:
        block = load_block(self, index)
        parameters = self.model.named_parameters()
        resident.append(len({n.split(".")[2] for n, p in parameters if p.device.type != "meta" and ".layers." in n}))
        return block

    monkeypatch.setattr(Skeleton, "load_block", watched)
    recipe = Recipe(bits=3, group_size=16, calibration=str(token_file), num_windows=4, window=32)
    subnibble.quantize(folders["llama"], tmp_path / "out", recipe)
    assert resident == [1] * len(resident)
    assert len(resident) >= 3

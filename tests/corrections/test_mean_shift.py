"""The bias of a norm is the mean shift of its outputs, over all tokens and channels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import subnibble
from subnibble import Recipe
from subnibble.arch import find_arch
from subnibble.arch.site import Heads
from subnibble.calibrate.stats import value_over
from subnibble.calibrate.windows import calibration_windows
from subnibble.checkpoint.manifest import packed_config_of
from subnibble.checkpoint.module_specs import NormBiasSpec
from subnibble.corrections.mean_shift import MeanShift
from subnibble.errors import BadRecipe, NumericalFailure
from subnibble.methods import METHODS
from subnibble.model.skeleton import Block
from subnibble.transforms.rotate import make_rotation, rotate_block_

WINDOWS, WINDOW, CHANNELS = 7, 10, 37
Batches = list[tuple[Tensor, Tensor]]


def tokens(seed: int) -> Tensor:
    """(windows, tokens, channels), signed, one channel much larger, one zero."""
    x = torch.randn(WINDOWS, WINDOW, CHANNELS, generator=torch.Generator().manual_seed(seed))
    x[..., 4] *= -30
    x[..., 9] = 0
    return x


def batches(target: Tensor, actual: Tensor, size: int = 3) -> Batches:
    """As the pipeline hands them over: a few windows at a time, flattened to tokens."""
    return [(a.flatten(0, 1), b.flatten(0, 1)) for a, b in zip(target.split(size), actual.split(size), strict=True)]


def mean_shift(outputs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    return value_over(MeanShift(CHANNELS), outputs)


def squared_error(target: Tensor, actual: Tensor, bias: Tensor) -> Tensor:
    """Of each channel, in float64."""
    return (actual.double() + bias.double() - target.double()).square().flatten(0, -2).sum(0)


def test_a_constant_shift_is_the_bias() -> None:
    result = tokens(0)
    bias = mean_shift(batches(result + 0.2, result))
    assert bias.dtype == torch.float32
    assert bias.shape == (CHANNELS,)
    assert float((bias - 0.2).abs().max()) < 1e-6
    assert float((mean_shift(batches(result, result + 0.2)) + 0.2).abs().max()) < 1e-6


def test_no_shift_gives_no_bias() -> None:
    assert torch.equal(mean_shift(batches(tokens(0), tokens(0))), torch.zeros(CHANNELS))


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_outputs_out_of_range_make_no_bias(number: float) -> None:
    result = tokens(1)
    result[2, 3, 5] = number
    with pytest.raises(NumericalFailure, match='use dtype = "bfloat16" or "float32"'):
        mean_shift(batches(tokens(0), result))


def test_the_published_bias_has_the_least_squared_error() -> None:
    target, actual = tokens(0) + 0.1, tokens(1)
    bias = mean_shift(batches(target, actual))
    least = squared_error(target, actual, bias)
    for step in (1e-3, -1e-3, 0.1, -0.1):
        assert bool((squared_error(target, actual, bias + step) > least).all())
    assert bool((least <= squared_error(target, actual, torch.zeros(CHANNELS))).all())


def test_the_bias_commutes_with_a_rotation() -> None:
    q, _ = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(8)))
    target, actual = tokens(0), tokens(1) / 3
    plain = mean_shift(batches(target, actual))
    rotated = mean_shift(batches(target @ q, actual @ q))
    assert float((rotated - plain @ q).abs().max()) < 1e-5


def test_batches_of_any_size_and_type_give_the_same_bias() -> None:
    target, actual = tokens(0) + 0.3, tokens(0) + 0.1 * tokens(1)
    biases = [mean_shift(batches(target, actual, size)) for size in (1, 2, 3, 7)]
    assert bool(biases[0].any())
    assert all(torch.equal(bias, biases[0]) for bias in biases)
    iterator = iter(batches(target, actual))
    assert torch.equal(mean_shift(iterator), biases[0])
    half = [(a.bfloat16(), b.bfloat16()) for a, b in batches(target, actual)]
    wide = [(a.float(), b.float()) for a, b in half]
    # The difference of 16-bit numbers is taken in float32.
    assert torch.equal(mean_shift(half), mean_shift(wide))


def test_the_bias_is_kept_within_ten() -> None:
    shift = torch.tensor([25.0, -25.0, 9.5, -9.5, 10.0])
    result = tokens(0)[..., 10:15]
    bias = value_over(MeanShift(5), batches(result + shift, result))
    assert torch.equal(bias[:2], torch.tensor([10.0, -10.0]))
    assert torch.allclose(bias[2:], torch.tensor([9.5, -9.5, 10.0]), atol=1e-5)


def test_an_unknown_form_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(BadRecipe, match="mean_shift is 'all'; choose one of none, published"):
        METHODS["d2quant"].build(METHODS["d2quant"].configure({"mean_shift": "all"}))
    assert METHODS["d2quant"].build(METHODS["d2quant"].configure({"mean_shift": "none"})).mean_shift == "none"


# The whole way. Recomputed from the stored model alone: a block's teacher is the stored model with the original
# attention in that block (the final norm's: with the original MLP in the last one), its student the stored model.

NORMS = [f"model.layers.{i}.post_attention_layernorm" for i in range(3)] + ["model.norm"]
STEP = 2.0**-11
Runs = Callable[..., tuple[Any, Any, Tensor]]


@pytest.fixture(scope="module")
def runs(folders: dict[str, Path], token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """(model, form, rotation) -> original model in the basis of the stored one, stored model, calibration windows."""
    cache: dict[tuple[str, str, str], tuple[Any, Any, Tensor]] = {}
    root = tmp_path_factory.mktemp("shift")

    def run(name: str, form: str, rotation: str = "none") -> tuple[Any, Any, Tensor]:
        key = (name, form, rotation)
        if key not in cache:
            recipe = Recipe(
                method="d2quant", bits=2, group_size=16, calibration=str(token_file), num_windows=12, window=32,
                options={"mean_shift": form, "rotation": rotation, "iterations": 2}, device="cpu",
            )  # fmt: skip
            folder = root / "-".join(key)
            subnibble.quantize(folders[name], folder, recipe)
            windows = calibration_windows(str(token_file), lambda: None, 12, 32, recipe.seed, 96)
            original, stored = (
                AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (folders[name], folder)
            )
            cache[key] = rotated(original, rotation, recipe), stored, windows
        return cache[key]

    return run


def rotated(model: Any, rotation: str, recipe: Recipe) -> Any:
    """The blocks of a model in the basis that the pipeline chose; the rest is not looked at."""
    basis = make_rotation(rotation, model.config.hidden_size, recipe.scheme, recipe.seed, torch.device("cpu"))
    arch = find_arch(model.config.model_type)
    for index, layer in enumerate(model.model.layers):
        if basis is not None:
            rotate_block_(Block(index, arch.block_path(index), layer, arch, Heads.of(model.config)), basis)
    return model


def norm_outputs(model: Any, path: str, windows: Tensor) -> Tensor:
    """What a norm gives before its bias."""
    norm = model.get_submodule(path)
    outputs: dict[str, Tensor] = {}
    bias = getattr(norm, "bias", None)
    handle = norm.register_forward_hook(lambda module, args, output: outputs.update(out=output))
    with torch.no_grad():
        model(windows)
    handle.remove()
    return outputs["out"].detach() if bias is None else (outputs["out"] - bias).detach()


def teacher_and_student(original: Any, stored: Any, path: str, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of the norm at `path` with and without the original in front of it."""
    student = norm_outputs(stored, path, windows)
    module = "model.layers.2.mlp" if path == "model.norm" else path.replace("post_attention_layernorm", "self_attn")
    quantized = stored.get_submodule(module)
    stored.set_submodule(module, original.get_submodule(module))
    try:
        return norm_outputs(stored, path, windows), student
    finally:
        stored.set_submodule(module, quantized)


def close(actual: Tensor, target: Tensor, spread: Tensor) -> bool:
    """Within the storage at float16, and what absorbing scales at float16 does to norm outputs of size `spread`."""
    return bool(((actual - target).abs() <= STEP * (target.abs() + spread)).all())


@pytest.mark.parametrize(("name", "rotation"), [("llama-tied", "none"), ("qwen2", "none"), ("qwen2", "groups")])
def test_norms_behind_quantized_linears_store_the_mean_shift_of_their_own_block(
    name: str, rotation: str, runs: Runs
) -> None:
    original, stored, windows = runs(name, "published", rotation)
    specs = packed_config_of(stored.config).modules
    assert [path for path, spec in specs.items() if isinstance(spec, NormBiasSpec)] == NORMS
    for path in NORMS:
        bias = stored.get_submodule(path).bias.detach()
        assert torch.equal(bias, bias.half().float())
        teacher, student = teacher_and_student(original, stored, path, windows)
        target, spread = (teacher - student).flatten(0, 1).mean(0), student.abs().flatten(0, 1).mean(0)
        assert close(bias, target, spread), path
        assert not close(bias, -target, spread), path
        assert not close(bias, torch.zeros_like(bias), spread), path
        without_first = (teacher - student)[:, 1:].flatten(0, 1).mean(0)
        assert not close(bias, without_first, spread), path
        if path != NORMS[0] and rotation == "none":
            # What drifted upstream is not in it.
            drifted = norm_outputs(original, path, windows) - student
            assert not close(bias, drifted.flatten(0, 1).mean(0), spread), path


def test_a_method_without_mean_shift_stores_no_norm_bias(
    runs: Runs,
) -> None:
    _, stored, _ = runs("qwen2", "none")
    assert not any(isinstance(spec, NormBiasSpec) for spec in packed_config_of(stored.config).modules.values())
    assert not any("norm.bias" in name for name in stored.state_dict())

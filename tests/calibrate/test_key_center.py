"""Keys that are coded less their calibrated mean: from quantization into the checkpoint and the running cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import random_model
from kv_calls import cache_of, passing
from subnibble import Recipe, quantize
from subnibble.calibrate.key_center import KeyMean
from subnibble.checkpoint.manifest import packed_config_of, stored_shapes
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.errors import BadRecipe, CheckpointError
from subnibble.evaluation.evaluate import Evaluation, evaluate
from subnibble.generate.prefix import add_prefix
from subnibble.generate.prepare import prepare_
from subnibble.hf.attention import attach_cache_, attached_cache, change_scheme_, detach_cache_
from subnibble.runtime.kv_cache import TensorStore
from subnibble.tensor.cache_scheme import CacheScheme, PrefixIds

DATA = {"num_windows": 8, "window": 32, "device": "cpu", "dtype": "float32"}
BASES: dict[str, dict[str, str]] = {
    "after": {}, "before": {"rope": "before"}, "hadamard": {"key_rotation": "hadamard"},
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "none": {"method": "none"},
    "rotated": {"method": "rtn", "group_size": 16, "bits": 8, "options": {"rotation": "groups"}},
    "quarot": {"method": "quarot", "group_size": 16, "bits": 8, "activation_bits": 8},
    "atom": {"method": "atom", "group_size": 16, "bits": 8, "activation_bits": 8, "options": {"outliers": 8}},
    "serq-heads": {"method": "serq", "group_size": 16, "bits": 8, "options": {"rank": 16, "permutation": "offline"}},
}


@pytest.fixture(scope="module")
def folder(short: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama` whose keys are mostly their bias, as those of real models are."""
    model, result = random_model("llama"), tmp_path_factory.mktemp("biased")
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.k_proj.bias *= 8
    model.save_pretrained(result)
    AutoTokenizer.from_pretrained(short["llama"]).save_pretrained(result)
    return result


def recipe_of(method: str, token_file: Path, bits: int = 3, **kv: Any) -> Recipe:
    return Recipe(**METHODS[method], **DATA, calibration=str(token_file), kv_bits=bits, kv={"key_center": "mean", **kv})


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def windows(token_file: Path) -> Tensor:
    return torch.from_numpy(np.load(token_file)).long().view(-1, 32)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def keys_to_code(model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Of each layer, (heads, tokens, width): what the running cache is given, first tokens left out."""
    result: list[Tensor] = []
    append = TensorStore.append

    def noted(self: TensorStore, x: Tensor) -> Any:
        if self._of_keys:
            result.append(x[:, :, 1:].transpose(0, 1).flatten(1, 2))
        return append(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(TensorStore, "append", noted)
        logits(model, ids)
    return result


@pytest.mark.parametrize(("enough", "windows_taken"), [(1, 1), (3, 1), (4, 2), (6, 2), (7, 3), (99, 5)])
def test_the_mean_is_over_whole_windows_until_there_are_enough_tokens(enough: int, windows_taken: int) -> None:
    keys = torch.randn(5, 2, 4, 3, generator=torch.Generator().manual_seed(0))
    ordinary = torch.ones(5, 4, dtype=torch.bool)
    ordinary[:, 0] = False
    actual = KeyMean(enough)
    actual.update(keys, ordinary)
    assert actual.is_full == (enough <= 15)
    target = keys[:windows_taken, :, 1:].double().mean((0, 2))
    torch.testing.assert_close(actual.value, target, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("basis", BASES)
def test_the_stored_mean_is_that_of_the_keys_which_the_model_codes(
    basis: str, method: str, folder: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"rope": "after", "key_rotation": "none", **BASES[basis]}
    quantize(folder, tmp_path / "out", recipe_of(method, token_file, bits=8, **options))
    model = load(tmp_path / "out")
    assert attached_cache(model).scheme.key_center == "mean"
    for block, keys in zip(model.model.layers, keys_to_code(model, windows(token_file), monkeypatch), strict=True):
        stored, target = block.self_attn.key_center.mean.float(), keys.mean(1)
        assert float((stored - target).norm() / target.norm()) < 0.1
        # In another order of heads or of channels it would be far away.
        for dim in (0, 1):
            assert float((stored.roll(1, dim) - target).norm() / target.norm()) > 0.5


@pytest.mark.parametrize("basis", BASES)
def test_the_centre_lowers_the_error_and_leaves_what_is_not_coded(
    basis: str, folder: Path, token_file: Path, tmp_path: Path
) -> None:
    ids = windows(token_file)
    target = logits(load(folder), ids)
    quantize(folder, tmp_path / "out", recipe_of("none", token_file, **BASES[basis]))
    model = load(tmp_path / "out")

    def error(scheme: CacheScheme) -> float:
        attach_cache_(model, scheme)
        return float((logits(model, ids) - target).norm())

    centered = attached_cache(model).scheme
    # After rotary positions, which turn most channels around, least is constant.
    most = {"after": 0.95, "before": 0.7, "hadamard": 0.85}
    assert error(centered) < most[basis] * error(CacheScheme(3, **BASES[basis]))
    # What is in the window stays as it is, centre or not.
    attach_cache_(model, None)
    plain = logits(model, ids)
    attach_cache_(model, CacheScheme(3, window=64, key_center="mean", **BASES[basis]))
    torch.testing.assert_close(logits(model, ids), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("basis", BASES)
def test_at_once_and_in_pieces_are_the_same(
    basis: str, window: int, folder: Path, token_file: Path, tmp_path: Path
) -> None:
    quantize(folder, tmp_path / "out", recipe_of("none", token_file, window=window, **BASES[basis]))
    # Not load(): the means are float16 as they are, and the rest float64.
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64), windows(token_file)[:2]
    whole, past, actual = logits(model, ids), None, []
    for start, stop in ((0, 9), (9, 10), (10, 32)):
        with torch.no_grad():
            output = model(ids[:, start:stop], **passing(model, past), use_cache=True)
        past = cache_of(output)
        actual.append(output.logits)
    torch.testing.assert_close(torch.cat(actual, 1), whole, rtol=1e-9, atol=1e-9)


def test_it_is_stored_and_saved_again(folder: Path, token_file: Path, tmp_path: Path) -> None:
    report = quantize(folder, tmp_path / "out", recipe_of("quarot", token_file))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["cache"]["key_center"] == "mean"
    source = SafetensorsSource(tmp_path / "out")
    shapes = stored_shapes(packed_config_of(source.config))
    assert shapes["model.layers.2.self_attn.key_center.mean"] == (2, 16)
    assert source.load_raw("model.layers.2.self_attn.key_center.mean").dtype == torch.float16
    # Not a byte of a token.
    assert report.size["cache_bytes"] == 3 * CacheScheme(3).token_bytes(2, 16)
    model, ids = load(tmp_path / "out"), windows(token_file)
    target = logits(model, ids)
    # Even where the model ran on another cache between.
    change_scheme_(model, None)
    assert not torch.equal(logits(model, ids), target)
    attach_cache_(model, CacheScheme.from_dict(config["cache"]))
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert packed_config_of(again.config) == packed_config_of(model.config)
    assert torch.equal(logits(again, ids), target)
    # The recipe beside it makes the same bytes.
    requantized = quantize(folder, tmp_path / "requantized", Recipe.from_toml(tmp_path / "out" / "recipe.toml"))
    assert requantized.weights_sha256 == report.weights_sha256
    detach_cache_(model)
    model.save_pretrained(tmp_path / "plain")
    assert attached_cache(load(tmp_path / "plain")) is None


@pytest.mark.parametrize("method", ["none", "quarot"])
def test_it_stays_behind_a_prompt_that_comes_later(method: str, folder: Path, token_file: Path, tmp_path: Path) -> None:
    quantize(folder, tmp_path / "out", recipe_of(method, token_file))
    before = load(tmp_path / "out")
    add_prefix(tmp_path / "out", "w5 w9 w2", device="cpu")
    after = load(tmp_path / "out")
    for one, other in zip(before.model.layers, after.model.layers, strict=True):
        assert torch.equal(one.self_attn.key_center.mean, other.self_attn.key_center.mean)
    assert attached_cache(after).scheme == attached_cache(before).scheme
    assert not torch.equal(logits(after, windows(token_file)), logits(before, windows(token_file)))


@pytest.mark.parametrize("basis", BASES)
def test_a_prompt_while_quantizing_is_in_the_mean(
    basis: str, folder: Path, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of("none", token_file, bits=8, **BASES[basis])
    quantize(folder, tmp_path / "plain", recipe)
    quantize(folder, tmp_path / "out", Recipe.from_dict(recipe.to_dict() | {"system_prompt": "w5 w9 w2"}))
    plain, after_prefix = load(tmp_path / "plain"), load(tmp_path / "out")
    means = [model.model.layers[1].self_attn.key_center.mean for model in (plain, after_prefix)]
    assert not torch.equal(*means)
    quantized = keys_to_code(after_prefix, windows(token_file), monkeypatch)
    for block, keys in zip(after_prefix.model.layers, quantized, strict=True):
        stored, target = block.self_attn.key_center.mean.float(), keys.mean(1)
        assert float((stored - target).norm() / target.norm()) < 0.02


def test_distillation_and_evaluation_run_on_it(folder: Path, token_file: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = recipe_of("quarot", token_file, bits=2)
    values = recipe.to_dict() | {"distill_steps": 4}
    report = quantize(folder, tmp_path / "out", Recipe.from_dict(values))
    values["kv"] = {}
    plain = quantize(folder, tmp_path / "plain", Recipe.from_dict(values))
    assert report.distilled.before < plain.distilled.before
    evaluation = Evaluation(text=str(text_file), window=16, max_windows=2, device="cpu", dtype="float32")
    actual = evaluate(tmp_path / "out", evaluation)["perplexity"]
    # Another clip leaves the centre, another cache does not ask for it.
    changed = Evaluation(**{**vars(evaluation), "kv": {"clip": 0.7}})
    assert evaluate(tmp_path / "out", changed)["perplexity"] != actual
    changed = Evaluation(**{**vars(evaluation), "kv_bits": 2})
    assert evaluate(tmp_path / "out", changed)["perplexity"] != actual
    model = load(tmp_path / "out")
    target = attached_cache(model).scheme
    prepare_(model, None, {"clip": 0.7}, PrefixIds((5, 9)))
    assert attached_cache(model).scheme == replace(target, clip=0.7)
    # What cannot be leaves the model as it is.
    with pytest.raises(BadRecipe, match="holds centres for: rope=after, key_rotation=hadamard"):
        prepare_(model, None, {"key_rotation": "none"}, PrefixIds((2,)))
    assert attached_cache(model).prefix.ids == (5, 9)


@pytest.mark.parametrize(
    ("kv", "said"),
    [
        ({"key_center": "median"}, "key_center is 'median'; choose one of none, mean"),
        ({"key_center": "mean", "key_axis": "channel", "group_size": 4, "window": 4}, "need no centre"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    kv: dict[str, Any], said: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadRecipe, match=said):
        quantize(folder, tmp_path / "out", Recipe(method="none", kv_bits=4, kv=kv))
    assert not (tmp_path / "out").exists()


def test_a_model_without_its_centre_says_so(folder: Path, token_file: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match=r"the model holds centres for: none; quantize the model"):
        attach_cache_(load(folder), CacheScheme(4, key_center="mean"))
    quantize(folder, tmp_path / "out", recipe_of("none", token_file, rope="before"))
    model = load(tmp_path / "out")
    target, ids = attached_cache(model), windows(token_file)
    with pytest.raises(BadRecipe, match="holds centres for: rope=before, key_rotation=none"):
        attach_cache_(model, CacheScheme(4, key_center="mean"))
    # And goes on as it was.
    assert attached_cache(model) == target
    assert torch.equal(logits(model, ids), logits(load(tmp_path / "out"), ids))


@pytest.mark.parametrize("damage", ["one layer", "no entry", "another basis", "no tensor", "another key"])
def test_a_damaged_checkpoint_is_refused(damage: str, folder: Path, token_file: Path, tmp_path: Path) -> None:
    quantize(folder, tmp_path / "out", recipe_of("none", token_file))
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    packed_config = config["quantization_config"]
    centers = [path for path in packed_config["modules"] if path.endswith("key_center")]
    assert len(centers) == 3
    for path in centers[-1:] if damage == "one layer" else centers:
        match damage:
            case "no entry" | "one layer":
                del packed_config["modules"][path]
            case "another basis":
                packed_config["modules"][path]["rope"] = "before"
            case "no tensor":
                packed_config["modules"][path]["heads"] = 3
            case "another key":
                packed_config["modules"][path]["mean"] = 0
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        load(tmp_path / "out")


@pytest.mark.parametrize("basis", BASES)
def test_the_mean_is_that_of_rounded_keys_on_quantized_inputs(
    basis: str, short: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first block, whose inputs are the same in calibration and in the running model."""
    means, folder = {}, short["llama"]
    for inputs in ("exact", "quantized"):
        recipe = Recipe(
            method="serq", options={"rank": 16, "inputs": inputs}, bits=2, group_size=16, activation_bits=3,
            calibration=str(token_file), num_windows=24, window=32, dtype="float32",
            kv_bits=8, kv={"key_center": "mean", **BASES[basis]},
        )  # fmt: skip
        quantize(folder, tmp_path / inputs, recipe)
        model = load(tmp_path / inputs)
        keys = keys_to_code(model, windows(token_file), monkeypatch)[0]
        stored, target = model.model.layers[0].self_attn.key_center.mean.float(), keys.mean(1)
        # float16, and sums in another order.
        torch.testing.assert_close(stored, target, rtol=2e-3, atol=2e-3 * float(target.abs().max()))
        means[inputs] = stored
    plain = keys_to_code(attached_to(folder, BASES[basis]), windows(token_file), monkeypatch)[0].mean(1)
    assert all(float((mean - plain).norm() / plain.norm()) > 0.02 for mean in means.values())


def attached_to(folder: Path, basis: dict[str, Any]) -> Any:
    """The original on a cache of the same basis."""
    model = load(folder)
    attach_cache_(model, CacheScheme(8, **basis))
    return model

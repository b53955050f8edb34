"""A KV cache and a system prompt in a recipe: from quantization into the checkpoint and the model that is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import CONFIGS
from kv_calls import cache_of, passing
from subnibble import Recipe, quantize
from subnibble.calibrate.prefix import PrefixStream, after_prefix
from subnibble.calibrate.stream import BlockStream
from subnibble.checkpoint.manifest import packed_config_of
from subnibble.checkpoint.opening import open_source
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.checkpoint.size import measure
from subnibble.errors import BadRecipe, CalibrationError, CheckpointError, NumericalFailure
from subnibble.evaluation.evaluate import Evaluation, evaluate
from subnibble.generate.prefix import add_prefix, attach_prefix_
from subnibble.hf.attention import attach_cache_, attached_cache, detach_cache_, set_prefix_
from subnibble.model.skeleton import Skeleton
from subnibble.model.transformers_api.blocks import run_block
from subnibble.tensor.cache_scheme import CacheScheme, PrefixIds
from test_conformance import tensors_of

PROMPT = "w5 w9 w2 w7"
IDS = (5, 9, 2, 7)
DATA = {"num_windows": 4, "window": 32, "device": "cpu"}
METHODS = {
    "rtn": {"method": "rtn", "group_size": 16},
    "rotated": {"method": "rtn", "group_size": 16, "options": {"rotation": "groups"}},
    "quarot": {"method": "quarot", "group_size": 16, "activation_bits": 8},
    "atom": {"method": "atom", "group_size": 16, "activation_bits": 8, "options": {"outliers": 8}},
    "serq-heads": {"method": "serq", "group_size": 16, "options": {"rank": 16, "permutation": "offline"}},
    "d2quant-plus": {"method": "d2quant-plus", "group_size": 16},
}


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def text() -> torch.Tensor:
    return torch.arange(40).view(2, 20) * 7 % 95


# transformers reads a qwen2 folder's tokenizer as one of bytes, which the tiny one is not.
@pytest.mark.parametrize("name", [name for name in CONFIGS if "qwen2" not in name])
def test_weights_left_alone_behind_a_prompt_give_the_models_own_outputs(
    name: str, short: dict[str, Path], tmp_path: Path
) -> None:
    quantize(short[name], tmp_path / "out", Recipe(method="none", system_prompt=PROMPT))
    original, packed = load(short[name]), load(tmp_path / "out")
    assert attached_cache(packed).prefix.ids == IDS
    whole = torch.cat([torch.tensor([IDS]).expand(2, -1), text()], 1)
    target = logits(original, whole)[:, len(IDS) :]
    actual = logits(packed, text())
    # Keys and values are float16.
    torch.testing.assert_close(actual, target, rtol=1e-2, atol=1e-2 * float(target.abs().max()))
    assert float((actual - logits(original, text())).abs().max()) > 10 * float((actual - target).abs().max())
    torch.testing.assert_close(logits(packed, whole)[:, len(IDS) :], actual, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3"])
def test_the_prompt_is_in_the_basis_of_the_stored_model(
    method: str, name: str, short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    """Keys and values of the packed model itself, at 8 bits of weight, are near those of the unquantized one."""
    recipe = Recipe(**METHODS[method], **DATA, bits=8, system_prompt=PROMPT, calibration=str(token_file))
    quantize(short[name], tmp_path / "out", recipe)
    packed = load(tmp_path / "out")
    held = [
        (block.self_attn.prefix.keys.float(), block.self_attn.prefix.values.float()) for block in packed.model.layers
    ]
    computed = own_states(packed)
    for layer, (stored, expected) in enumerate(zip(held, computed, strict=True)):
        for kind, a, b in zip(("keys", "values"), stored, expected, strict=True):
            assert a.dtype == torch.float32
            error = float((a - b).norm() / b.norm())
            assert error < 0.2, (layer, kind, error)
            # The test can fail: in another order of heads or channels they are far apart.
            assert float((a.roll(1, -1) - b).norm() / b.norm()) > 0.5


def own_states(packed: torch.nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the packed model makes of the prompt without a prefix, at 16 bits."""
    from transformers import DynamicCache

    detach_cache_(packed)
    cache = DynamicCache()
    with torch.no_grad():
        packed.model(torch.tensor([IDS]), **passing(packed.model, cache), use_cache=True)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def test_a_coded_cache_reaches_the_loaded_model_and_the_files(
    short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    recipe = Recipe(
        method="quarot", bits=4, group_size=16, activation_bits=4, kv_bits=3, kv={"group_size": 8}, **DATA,
        calibration=str(token_file), system_prompt=PROMPT,
    )  # fmt: skip
    report = quantize(short["llama"], tmp_path / "out", recipe)
    target = CacheScheme(3, 8, key_rotation="hadamard", clip=0.95)
    packed = load(tmp_path / "out")
    assert attached_cache(packed).scheme == target
    assert report.size["cache_bytes"] == 2 * target.token_bytes(2, 16)
    assert measure(open_source(short["llama"])).cache_bytes == 2 * 2 * 2 * 16 * 2
    with torch.no_grad():
        cache = cache_of(packed(text(), use_cache=True))
    assert cache.nbytes == 2 * 20 * report.size["cache_bytes"]
    # Written and read back by transformers it is the same.
    packed.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert packed_config_of(again.config) == packed_config_of(packed.config)
    assert torch.equal(logits(again, text()), logits(packed, text()))
    # The recipe beside it makes the same bytes, and leaves to the method what was left to it.
    resolved = Recipe.from_toml(tmp_path / "out" / "recipe.toml")
    assert resolved.kv == recipe.kv
    requantized = quantize(short["llama"], tmp_path / "requantized", resolved)
    assert requantized.weights_sha256 == report.weights_sha256
    assert (tmp_path / "requantized" / "config.json").read_text() == (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_prompt_changes_what_calibration_sees_and_nothing_else(
    method: str, short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    for name, prompt in (("with", PROMPT), ("without", None)):
        recipe = Recipe(
            method=method, bits=4, group_size=16, **DATA, calibration=str(token_file), system_prompt=prompt
        )  # fmt: skip
        quantize(short["qwen3"], tmp_path / name, recipe)
    actual, plain = tensors_of(tmp_path / "with"), tensors_of(tmp_path / "without")
    assert {name for name in actual if name not in plain} == {
        f"model.layers.{i}.self_attn.prefix.{kind}" for i in range(2) for kind in ("keys", "values")
    }
    changed = {name.rpartition(".")[2] for name, tensor in plain.items() if not torch.equal(actual[name], tensor)}
    assert changed <= {"codes", "scales", "zeros"}
    assert bool(changed) == (method == "gptq")


@pytest.mark.parametrize("name", [name for name in CONFIGS if "qwen2" not in name])
def test_calibration_sees_what_the_model_makes_of_a_text_behind_the_prompt(name: str, short: dict[str, Path]) -> None:
    """Hidden states behind each block, windows alone on the prefix's states, against whole texts."""
    skeleton = Skeleton(SafetensorsSource(short[name]), torch.float32, torch.device("cpu"))
    embed = skeleton.load("model.embed_tokens", torch.float32)
    window = text()
    whole = embed(torch.cat([torch.tensor([IDS]).expand(2, -1), window], 1))
    prefix = PrefixStream(skeleton, embed(torch.tensor([IDS])))
    hidden, plain = [embed(window)], skeleton.block_calls(len(IDS) + window.shape[1])
    calls = skeleton.block_calls(window.shape[1], prefix_length=len(IDS))
    for index in range(skeleton.num_blocks):
        block = skeleton.load_block(index)
        assert all(torch.equal(*pair) for pair in zip(prefix.run(block).states, prefix.run(block).states, strict=True))
        BlockStream(block, hidden, after_prefix(calls[index], prefix.advance(block))).advance()
        with torch.no_grad():
            whole = run_block(block.module, whole, plain[index])
        torch.testing.assert_close(hidden[0], whole[:, len(IDS) :], rtol=1e-4, atol=1e-4)


def test_a_model_of_16_bits_keeps_its_weights_and_bits(short: dict[str, Path], tmp_path: Path) -> None:
    report = quantize(short["llama"], tmp_path / "out", Recipe(method="none", kv_bits=4))
    assert report.linears == ()
    assert report.size["effective_bits"] == 16
    # The folder of the original holds float32.
    packed, original = load(tmp_path / "out"), load(short["llama"])
    half = {name: p.half().float() if p.dim() > 1 else p for name, p in original.named_parameters()}
    assert all(torch.equal(p, half[name]) for name, p in packed.named_parameters())


def test_perplexity_is_scored_behind_the_prompt(short: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    quantize(short["llama"], tmp_path / "out", Recipe(method="none", system_prompt=PROMPT))
    actual = evaluate(tmp_path / "out", Evaluation(str(text_file), window=16, dtype="float32"))
    plain = evaluate(short["llama"], Evaluation(str(text_file), window=16, dtype="float32"))
    assert actual["windows"] == plain["windows"]
    assert actual["perplexity"] != plain["perplexity"]
    with pytest.raises(CalibrationError, match="after a system prompt of 4"):
        evaluate(tmp_path / "out", Evaluation(str(text_file), window=126))


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"method": "none"}, "there is nothing else to do"),
        ({"method": "none", "kv": {"window": 4}}, "kv_bits is 16"),
        ({"method": "none", "kv_bits": 4, "kv": {"bits": 3}}, "set kv_bits"),
        ({"method": "none", "kv_bits": 4, "kv": {"axis": 3}}, "unknown key 'axis'"),
        ({"method": "none", "kv_bits": 5}, "choose one of 2, 3, 4, 8, or 16"),
        ({"method": "none", "kv_bits": 4, "kv": {"group_size": 17}}, "larger than a head of 16"),
        ({"method": "none", "system_prompt": "default"}, "has no chat template"),
        ({"method": "none", "system_prompt": "bos"}, "has no BOS token"),
        ({"method": "none", "system_prompt": ""}, "system prompt is empty"),
        ({"method": "none", "system_prompt": "prompt.txt"}, "there is no such file"),
        ({"method": "none", "kv_bits": 4, "activation_bits": 4}, "method none leaves all linears"),
        ({"method": "atom", "group_size": 16}, "128 outlier channels leave none of the 48"),
        (
            {"method": "atom", "group_size": 32, "grid": "mxfp4", "activation_bits": 4, "options": {"outliers": 8}},
            "no codes beside an mxfp4 grid .*; use a uniform grid",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    recipe: dict[str, object], said: str, short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadRecipe, match=said):
        quantize(short["llama"], tmp_path / "out", Recipe(**recipe, calibration=str(token_file)))
    assert not list(tmp_path.iterdir())


def test_a_prompt_longer_than_the_model_is_refused(short: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="system prompt of 128"):
        quantize(short["llama"], tmp_path / "out", Recipe(method="none", system_prompt="w1 " * 128))


def test_a_prefix_without_its_tensors_is_refused(short: dict[str, Path], tmp_path: Path) -> None:
    quantize(short["llama"], tmp_path / "out", Recipe(method="none", kv_bits=4))
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["prefix"] = {"ids": list(IDS), "bos": None}
    config["quantization_config"]["modules"] = {
        f"model.layers.{i}.self_attn": {"kind": "prefix", "heads": 2, "tokens": 4, "width": 16} for i in range(2)
    }
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"prefix.keys is missing"):
        load(tmp_path / "out")


def test_a_prompt_can_be_added_and_replaced_later(short: dict[str, Path], token_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = Recipe(bits=4, group_size=16, **DATA, calibration=str(token_file), kv_bits=8, system_prompt="w1 w2")
    quantize(short["mistral"], out, recipe)
    (out / "notes.txt").write_text("mine")
    save_file({"a": torch.ones(3)}, out / "adapter.safetensors")
    before = json.loads((out / "report.json").read_text())
    packed = load(out)
    target = own_states(packed)
    assert add_prefix(out, PROMPT).ids == IDS
    actual = load(out)
    attached = attached_cache(actual)
    assert (attached.prefix.ids, attached.scheme) == (IDS, CacheScheme(8))
    for block, (keys, values) in zip(actual.model.layers, target, strict=True):
        assert torch.equal(block.self_attn.prefix.keys, keys.half())
        assert torch.equal(block.self_attn.prefix.values, values.half())
    after = json.loads((out / "report.json").read_text())
    assert after["weights_sha256"] not in (before["weights_sha256"], "")
    assert after["linears"] == before["linears"]
    assert (out / "recipe.toml").is_file()
    assert (after["system_prompt_added"], after["prefix_tokens"]) == (PROMPT, len(IDS))
    assert (out / "notes.txt").read_text() == "mine"
    assert load_file(out / "adapter.safetensors")["a"].tolist() == [1, 1, 1]
    # Once more, and no empty shard stays behind.
    shards = len(list(out.glob("*.safetensors")))
    add_prefix(out, PROMPT)
    assert len(list(out.glob("*.safetensors"))) == shards
    # In memory it is the same.
    again = load(out)
    attach_prefix_(again, CacheScheme(8), attached.prefix)
    assert torch.equal(logits(again, text()), logits(actual, text()))


def test_a_prompt_is_added_to_packed_checkpoints_alone_and_nothing_is_lost(
    short: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="quantize the model first"):
        add_prefix(short["llama"], PROMPT)
    quantize(short["llama"], tmp_path / "out", Recipe(method="none", kv_bits=4))
    names = {file.name: file.stat().st_size for file in (tmp_path / "out").iterdir()}
    with pytest.raises(BadRecipe, match="has no chat template"):
        add_prefix(tmp_path / "out", "default")
    assert {file.name: file.stat().st_size for file in (tmp_path / "out").iterdir()} == names
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_reference_is_scored_behind_the_same_prompt(short: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    quantize(short["llama"], tmp_path / "out", Recipe(method="none", system_prompt=PROMPT))
    evaluation = Evaluation(str(text_file), window=16, dtype="float32")
    result = evaluate(tmp_path / "out", evaluation, short["llama"])
    assert result["prefix_tokens"] == 4
    # Nothing but half precision tells them apart.
    assert result["kl_divergence"] < 1e-4
    alone = evaluate(short["llama"], evaluation, tmp_path / "out")
    assert alone["kl_divergence"] < 1e-4
    after_prefix = evaluate(short["llama"], replace(evaluation, system_prompt=PROMPT), short["llama"])
    assert after_prefix["kl_divergence"] == 0
    assert abs(after_prefix["perplexity"] / result["perplexity"] - 1) < 1e-3


def test_any_model_can_be_scored_on_a_coded_cache(short: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    evaluation = Evaluation(str(text_file), window=16, dtype="float32")
    distances = [
        evaluate(short["llama"], replace(evaluation, kv_bits=bits), short["llama"])["kl_divergence"]
        for bits in (8, 4, 2)
    ]
    assert distances == sorted(distances)
    assert distances[2] > 10 * distances[0] > 0
    quantize(short["llama"], tmp_path / "out", Recipe(method="none", system_prompt=PROMPT))
    both = evaluate(tmp_path / "out", replace(evaluation, kv_bits=2))
    assert (both["prefix_tokens"], both["cache_bytes"]) == (4, 2 * CacheScheme(2).token_bytes(2, 16))


def test_what_is_asked_for_goes_over_the_checkpoints_own_cache(
    short: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    evaluation = Evaluation(str(text_file), window=16, dtype="float32")
    quantize(short["llama"], tmp_path / "out", Recipe(method="none", kv_bits=2))
    result = {
        name: evaluate(tmp_path / "out", replace(evaluation, **settings))
        for name, settings in (("own", {}), ("plain", {"kv_bits": 16}), ("groups", {"kv": {"group_size": 8}}))
    }
    assert result["own"]["cache_bytes"] == 2 * CacheScheme(2).token_bytes(2, 16)
    assert result["plain"]["cache_bytes"] == 2 * 2 * 2 * 16 * 2
    assert result["groups"]["cache_bytes"] == 2 * CacheScheme(2, 8).token_bytes(2, 16)
    original = evaluate(short["llama"], evaluation)["perplexity"]
    assert abs(result["plain"]["perplexity"] / original - 1) < 1e-3
    assert abs(result["own"]["perplexity"] / original - 1) > 1e-3
    with pytest.raises(BadRecipe, match="set --kv-bits"):
        evaluate(short["llama"], replace(evaluation, kv={"window": 4}))


def test_what_a_packed_model_runs_on_is_saved_with_it(short: dict[str, Path], tmp_path: Path) -> None:
    quantize(short["llama"], tmp_path / "out", Recipe(method="none", kv_bits=4, system_prompt=PROMPT))
    states = [(torch.zeros(2, 1, 16).half(), torch.zeros(2, 1, 16).half()) for _ in range(2)]
    changed = load(tmp_path / "out")
    attach_cache_(changed, CacheScheme(3), PrefixIds((7,)))
    set_prefix_(changed, states)
    bare = load(tmp_path / "out")
    detach_cache_(bare)
    for name, model in (("changed", changed), ("bare", bare)):
        model.save_pretrained(tmp_path / name)
        again = load(tmp_path / name)
        attached = attached_cache(again)
        assert torch.equal(logits(again, text()), logits(model, text()))
        assert (attached is None) == (name == "bare")
    assert (attached_cache(load(tmp_path / "changed")).scheme, changed.config.quantization_config.packed.cache) == (
        CacheScheme(3),
        CacheScheme(3),
    )


def test_a_prefix_keeps_its_type_and_a_plain_model_does_not_save_it(short: dict[str, Path], tmp_path: Path) -> None:
    quantize(short["llama"], tmp_path / "out", Recipe(method="none", system_prompt=PROMPT))
    packed = load(tmp_path / "out").to(torch.bfloat16)
    assert packed.model.layers[0].self_attn.prefix.keys.dtype == torch.float16
    plain = load(short["llama"])
    attach_prefix_(plain, CacheScheme(4), PrefixIds(IDS))
    plain.save_pretrained(tmp_path / "plain")
    assert not any("prefix" in name for name in tensors_of(tmp_path / "plain"))


def test_a_prefix_that_cannot_be_leaves_the_model_as_it_was(short: dict[str, Path]) -> None:
    model = load(short["llama"])
    attach_prefix_(model, CacheScheme(4), PrefixIds(IDS))
    target = logits(model, text())
    for ids in ((3,) * 200, (3, 10_000)):
        with pytest.raises(CalibrationError, match=r"longer than the model's 128|token ids run from 3 to 10000"):
            attach_prefix_(model, CacheScheme(3), PrefixIds(ids))
    with torch.no_grad():
        gains = model.model.layers[1].input_layernorm.weight
        gains *= 1e30
    with pytest.raises(NumericalFailure, match="layer 1"):
        attach_prefix_(model, CacheScheme(3), PrefixIds(IDS))
    with torch.no_grad():
        gains /= 1e30
    assert attached_cache(model).scheme == CacheScheme(4)
    torch.testing.assert_close(logits(model, text()), target)

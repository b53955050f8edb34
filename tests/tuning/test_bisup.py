"""BiSup and OmniQuant from recipe to running model: what was trained is what runs."""

from __future__ import annotations

import gc
import json
import math
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from conftest import CONFIGS
from subnibble import Recipe, methods, quantize
from subnibble.checkpoint.opening import open_source
from subnibble.checkpoint.size import cache_bytes
from subnibble.errors import BadRecipe, SubnibbleError
from subnibble.hf.attention import attach_cache_, attached_cache, change_scheme_
from subnibble.methods.method import Method
from subnibble.pipeline import block_tuning
from subnibble.pipeline.block_tuning import BlockTuning, Candidate
from subnibble.pipeline.estimate import estimate
from subnibble.pipeline.passage import Passage
from subnibble.report import BlockReport
from subnibble.rounding import grid
from subnibble.runtime.modules import PackedLinear
from subnibble.tensor.cache_scheme import PrefixIds
from subnibble.tuning.train import held_out_loss
from subnibble.tuning.tuning import Tuning

PROMPT = "w5 w9 w2 w7"
DATA = {"num_windows": 8, "window": 24, "device": "cpu", "dtype": "float32"}
SETTING = {"bits": 3, "group_size": 16, "activation_bits": 4, "kv_bits": 4, "zero_point": "none", "embedding_bits": 8}
QUAROT = {"effort": "fast", "rank": 4}
ATOM = {"over": "atom", "effort": "fast", "rank": 4, "outliers": 8}
METHODS: dict[str, dict[str, Any]] = {
    "quarot": {"method": "bisup", "options": {"over": "quarot", **QUAROT}},
    "quarot-clips": {"method": "bisup", "options": {**QUAROT, "input_clipping": "site"}},
    "atom": {"method": "bisup", "options": ATOM},
    "atom-centered": {"method": "bisup", "options": ATOM, "kv": {"key_center": "mean"}},
    "omniquant": {"method": "omniquant", "options": {"effort": "fast"}},
    "gptq": {"method": "tuned-gptq"},
    "serq-plus": {"method": "tuned-serq-plus"},
}


@dataclass(frozen=True)
class NoOptions:
    """Of a method that has none."""


@pytest.fixture(autouse=True)
def methods_that_are_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods of which the tuner knows nothing, with tuning added to their steps."""
    serq_plus = methods.METHODS["serq-plus"].steps({"rank": 24})
    # Its second weights are made anew at every step: to search their ranges takes three times as long.
    second = replace(serq_plus.correction, fitter=grid.Clip("minmax"))
    bases = {
        "gptq": methods.METHODS["gptq"].steps({}),
        "serq-plus": replace(serq_plus, transforms=(), correction=second),
    }
    for name, base in bases.items():
        tuning = Tuning(effort="fast", rank=4, input_clipping="site")
        steps = replace(base, inputs="quantized", tuning=tuning)
        method = Method(f"tuned-{name}", "", "", NoOptions, lambda options, steps=steps: steps)
        monkeypatch.setitem(methods.METHODS, method.name, method)


def tuned_blocks(monkeypatch: pytest.MonkeyPatch) -> list[BlockTuning]:
    """Filled, block by block, as they are once they are rounded; they are stored, even where the base's are better."""
    result: list[BlockTuning] = []
    choose = block_tuning.better

    def tuned_one(tuning: BlockTuning, tuned: Candidate, base: Candidate) -> tuple[Candidate, BlockReport]:
        result.append(tuning)
        return tuned, choose(tuning, tuned, base)[1]

    monkeypatch.setattr(block_tuning, "better", tuned_one)
    return result


def first_output(model: torch.nn.Module, inputs: Tensor) -> Tensor:
    """What the first block makes of inputs (b, t, d)."""
    outputs: list[Any] = []
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        model(inputs_embeds=inputs)
    handle.remove()
    return outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]


@pytest.mark.each_value
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_block_that_was_trained_is_the_block_that_runs(
    name: str,
    kind: str,
    short: dict[str, Path],
    token_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tuned, steps = tuned_blocks(monkeypatch), []
    if "qwen2" in name:
        # transformers reads a qwen2 folder's tokenizer as one of bytes, which the tiny one is not.
        monkeypatch.setattr("subnibble.pipeline.check.prompt_prefix", lambda *args: PrefixIds((5, 9, 2, 7), None))
    recipe = Recipe(calibration=str(token_file), system_prompt=PROMPT, **DATA, **SETTING, **METHODS[kind])
    report = quantize(
        short[name], tmp_path / "out", recipe, progress=lambda done, total, doing: steps.append((done, total, doing))
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)

    # The first block's inputs are the embedding's rows: the same in training and in the stored model.
    samples = tuned[0].samples
    with torch.no_grad():
        target = tuned[0].block(samples.inputs, samples.call)

    def distance() -> float:
        output = first_output(model, samples.inputs)
        return float((output - target).norm() / (target - samples.inputs).norm())

    # Codes may differ by one where a value lies between two of them.
    actual = distance()
    assert actual < 0.05
    attached = attached_cache(model)
    change_scheme_(model, None)
    assert distance() > max(0.03, 1.2 * actual)
    attach_cache_(model, attached.scheme)
    assert distance() > 0.1

    assert [block.path for block in report.blocks] == [f"model.layers.{index}" for index in range(2)]
    for block in report.blocks:
        assert block.tuned <= block.before
        assert block.epochs == 2
        assert block.rollbacks == block.left_out == 0
    assert all(linear.basis_changed for linear in report.linears)
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored["blocks"][0]["after"] == report.blocks[0].after
    losses = [doing for _, _, doing in steps if "held-out loss" in doing]
    assert len(losses) == 2 * (1 + 2)
    assert [done for done, _, _ in steps] == sorted(done for done, _, _ in steps)
    assert all(done <= total for done, total, _ in steps)


def test_the_same_seed_gives_the_same_bytes_and_another_others(
    short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    # `test_conformance.py` has the other kinds.
    clips = METHODS["atom-centered"] | {"options": {**ATOM, "input_clipping": "site"}}
    recipe = Recipe(calibration=str(token_file), **DATA, **SETTING, **clips)
    hashes = [
        quantize(short["llama"], tmp_path / name, replace(recipe, seed=seed)).weights_sha256
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_clips_of_inputs_are_stored_as_learned(
    short: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = tuned_blocks(monkeypatch)
    recipe = Recipe(calibration=str(token_file), activation_clip=0.9, **DATA, **SETTING, **METHODS["quarot-clips"])
    quantize(short["llama"], tmp_path / "out", recipe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    clips = set()
    for block, one in zip(model.model.layers, tuned, strict=True):
        for name, linear in one.block.linears.items():
            assert block.get_submodule(name).linear.input.activation == linear.activation
            clips.add(linear.activation.clip)
    assert len(clips) > 3
    # Nothing is learned of the clip unless it is asked for.
    options = {key: value for key, value in recipe.options.items() if key != "input_clipping"}
    quantize(short["llama"], tmp_path / "plain", replace(recipe, options=options))
    assert all(linear.activation.clip == 0.9 for linear in tuned[-1].block.linears.values())


def test_tuning_takes_the_prompt_that_runs(
    short: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = tuned_blocks(monkeypatch)
    recipe = Recipe(calibration=str(token_file), system_prompt=PROMPT, **DATA, **SETTING, **METHODS["quarot"])
    report = quantize(short["llama"], tmp_path / "out", recipe)
    one = tuned[1]
    # The block as it was tuned and the block as it runs are one, prompt included.
    assert held_out_loss(one.block, one.samples) == pytest.approx(report.blocks[1].after, rel=1e-3)
    one.block.cache.prefix = None
    with pytest.raises(RuntimeError):
        # The mask is for the prompt's tokens, too.
        held_out_loss(one.block, one.samples)


def test_nothing_of_a_block_outlives_it(
    short: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passages: list[weakref.ref[Passage]] = []
    start = Passage.start

    def watched(*args: Any) -> Passage:
        gc.collect()
        # Of one block there are two, tuned and not.
        assert all(passage() is None for passage in passages[: len(passages) // 2 * 2])
        passage = start(*args)
        passages.append(weakref.ref(passage))
        return passage

    monkeypatch.setattr(Passage, "start", watched)
    recipe = Recipe(calibration=str(token_file), **DATA, **SETTING, **METHODS["atom"])
    quantize(short["llama"], tmp_path / "out", recipe)
    assert len(passages) == 4


def test_rounding_keeps_what_leaves_the_lower_loss(
    short: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []
    from subnibble.pipeline import block_tuning

    loss_of = block_tuning.held_out_loss

    def noted(*args: Any) -> float:
        losses.append(loss_of(*args))
        return losses[-1]

    recipe = Recipe(calibration=str(token_file), **DATA, **SETTING, **METHODS["quarot"])
    monkeypatch.setattr(block_tuning, "held_out_loss", noted)
    tuned = tuned_blocks(monkeypatch)
    quantize(short["llama"], tmp_path / "out", recipe)
    # The last of four sites: to nearest, then compensated.
    last = tuned[-1]
    assert loss_of(last.block, last.samples) == min(losses[-2:])
    assert any(block.compensated for block in tuned)
    # What is stored is what won.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, module in model.model.layers[1].named_modules():
        if isinstance(module, PackedLinear):
            assert torch.equal(module.packed.dequantize(), last.block.linears[name].fixed)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_windows": 1}, "num_windows is 1; use 2 or more"),
        ({"window": 1}, "no token to tune on"),
    ],
)
def test_too_little_text_is_said(
    changes: dict[str, int], said: str, short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    recipe = Recipe(calibration=str(token_file), **{**DATA, **changes}, **SETTING, **METHODS["quarot"])
    with pytest.raises(SubnibbleError, match=said):
        quantize(short["llama"], tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_clips_of_inputs_that_are_not_quantized_are_refused(
    short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    setting = SETTING | {"activation_bits": 16}
    recipe = Recipe(calibration=str(token_file), **DATA, **setting, **METHODS["quarot-clips"])
    with pytest.raises(BadRecipe, match="learns clips of inputs quantized on a uniform grid, but no linear has such"):
        quantize(short["llama"], tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_estimates_count_the_prompt(short: dict[str, Path], token_file: Path, tmp_path: Path) -> None:
    recipe = Recipe(calibration=str(token_file), **DATA, **SETTING, **METHODS["quarot"])
    plain, after_prefix = (estimate(short["llama"], replace(recipe, system_prompt=p)) for p in (None, PROMPT))
    assert after_prefix.file_bytes - plain.file_bytes == 4 * cache_bytes(open_source(short["llama"]).config, None)
    long = " ".join(["w5"] * 2000)
    for run in (estimate, lambda model, target: quantize(model, tmp_path / "out", target)):
        with pytest.raises(SubnibbleError, match="windows of 24 tokens after a system prompt of 2000 are longer"):
            run(short["llama"], replace(recipe, system_prompt=long))


def test_a_block_that_is_skipped_is_not_tuned(short: dict[str, Path], token_file: Path, tmp_path: Path) -> None:
    skipped = {r"re:model\.layers\.0\.": {"skip": True}}
    recipe = Recipe(calibration=str(token_file), overrides=skipped, **DATA, **SETTING, **METHODS["quarot"])
    report = quantize(short["llama"], tmp_path / "out", recipe)
    assert [block.path for block in report.blocks] == ["model.layers.1"]


@pytest.mark.parametrize("kind", ["quarot", "atom"])
def test_tuning_adds_no_bits(kind: str, short: dict[str, Path], token_file: Path, tmp_path: Path) -> None:
    recipe = Recipe(calibration=str(token_file), **DATA, **SETTING, **METHODS[kind])
    report, result = quantize(short["llama"], tmp_path / "out", recipe), estimate(short["llama"], recipe)
    assert report.size["effective_bits"] == pytest.approx(result.effective_bits, rel=1e-12)
    assert report.size["activation_bits"] == pytest.approx(result.activation_bits, rel=1e-12)
    assert result.memory_bytes["tuning"] > 0
    base_options = {"outliers": 8} if kind == "atom" else {}
    base = estimate(short["llama"], replace(recipe, method=kind, options=base_options))
    assert (base.effective_bits, base.activation_bits) == (result.effective_bits, result.activation_bits)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("bisup", {"over": "awq"}, "over is 'awq'; choose one of atom, quarot"),
        ("bisup", {"outliers": 64}, "outliers is 64 but over is 'quarot'; set over = "),
        ("bisup", {"smoothing": "much"}, "smoothing is 'much'"),
        ("bisup", {"input_clipping": "group"}, "input_clipping is 'group'; choose one of site, none"),
        ("bisup", {"effort": "slow"}, "effort is 'slow'"),
        ("bisup", {"low_rank": "side"}, "low_rank is 'side'; choose one of merge, none"),
        ("bisup", {"low_rank_rate": 0.0}, "low_rank_rate is 0.0; give a number between 0 and 1"),
        ("omniquant", {"rank": 3}, "has no option 'rank'"),
    ],
)
def test_wrong_options_are_named(
    method: str, options: dict[str, Any], said: str, short: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(BadRecipe, match=said):
        quantize(short["llama"], tmp_path / "out", Recipe(method=method, options=options, calibration="news"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", [{"grid": "sign"}, {"zero_point": "real"}])
def test_grids_without_ranges_are_refused_before_weights_are_read(
    setting: dict[str, Any], short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    recipe = Recipe(method="omniquant", bits=3, group_size=16, calibration=str(token_file), **DATA, **setting)
    with pytest.raises(SubnibbleError, match=r"model\.layers\.0\.self_attn\.q_proj has .* tuning needs grid"):
        quantize(short["llama"], tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("over", ["quarot", "atom"])
def test_no_block_ends_above_its_base(over: str, short: dict[str, Path], token_file: Path, tmp_path: Path) -> None:
    recipe = Recipe(calibration=str(token_file), **DATA, **SETTING, **METHODS[over])
    report = quantize(short["llama"], tmp_path / "out", recipe)
    assert all(math.isfinite(block.base) and block.keeps_base == (block.base < block.after) for block in report.blocks)


def test_a_base_that_is_better_is_stored_as_it_is(
    short: dict[str, Path], token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"inputs": "quantized"}
    base = Recipe(method="quarot", calibration=str(token_file), options=options, **DATA, **SETTING)
    quantize(short["llama"], tmp_path / "base", base)
    # Ranges that a tuned block cannot mend in the few steps it has.
    spoil = block_tuning.BlockTuning.round

    def spoiled(self: BlockTuning, *args: Any) -> Any:
        rounding, whole, salient = spoil(self, *args)
        for part in whole.ranges:
            part.scales.mul_(0.25)
        return rounding, whole, salient

    monkeypatch.setattr(block_tuning.BlockTuning, "round", spoiled)
    report = quantize(short["llama"], tmp_path / "out", replace(base, **METHODS["quarot"]))
    assert all(block.keeps_base for block in report.blocks)
    actual, target = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "base"))
    ours, theirs = dict(actual.named_buffers()), dict(target.named_buffers())
    codes = [name for name in theirs if name.endswith(("codes", "scales"))]
    assert codes
    assert all(torch.equal(ours[name], theirs[name]) for name in codes)

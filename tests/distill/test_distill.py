"""A packed model tuned as a whole: codes stay, what was trained is what is stored, and nothing is lost on the way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from conftest import CONFIGS
from subnibble import Recipe, quantize
from subnibble.cli.main import app
from subnibble.distill import models as whole_model
from subnibble.distill import settings as distillation
from subnibble.distill import train as distill
from subnibble.errors import BadRecipe, NumericalFailure
from subnibble.pipeline.estimate import estimate
from subnibble.report import Report

DATA = {"num_windows": 32, "window": 24, "device": "cpu", "dtype": "float32"}
DISTILLED = {"distill_steps": 8, "distill": {"tokens": 192, "rate": 0.02}}
# So slow that every look finds something better than the one before.
GENTLE = {"distill_steps": 8, "distill": {"tokens": 192, "rate": 0.002}}
# So fast that its end has another loss than its start: no small step's end can meet the start by chance.
FAR = {"distill_steps": 6, "distill": {"tokens": 192, "rate": 0.8}}
PROMPT = "w5 w9 w2 w7"
MIXED: dict[str, Any] = {"bits": 2, "group_size": 16, "activation_bits": 3, "embedding_bits": 8, "kv_bits": 4}
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "bits": 2, "group_size": 16},
    "gptq": {"method": "gptq", "bits": 3, "group_size": 16, "embedding_bits": 4},
    "d2quant": {"method": "d2quant", "bits": 2, "group_size": 16},
    "d2quant-plus": {"method": "d2quant-plus", "bits": 2, "group_size": 16, "options": {"mean_shift": "published"}},
    "serq": {
        "method": "serq",
        "options": {"rank": 16, "residual": "salient"},
        **MIXED,
        "bits": 3,
        "activation_bits": 8,
    },
    "qera": {"method": "qera", "options": {"rank": 8}, **MIXED, "bits": 3, "activation_bits": 8},
    "quarot": {"method": "quarot", "system_prompt": PROMPT, **MIXED},
    "atom": {"method": "atom", "options": {"outliers": 8}, "system_prompt": PROMPT, **MIXED},
    "skipped": {"method": "rtn", "bits": 2, "group_size": 16, "overrides": {"re:.*down_proj": {"skip": True}}},
    "none": {"method": "none", "kv_bits": 2},
    "mxfp4": {"method": "rtn", "bits": 4, "grid": "mxfp4", "group_size": 32, "activation_bits": 4},
}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        result |= load_file(file)
    return result


def clips_of(folder: Path) -> set[float]:
    """Clips of linears' inputs."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return {scheme["clip"] for scheme in config["activations"].values()}


def trainings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Filled with what was trained, once it is."""
    result: list[Any] = []
    report = distill._Training.report

    def kept(self: Any) -> Any:
        result.append(self)
        return report(self)

    monkeypatch.setattr(distill._Training, "report", kept)
    return result


def keep_every_look(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Filled with held-out losses; training takes every look for a better one, so that its end is what is kept."""
    result: list[float] = []
    look = distill._Training._look

    def better(self: Any) -> float:
        result.append(look(self))
        return -float(len(result))

    monkeypatch.setattr(distill._Training, "_look", better)
    return result


def loss_of(folder: Path, training: Any) -> float:
    """The held-out loss of a training, of a stored model as it runs."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    samples = training.samples
    with torch.no_grad():
        losses = [
            float(distill._divergence(training.teacher.log_probs(ids), model(ids).logits)) * ids.shape[0]
            for ids in samples.held_out.split(samples.together)
        ]
    return sum(losses) / samples.held_out.shape[0]


@pytest.fixture
def run(short: dict[str, Path], token_file: Path, tmp_path: Path) -> Any:
    """Quantizes a tiny model; its report and folder."""

    def quantized(out: str, name: str = "llama", **settings: Any) -> tuple[Report, Path]:
        recipe = Recipe(calibration=str(token_file), **{**DATA, **settings})
        return quantize(short[name], tmp_path / out, recipe), tmp_path / out

    return quantized


# transformers reads a qwen2 folder's tokenizer as one of bytes, which the tiny one is not: no prompt there.
@pytest.mark.each_value
@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n in CONFIGS for k in METHODS if "qwen2" not in n or "system_prompt" not in METHODS[k]],
)
def test_codes_stay_and_what_was_trained_is_what_runs(
    name: str, kind: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, looks = trainings(monkeypatch), keep_every_look(monkeypatch)
    _, plain = run("plain", name, **METHODS[kind])
    _, folder = run("distilled", name, **METHODS[kind], **FAR)

    old, new = tensors_of(plain), tensors_of(folder)
    assert old.keys() == new.keys()
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    learned = ("norm.weight", "norm.bias", ".zeros", ".column_scale")
    assert all(key.endswith(learned) or ".scales" in key for key in changed)
    assert any(key.endswith("layernorm.weight") for key in changed)
    assert all(old[key].dtype == new[key].dtype for key in old)
    # Where inputs are quantized, sums in another order put some of them on the next code.
    near = {16: 0.01, 8: 0.1, 4: 0.12, 3: 0.25}[METHODS[kind].get("activation_bits", 16)]
    assert looks[-1] != pytest.approx(looks[0], rel=near)
    assert loss_of(plain, trained[0]) == pytest.approx(looks[0], rel=near)
    assert loss_of(folder, trained[0]) == pytest.approx(looks[-1], rel=near)


@pytest.mark.parametrize("name", CONFIGS)
def test_held_out_text_comes_closer_to_the_original(name: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = trainings(monkeypatch)
    _, plain = run("plain", name, **METHODS["rtn"])
    report, folder = run("distilled", name, **METHODS["rtn"], **DISTILLED)

    actual = report.distilled
    assert actual is not None
    assert actual.after < 0.95 * actual.before
    assert json.loads((folder / "report.json").read_text())["distilled"]["after"] == actual.after
    assert loss_of(plain, trained[0]) == pytest.approx(actual.before, rel=0.01)
    assert loss_of(folder, trained[0]) == pytest.approx(actual.after, rel=0.01)


def test_the_same_seed_gives_the_same_bytes(run: Any) -> None:
    first, second = (run(out, **METHODS["quarot"], **DISTILLED)[0] for out in ("first", "second"))
    other, _ = run("other", **METHODS["quarot"], **DISTILLED, seed=1)

    assert first.weights_sha256 == second.weights_sha256
    assert first.weights_sha256 != other.weights_sha256


@pytest.mark.parametrize("kind", ["quarot", "d2quant-plus"])
def test_states_that_are_computed_twice_give_the_same(kind: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, _ = run("kept", **METHODS[kind], **DISTILLED)
    monkeypatch.setattr(whole_model, "free_memory", lambda device: 0)
    again, _ = run("again", **METHODS[kind], **DISTILLED)

    assert kept.weights_sha256 == again.weights_sha256


def test_what_is_not_finite_goes_back_to_the_best_so_far(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, usual = [], distill._Training._step

    def broken(self: Any, ids: Tensor, optimizer: Any) -> float:
        calls.append(ids)
        if len(calls) == 5:
            with torch.no_grad():
                for parameter in self.student.parameters():
                    parameter.fill_(math.nan)
            return math.nan
        return usual(self, ids, optimizer)

    monkeypatch.setattr(distill._Training, "_step", broken)
    report, folder = run("out", **METHODS["gptq"], **GENTLE)

    assert report.distilled is not None
    assert report.distilled.rollbacks == 1
    assert report.distilled.after < report.distilled.before
    assert all(bool(tensor.isfinite().all()) for tensor in tensors_of(folder).values() if tensor.is_floating_point())


def test_without_a_better_state_the_start_is_kept(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, usual = [], distill._Training._look

    def worse(self: Any) -> float:
        looks.append(usual(self))
        return float(len(looks))

    monkeypatch.setattr(distill._Training, "_look", worse)
    report, folder = run("out", **METHODS["gptq"], **DISTILLED)
    plain, plain_folder = run("plain", **METHODS["gptq"])

    assert report.weights_sha256 == plain.weights_sha256
    assert len(looks) == 6
    assert report.distilled is not None
    assert report.distilled.rollbacks == 5
    assert (folder / "config.json").read_text() == (plain_folder / "config.json").read_text()


def test_a_start_that_is_kept_keeps_every_digit_of_its_clip(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill._Training, "_look", lambda self: 1.0)
    _, folder = run("out", **METHODS["quarot"], **DISTILLED, activation_clip=0.87654321)

    assert clips_of(folder) == {0.87654321}


def test_long_windows_are_cut_and_all_text_comes_by_turns() -> None:
    windows = torch.arange(6 * 50).view(6, 50)
    samples = distill._Samples.of(windows, distill.Distillation(steps=40, tokens=16))

    ordered = list(samples.order(40, seed=0))

    assert samples.trained.shape == (16, 16)
    assert samples.held_out.shape == (2, 16)
    assert not set(samples.trained.flatten().tolist()) & set(samples.held_out.flatten().tolist())
    first = torch.cat(ordered[:16])
    assert sorted(first[:, 0].tolist()) == sorted(samples.trained[:, 0].tolist())
    assert [batch[0, 0] for batch in ordered[:16]] != [batch[0, 0] for batch in ordered[16:32]]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"distill_steps": -1}, "distill steps is -1; give a positive whole number"),
        ({"distill": {"rate": 0.1}}, "distill.rate is set, but distill_steps is 0; set distill_steps"),
        ({"distill_steps": 2, "distill": {"steps": 3}}, "distill.steps is set; set distill_steps instead"),
        ({"distill_steps": 2, "distill": {"rate": 1.5}}, "distill rate is 1.5; give a number between 0 and 1"),
        ({"distill_steps": 2, "distill": {"tokens": 0}}, "distill tokens is 0; give a positive whole number"),
        ({"distill_steps": 2, "distill": {"norms": "no"}}, "distill norms is 'no'; give true or false"),
        ({"distill_steps": 2, "distill": {"pace": 1}}, "unknown key 'pace' of distill"),
        ({"distill_steps": 2, "distill": {"norm_biases": 1}}, "distill norm_biases is 1; give true or false"),
        (
            {"distill_steps": 2, "distill": dict.fromkeys(distillation.SPACES, False)},
            "distillation has nothing to learn: scales, zero_points, column_scales, norms, norm_biases, clips are all",
        ),
    ],
)
def test_a_wrong_setting_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRecipe, match=said.replace(".", r"\.")):
        Recipe(**settings)


def test_one_window_is_too_few_and_said_before_any_work() -> None:
    with pytest.raises(BadRecipe, match="one window of 24 tokens for steps of 512; use more windows, or fewer tokens"):
        Recipe(num_windows=1, window=24, distill_steps=3)
    assert Recipe(num_windows=1, window=1024, distill_steps=3).distillation == distill.Distillation(3)


def test_8_bit_factors_beside_mxfp4_are_learned_where_nothing_else_is(run: Any) -> None:
    recipe = METHODS["mxfp4"] | {"method": "l2qer", "options": {"rank": 8, "factor_bits": 8}}
    alone = {"tokens": 192, "rate": 0.02, "norms": False, "clips": False}
    plain = tensors_of(run("plain", **recipe)[1])
    learned = tensors_of(run("out", **recipe, distill_steps=8, distill=alone)[1])
    changed = {name for name in plain if not torch.equal(plain[name], learned[name])}
    assert changed
    assert all(name.endswith(("down.scales", "up.scales")) for name in changed)


def test_predictions_that_are_not_finite_are_refused_and_not_stored(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill._Training, "_look", lambda self: math.nan)
    with pytest.raises(NumericalFailure, match="are not finite, so it cannot be distilled; use more bits"):
        run("out", **METHODS["rtn"], **DISTILLED)
    assert not (tmp_path / "out").exists()


def test_the_command_line_distills_and_the_recipe_says_so(
    short: dict[str, Path], token_file: Path, tmp_path: Path
) -> None:
    arguments = [
        "quantize", str(short["llama"]), str(tmp_path / "out"), "--method", "rtn", "--bits", "2",
        "--group-size", "16", "--calibration", str(token_file), "--num-windows", "8", "--window", "24",
        "--distill-steps", "3", "--distill-option", "tokens=24", "--distill-option", "norms=false",
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)

    assert result.exit_code == 0, result.output
    assert "distilled in 3 steps: KL from the original" in result.output
    kept = Recipe.from_toml(tmp_path / "out" / "recipe.toml")
    assert kept.distillation == distill.Distillation(steps=3, tokens=24, norms=False)


def test_the_estimate_knows_of_distillation(short: dict[str, Path], token_file: Path) -> None:
    plain = Recipe(calibration=str(token_file), method="rtn", bits=2, group_size=16, **DATA)
    distilled = Recipe.from_dict(plain.to_dict() | {"distill_steps": 10_000})

    actual, more = (estimate(short["llama"], recipe) for recipe in (plain, distilled))

    assert more.seconds > 10 * actual.seconds
    assert more.memory_bytes["peak"] > actual.memory_bytes["peak"]
    assert more.file_bytes == actual.file_bytes

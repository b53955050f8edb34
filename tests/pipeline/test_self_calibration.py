"""Calibration windows that the model writes itself: which they are, that they are kept, and what is said of them."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import VOCABULARY, Run
from subnibble import Recipe, compare, distill_checkpoint, estimate, quantize
from subnibble.calibrate import kept_ids
from subnibble.checkpoint.opening import open_source
from subnibble.errors import BadJournal, BadRecipe, CalibrationError
from subnibble.kernels import native
from subnibble.pipeline import windows as module
from subnibble.pipeline.check import resolve
from subnibble.pipeline.windows import planned_windows, written_windows
from subnibble.report import SampledReport
from subnibble.resume import keeper, pace
from subnibble.resume.journal import Journal
from subnibble.resume.places import work_folders

RECIPE = Recipe(
    method="gptq", bits=3, group_size=16, calibration="self", num_windows=5, window=12, seed=3, device="cpu",
    dtype="float32",
)  # fmt: skip
needs_kernels = pytest.mark.skipif(native.why_missing() is not None, reason="no kernels")


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    """No test finds windows that another one wrote."""
    kept_ids._windows.clear()


def written(model: Path, folder: Path, recipe: Recipe = RECIPE) -> tuple[Tensor, SampledReport]:
    """The windows of a recipe, as `quantize` writes them."""
    resolved = resolve(model, recipe)
    source, skeleton = open_source(model), resolved.skeleton
    planned = planned_windows(
        resolved.recipe, source, source.load_tokenizer, resolved.prefix, skeleton.dtype, skeleton.device
    )
    assert planned.written is not None
    folder.mkdir(exist_ok=True)
    kept_ids._windows.clear()
    return written_windows(planned.written, Journal(folder, "quantize", {}), dict, lambda *step: None)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_windows_have_their_number_and_length_and_the_model_knows_their_ids(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    ids, report = written(folders[name], tmp_path)
    assert ids.shape == (5, 12)
    assert ids.dtype == torch.int64
    assert 0 <= int(ids.min()) <= int(ids.max()) < VOCABULARY
    assert (report.windows, report.length) == (5, 12)
    assert len({tuple(row) for row in ids.tolist()}) == 5


def test_the_seed_alone_determines_the_windows(folders: dict[str, Path], tmp_path: Path) -> None:
    first, _ = written(folders["llama"], tmp_path / "a")
    torch.manual_seed(99)
    again, _ = written(folders["llama"], tmp_path / "b")
    assert torch.equal(first, again)
    other, _ = written(folders["llama"], tmp_path / "c", replace(RECIPE, seed=4))
    assert not {tuple(row) for row in first.tolist()} & {tuple(row) for row in other.tolist()}


def test_fewer_windows_are_a_prefix_of_more_and_shorter_ones_of_longer(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    whole, _ = written(folders["llama"], tmp_path / "a")
    fewer, _ = written(folders["llama"], tmp_path / "b", replace(RECIPE, num_windows=2, window=9))
    assert torch.equal(fewer, whole[:2, :9])


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_number_of_windows_that_run_at_once_changes_none(
    dtype: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, num_windows=11, dtype=dtype)
    results = []
    for batch in (1, 2, 5, 16):
        monkeypatch.setattr(module, "_BATCH", batch)
        results.append(written(folders["llama"], tmp_path / str(batch), recipe)[0])
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_kernels
def test_the_backend_is_reported_with_its_reason_and_torch_is_said(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ids, report = written(folders["llama"], tmp_path / "native")
    assert (report.backend, report.reason) == ("native", "on the CPU")
    assert caplog.messages == []
    monkeypatch.setattr("subnibble.generate.choice.why_not", lambda model: "no kernels today")
    kept_ids._windows.clear()
    report = quantize(folders["llama"], tmp_path / "out", RECIPE).sampled
    assert report is not None
    assert (report.backend, report.reason) == ("torch", "no kernels today")
    assert [text for text in caplog.messages if "in torch, which is slow: no kernels today" in text] != []
    in_torch, _ = written(folders["llama"], tmp_path / "torch")
    # Sums in another order move few draws, if any.
    assert float((ids[:, :4] == in_torch[:, :4]).float().mean()) > 0.8


def test_the_recipe_in_the_checkpoint_gives_the_same_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = replace(RECIPE, sampling={"temperature": 0.9, "top_k": 40})
    first = quantize(folders["llama"], tmp_path / "a", recipe)
    kept = tomllib.loads((tmp_path / "a" / "recipe.toml").read_text())
    assert kept["calibration"] == "self"
    assert kept["sampling"] == {
        "start": "vocabulary", "prompts": [], "temperature": 0.9, "top_k": 40, "top_p": 1.0, "min_p": 0.0,
    }  # fmt: skip
    assert (kept["seed"], kept["num_windows"], kept["window"]) == (3, 5, 12)
    kept_ids._windows.clear()
    second = quantize(folders["llama"], tmp_path / "b", tmp_path / "a" / "recipe.toml")
    assert first.weights_sha256 == second.weights_sha256
    assert first.calibration_tokens == 60
    assert first.sampled == second.sampled
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["sampled"]["windows"] == 5
    kept_ids._windows.clear()
    third = quantize(folders["llama"], tmp_path / "c", replace(recipe, seed=4))
    assert third.weights_sha256 != first.weights_sha256


def test_the_windows_are_those_that_calibrate(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, _ = written(folders["llama"], tmp_path / "ids")
    seen: list[Tensor] = []
    monkeypatch.setattr(
        "subnibble.pipeline.driver._begin", lambda resolved, windows, *others: seen.append(windows) or killed()
    )
    with pytest.raises(Killed):
        quantize(folders["llama"], tmp_path / "out", RECIPE)
    assert torch.equal(seen[0], ids)


def saves_always(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pace, "SHARE", 1e9)
    patch.setattr(keeper, "FIRST", 0.0)


def steps_of(out: Path) -> list[str]:
    return [name for folder in work_folders(out) if (journal := Journal.read(folder)) for name in journal.steps]


class Killed(Exception):
    """Stands for a kill."""


def killed(*arguments: Any, **named: Any) -> Any:
    raise Killed


@pytest.mark.parametrize(
    "where", ["subnibble.pipeline.driver._begin", "subnibble.pipeline.finish.distill"], ids=["sampled", "last"]
)
def test_a_resumed_run_writes_no_windows_again(
    where: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, distill_steps=2, distill={"tokens": 12})
    expected = quantize(folders["llama"], tmp_path / "whole", recipe)
    saves_always(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(where, killed)
        with pytest.raises(Killed):
            quantize(folders["llama"], tmp_path / "out", recipe)
    assert "sampled windows" in steps_of(tmp_path / "out")
    kept_ids._windows.clear()
    monkeypatch.setattr(module, "write_windows", lambda *args: pytest.fail("windows were written again"))
    with pytest.raises(BadJournal, match=r"recipe\.seed was 3 and is 4"):
        quantize(folders["llama"], tmp_path / "out", replace(recipe, seed=4))
    with pytest.raises(BadJournal, match=r"recipe\.sampling\.temperature was 1\.0 and is 0\.9"):
        quantize(folders["llama"], tmp_path / "out", replace(recipe, sampling={"temperature": 0.9}))
    resumed = quantize(folders["llama"], tmp_path / "out", recipe, resume="must")
    assert resumed.weights_sha256 == expected.weights_sha256
    assert resumed.sampled == expected.sampled
    assert resumed.calibration_tokens == 60


@needs_kernels
def test_a_run_that_is_killed_while_windows_are_written_keeps_the_finished_ones(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = quantize(folders["llama"], tmp_path / "whole", RECIPE)
    saves_always(monkeypatch)
    monkeypatch.setattr(module, "_BATCH", 2)
    kept_ids._windows.clear()
    asked: list[list[int]] = []
    write = module.write_windows

    def some(backend: Any, order: Any, numbers: Any, on_step: Any) -> Tensor:
        asked.append(list(numbers))
        return killed() if asked == [[0, 1], [2, 3]] else write(backend, order, numbers, on_step)

    monkeypatch.setattr(module, "write_windows", some)
    with pytest.raises(Killed):
        quantize(folders["llama"], tmp_path / "out", RECIPE)
    assert steps_of(tmp_path / "out") == ["sampling"]
    report = quantize(folders["llama"], tmp_path / "out", RECIPE, resume="must")
    assert asked == [[0, 1], [2, 3], [2, 3], [4]]
    assert report.weights_sha256 == expected.weights_sha256


def test_compared_recipes_share_windows_and_estimate_writes_none(
    folders: dict[str, Path], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, write = [], module.write_windows
    monkeypatch.setattr(module, "write_windows", lambda *args: calls.append(1) or write(*args))
    estimated = estimate(folders["llama"], RECIPE)
    assert calls == []
    tokens = replace(RECIPE, calibration=str(text_file), num_windows=5)
    without = estimate(folders["llama"], tokens)
    assert estimated.memory_bytes["activation streams"] == without.memory_bytes["activation streams"]
    assert "writing windows, beyond that" in estimated.memory_bytes
    rows = compare(
        folders["llama"], [RECIPE, replace(RECIPE, bits=4)], {"text": str(text_file), "window": 16, "max_windows": 2}
    )
    assert len(rows) == 3
    assert calls == [1]
    compare(folders["llama"], [replace(RECIPE, window=13)], {"text": str(text_file), "window": 16, "max_windows": 2})
    assert calls == [1, 1]


def test_distillation_of_a_checkpoint_takes_windows_of_the_original(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    quantize(folders["llama"], out, RECIPE)
    recipe = replace(RECIPE, distill_steps=2, distill={"tokens": 12})
    seen: list[Tensor] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            "subnibble.pipeline.distill_checkpoint.distill",
            lambda source, packed, config, settings, ids, *others: seen.append(ids) or killed(),
        )
        with pytest.raises(Killed):
            distill_checkpoint(out, folders["llama"], recipe)
    assert steps_of(out) == ["sampled windows"]
    assert torch.equal(seen[0], written(folders["llama"], tmp_path / "ids", recipe)[0])
    kept_ids._windows.clear()
    monkeypatch.setattr(module, "write_windows", lambda *args: pytest.fail("windows were written again"))
    distill_checkpoint(out, folders["llama"], recipe, resume="must")
    (entry,) = json.loads((out / "report.json").read_text())["distilled_later"]
    assert entry["calibration"] == "self"
    assert entry["sampling"]["start"] == "vocabulary"
    assert entry["sampled"]["windows"] == 5


@pytest.mark.parametrize(
    ("sampling", "calibration", "message"),
    [
        ({"start": "middle"}, "self", r"sampling start is 'middle'; choose auto, one of bos, vocabulary, chat"),
        ({"start": "bos+bos"}, "self", "sampling start is"),
        ({"start": "auto+bos"}, "self", "sampling start is"),
        ({"start": 3}, "self", "sampling start is 3"),
        ({"temperature": 0}, "self", "all windows with one beginning would be the same"),
        ({"temperature": -1.0}, "self", "give a number above 0"),
        ({"temperature": True}, "self", "give a number above 0"),
        ({"top_p": 0}, "self", "above 0 and at most 1"),
        ({"min_p": 1.5}, "self", "a number from 0 to 1"),
        ({"top_k": -1}, "self", "a whole number, 0 or larger"),
        ({"top_k": 1.0}, "self", "a whole number, 0 or larger"),
        ({"prompts": [""]}, "self", "give texts that are not empty"),
        ({"prompts": 3}, "self", "give texts that are not empty"),
        ({"prompts": ["w1"], "start": "bos"}, "self", "leave one of them out"),
        ({"heat": 1}, "self", "unknown key 'heat' of sampling; known: min_p"),
        ({"top_k": 5}, "news", r"sampling.top_k is set, but calibration is 'news'"),
        ({"top_k": 5}, None, r"sampling.top_k is set, but calibration is None"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(sampling: Any, calibration: str | None, message: str) -> None:
    with pytest.raises(BadRecipe, match=message):
        Recipe(calibration=calibration, sampling=sampling)


@pytest.mark.parametrize(
    ("start", "message"),
    [("bos", 'has no BOS token; use start = "vocabulary"'), ("chat", 'has no chat template; use start = "auto"')],
)
def test_a_start_that_the_tokenizer_does_not_have_is_refused_before_any_work(
    start: str, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    recipe = replace(RECIPE, sampling={"start": start})
    for ask in (
        lambda: quantize(folders["llama"], tmp_path / "out", recipe),
        lambda: estimate(folders["llama"], recipe),
    ):
        with pytest.raises(BadRecipe, match=message):
            ask()
    assert list(tmp_path.iterdir()) == []


def test_windows_longer_than_the_positions_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="longer than the model's 128 positions"):
        quantize(folders["llama"], tmp_path / "out", replace(RECIPE, window=129))


def test_a_system_prompt_comes_before_the_windows_and_not_in_them(folders: dict[str, Path], tmp_path: Path) -> None:
    plain, _ = written(folders["llama"], tmp_path / "a", replace(RECIPE, sampling={"prompts": ["w5 w9 w7"]}))
    assert plain[:, :3].tolist() == [[5, 9, 7]] * 5
    after, _ = written(
        folders["llama"], tmp_path / "b", replace(RECIPE, sampling={"prompts": ["w5 w9 w7"]}, system_prompt="w5 w9")
    )
    assert after.shape == (5, 12)
    # The beginning repeats the prefix; only its last token is the window's own, and the model saw the same tokens.
    assert after[:, 0].tolist() == [7] * 5


def test_the_command_writes_windows_and_says_so(
    run: Run, folders: dict[str, Path], tmp_path: Path, token_file: Path
) -> None:
    out = tmp_path / "out"
    settings = ("--method", "gptq", "--bits", 3, "--group-size", 16, "--num-windows", 4, "--window", 16)
    code, said, err = run(
        "quantize", folders["llama"], out, *settings, "--calibration", "self", "--sampling-option", "top_p=0.9",
        "--sampling-option", "prompts=w4 w5",
    )  # fmt: skip
    assert code == 0, err
    assert "calibration: 4 windows of 16 tokens that the model wrote, " in said
    kept = tomllib.loads((out / "recipe.toml").read_text())["sampling"]
    assert (kept["top_p"], kept["prompts"], kept["start"]) == (0.9, ["w4 w5"], "auto")
    code, _, err = run("quantize", folders["llama"], tmp_path / "b", "--recipe", out / "recipe.toml", "--bits", 4)
    assert code == 0, err
    # Text in place of the model's own drops the settings of the latter.
    code, _, err = run(
        "quantize", folders["llama"], tmp_path / "c", "--recipe", out / "recipe.toml", "--calibration", token_file
    )
    assert code == 0, err
    assert tomllib.loads((tmp_path / "c" / "recipe.toml").read_text())["sampling"] == {}
    code, said, err = run(
        "distill", out, "--original", folders["llama"], "--steps", 2, "--calibration", "self", "--num-windows", 4,
        "--window", 16, "--distill-option", "tokens=16",
    )  # fmt: skip
    assert code == 0, err
    code, _, err = run("estimate", folders["llama"], *settings, "--sampling-option", "top_p=0.9")
    assert code == 2
    assert "sampling.top_p is set, but calibration is None" in err
    code, said, err = run("list", "--json")
    assert code == 0, err
    assert set(json.loads(said)["sampling_options"]) == {"start", "prompts", "temperature", "top_k", "top_p", "min_p"}

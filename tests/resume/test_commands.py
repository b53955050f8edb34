"""distill, compare and evaluate go on after a kill; full disks and signals lose nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crashes import bytes_of, killed_at_operation
from resumable import Resumable, comparable, recorded, saves_always

from subnibble import Recipe, compare, distill_checkpoint, evaluate, quantize
from subnibble.errors import BadJournal, OutputError
from subnibble.pipeline import journal as pipeline_journal
from subnibble.resume import durable, pace
from subnibble.resume.interrupt import safe_point, stops_at_safe_points
from subnibble.resume.places import runs_folder, runs_in
from subnibble.resume.runs import unfinished_runs

GPTQ = {"method": "gptq", "bits": 4, "group_size": 16, "num_windows": 8, "window": 24, "dtype": "float32"}


@pytest.fixture
def gptq(folders: dict[str, Path], token_file: Path, monkeypatch: pytest.MonkeyPatch) -> Resumable:
    saves_always(monkeypatch)
    return Resumable(folders["llama"], Recipe(**GPTQ, calibration=str(token_file), device="cpu"))


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def plain_report(folder: Path) -> dict[str, Any]:
    return {key: value for key, value in report_of(folder).items() if key not in ("seconds", "peak_memory")}


@pytest.mark.parametrize("first", [5, pytest.param(0, marks=pytest.mark.slow)])
def test_distillation_of_a_checkpoint_goes_on(
    gptq: Resumable, packed: dict[str, Path], token_file: Path, tmp_path: Path, first: int
) -> None:
    recipe = {"calibration": str(token_file), "num_windows": 8, "window": 32, "distill_steps": 4}
    target = tmp_path / "target"
    shutil.copytree(packed["llama"], target)
    distill_checkpoint(target, gptq.model, recipe)
    steps = set()
    for number in range(first, 1000, 29 if first else 1):
        out = tmp_path / "out"
        shutil.copytree(packed["llama"], out)
        was_killed = killed_at_operation(lambda out=out: distill_checkpoint(out, gptq.model, recipe), number)
        steps |= set(recorded(out))
        # After the work folder is gone, the command would distill once more.
        if recorded(out) or not was_killed or bytes_of(out) == bytes_of(packed["llama"]):
            if was_killed:
                distill_checkpoint(out, gptq.model, recipe)
            assert {n: b for n, b in bytes_of(out).items() if n != "report.json"} == {
                n: b for n, b in bytes_of(target).items() if n != "report.json"
            }
            assert plain_report(out) == plain_report(target)
        shutil.rmtree(out)
        if not was_killed:
            break
    assert steps <= {"distilling", "distilled"}
    assert len(steps) == (1 if first else 2) or steps == {"distilling", "distilled"}


@pytest.mark.parametrize(("keeps", "numbers"), [
    (True, (70, 150)), (False, (100,)),
    pytest.param(True, range(0, 200, 5), marks=pytest.mark.slow),
    pytest.param(False, range(0, 200, 5), marks=pytest.mark.slow),
])  # fmt: skip
def test_a_comparison_goes_on(
    gptq: Resumable, text_file: Path, tmp_path: Path, keeps: bool, numbers: Sequence[int]
) -> None:
    recipes = [gptq.recipe, Recipe(**{**GPTQ, "method": "rtn", "calibration": None}, device="cpu")]
    evaluation = {"text": str(text_file), "window": 16, "device": "cpu"}
    out = tmp_path / "kept" if keeps else None

    def rows() -> list[dict[str, Any]]:
        return [{**row.to_dict(), "seconds": None} for row in compare(gptq.model, recipes, evaluation, out)]

    with runs_in(tmp_path / "runs"):
        target = rows()
        if keeps:
            shutil.rmtree(tmp_path / "kept")
        steps: set[str] = set()
        for number in numbers:
            if killed_at_operation(rows, number):
                steps |= {run.last for run in unfinished_runs() if run.command == "compare"}
                assert rows() == target
            if keeps:
                assert {path.name for path in tmp_path.iterdir()} == {"kept", "runs"}
                assert not [path for path in (tmp_path / "kept").iterdir() if path.name.startswith(".")]
                shutil.rmtree(tmp_path / "kept")
        assert len(steps) >= min(2, len(numbers))
        assert unfinished_runs() == []
        assert list((tmp_path / "runs").iterdir()) == []


def test_a_comparison_refuses_checkpoints_that_changed_in_between(
    gptq: Resumable, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (gptq.model, [gptq.recipe], {"text": str(text_file), "window": 16, "device": "cpu"}, tmp_path / "kept")

    def stop(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("subnibble.evaluation.compare.score", stop)
        with pytest.raises(KeyboardInterrupt):
            compare(*arguments)
    (weights,) = (tmp_path / "kept").rglob("model-00001*")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(BadJournal, match="its weights are not those that were written"):
        compare(*arguments)


def test_a_comparison_keeps_a_checkpoint_that_was_finished_just_before_the_kill(
    gptq: Resumable, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "kept"
    arguments = (gptq.model, [gptq.recipe], {"text": str(text_file), "window": 16, "device": "cpu"}, out)

    def killed(*given: Any, **named: Any) -> None:
        quantize(*given, **named)
        raise KeyboardInterrupt

    def unused(*given: Any, **named: Any) -> None:
        pytest.fail("it is quantized twice")

    target = [row.scores for row in compare(*arguments)]
    shutil.rmtree(out)
    with monkeypatch.context() as patch:
        patch.setattr("subnibble.evaluation.compare.quantize", killed)
        with pytest.raises(KeyboardInterrupt):
            compare(*arguments)
        patch.setattr("subnibble.evaluation.compare.quantize", unused)
        assert [row.scores for row in compare(*arguments, resume="must")] == target


def test_a_comparison_that_starts_anew_replaces_nothing_without_being_told(
    gptq: Resumable, packed: dict[str, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, evaluation = tmp_path / "kept", {"text": str(text_file), "window": 16, "device": "cpu"}

    def stop(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("subnibble.evaluation.compare.score", stop)
        with pytest.raises(KeyboardInterrupt):
            compare(gptq.model, [gptq.recipe], evaluation, out)
    (name,) = (path.name for path in out.iterdir() if not path.name.startswith("."))
    shutil.rmtree(out / name)
    shutil.copytree(packed["llama"], out / name)
    for resume in ("never", "auto"):
        with pytest.raises(OutputError, match="pass --overwrite to replace it"):
            compare(gptq.model, [gptq.recipe], {**evaluation, "window": 12}, out, resume=resume)
    assert bytes_of(out / name) == bytes_of(packed["llama"])


def test_an_evaluation_goes_on_after_its_last_window(
    gptq: Resumable, packed: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    evaluation = {"text": str(text_file), "window": 16, "device": "cpu"}

    def scores(**named: Any) -> dict[str, Any]:
        results = evaluate(packed["llama"], evaluation, gptq.model, **named)
        return {key: value for key, value in results.items() if key not in ("seconds", "peak_memory")}

    with runs_in(tmp_path):
        target = scores()
        assert killed_at_operation(scores, 40)
        (run,) = unfinished_runs()
        assert (run.command, run.last) == ("evaluate", "windows")
        done: list[tuple[int, str]] = []
        assert scores(resume="must", progress=lambda number, total, doing: done.append((number, doing))) == target
        assert done[0][0] > 1
        assert done[0][1] == f"resumed after window {done[0][0]}"
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stride", [31, pytest.param(1, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_at_any_write_is_an_error_and_the_run_goes_on_later(
    stride: int, gptq: Resumable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gptq.run(tmp_path / "undisturbed")
    target, plain = comparable(tmp_path / "undisturbed"), durable.sync_file
    for number in range(0, 1000, stride):
        count = [0]

        def full(path: Path, number: int = number, count: list[int] = count) -> None:
            if count[0] == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count[0] += 1
            plain(path)

        with monkeypatch.context() as patch:
            patch.setattr(durable, "sync_file", full)
            try:
                gptq.run(tmp_path / "out")
            except OutputError as error:
                assert "No space left" in str(error)  # noqa: PT017
                was_full = True
            else:
                was_full = False
        if was_full:
            assert not (tmp_path / "out").exists()
            gptq.run(tmp_path / "out")
        assert comparable(tmp_path / "out") == target
        shutil.rmtree(tmp_path / "out")
        if not was_full:
            break
    assert number > 20
    assert {path.name for path in tmp_path.iterdir()} == {"undisturbed"}


def test_times_of_resumed_runs_add_up(gptq: Resumable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop_after_a_block(self: Any, *arguments: Any) -> None:
        add_block(self, *arguments)
        time.sleep(0.5)
        add_block_times.append(self._clock.seconds()["total"])
        raise KeyboardInterrupt

    add_block, add_block_times = pipeline_journal.QuantizationJournal.add_block, []
    with monkeypatch.context() as patch:
        patch.setattr(pipeline_journal.QuantizationJournal, "add_block", stop_after_a_block)
        with pytest.raises(KeyboardInterrupt):
            gptq.run(tmp_path / "out")
    start = time.perf_counter()
    gptq.run(tmp_path / "out")
    here = time.perf_counter() - start
    seconds = report_of(tmp_path / "out")["seconds"]
    # What came after the last record, half a second here, was lost and does not count.
    assert seconds["total"] == pytest.approx(add_block_times[0] - 0.5 + here, abs=0.25)
    assert sum(value for name, value in seconds.items() if name != "total") <= seconds["total"] + 0.01


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_the_first_signal_waits_for_a_safe_point_and_the_second_does_not(
    number: signal.Signals, error: type[BaseException]
) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    told: list[str] = []

    def work(signals: int) -> None:
        with stops_at_safe_points(lambda: told.append("stopping")):
            safe_point()
            for _ in range(signals):
                os.kill(os.getpid(), number)
            told.append("finished a step")
            safe_point()

    with pytest.raises(error) as caught:
        work(1)
    assert told == ["stopping", "finished a step"]
    assert getattr(caught.value, "code", 143) == 143
    told.clear()
    with pytest.raises(error):
        work(2)
    assert told == ["stopping"]
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    # Outside, nothing waits.
    safe_point()


@pytest.mark.parametrize(("number", "code"), [
    (signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_command_that_is_stopped_says_how_to_go_on(
    gptq: Resumable, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    toml, out = tmp_path / "recipe.toml", tmp_path / "out"
    toml.write_text(gptq.recipe.to_toml())
    command = [sys.executable, "-m", "subnibble", "quantize", str(gptq.model), str(out), "--recipe", str(toml)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    # A pipe for the journal would be faster than the run; the signal comes as soon as the work folder is there.
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / ".out.partial" / "journal.json").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    child.send_signal(number)
    _, stderr = child.communicate(timeout=120)
    assert child.returncode == code, stderr
    assert "Stopping at the next safe point" in stderr
    assert "the same command goes on from there" in stderr
    assert recorded(out)
    with runs_in(tmp_path / "cache" / "subnibble" / "runs"):
        (run,) = unfinished_runs()
        assert (run.out, run.command) == (out, "quantize")
        gptq.run(out, resume="must")
    gptq.run(tmp_path / "undisturbed")
    assert comparable(out) == comparable(tmp_path / "undisturbed")
    assert list((tmp_path / "cache").rglob("*.json")) == []


def test_no_test_left_a_run_behind(tmp_path: Path) -> None:
    assert runs_folder() != Path.home() / ".cache" / "subnibble" / "runs"


def test_a_signal_before_the_first_safe_point_stops_at_once() -> None:
    def work() -> None:
        with stops_at_safe_points(lambda: told.append("stopping")):
            os.kill(os.getpid(), signal.SIGINT)
            told.append("went on")

    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        work()
    assert told == []


def test_a_stop_saves_the_block_that_is_finished(gptq: Resumable, tmp_path: Path) -> None:
    # Even where saving is not due yet.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace, "SHARE", 1e-9)
        for blocks in (1, 2):

            def signal_in_a_block(done: int, total: int, doing: str, last: int = blocks - 1) -> None:
                if doing.startswith(f"block {last} "):
                    os.kill(os.getpid(), signal.SIGTERM)
                    # A second signal would stop at once.
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)

            with pytest.raises(SystemExit), stops_at_safe_points(lambda: None):
                gptq.run(tmp_path / f"out{blocks}", progress=signal_in_a_block)
            assert recorded(tmp_path / f"out{blocks}") == [f"block {index}" for index in range(blocks)]


def change(patch: pytest.MonkeyPatch, name: str) -> None:
    """Let one part of the fingerprint be another than before."""
    changed = {
        "threads": ("torch.get_num_threads", lambda: 99),
        "processor": ("subnibble.resume.fingerprint._processor", lambda: "x86_64 another"),
        "torch": ("subnibble.resume.fingerprint.version", lambda package: "0.0"),
        "code": ("subnibble.resume.fingerprint._code", lambda: "0123456789ab"),
    }
    patch.setattr(*changed[name])


@pytest.mark.parametrize("name", ["threads", "processor", "torch", "code", "text", "model", "seed"])
def test_a_quantization_goes_on_only_where_all_is_as_it_was(
    name: str, gptq: Resumable, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, model = tmp_path / "tokens.npy", tmp_path / "model"
    shutil.copy(token_file, text)
    shutil.copytree(gptq.model, model)
    run = Resumable(model, replace(gptq.recipe, calibration=str(text)))
    assert killed_at_operation(lambda: run.run(tmp_path / "out"), 40)
    done = recorded(tmp_path / "out")
    assert done
    if name == "text":
        np.save(text, np.load(text)[::-1])
    elif name == "model":
        os.utime(model / "config.json", ns=(1, 1))
    elif name == "seed":
        run = replace(run, recipe=replace(run.recipe, seed=1))
    else:
        change(monkeypatch, name)
    expected = {"text": "calibration tokens", "code": "versions.subnibble", "torch": "versions.torch"}.get(name, name)
    with pytest.raises(BadJournal, match=f"another run: [^;]*{expected}"):
        run.run(tmp_path / "out")
    assert recorded(tmp_path / "out") == done


@pytest.mark.parametrize("name", ["text", "reference", "window", "threads"])
def test_an_evaluation_of_other_things_does_not_go_on(
    name: str,
    gptq: Resumable,
    packed: dict[str, Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = tmp_path / "text.txt"
    shutil.copy(text_file, text)
    evaluation = {"text": str(text), "window": 16, "device": "cpu"}
    with runs_in(tmp_path / "runs"):
        assert killed_at_operation(lambda: evaluate(packed["llama"], evaluation, gptq.model), 40)
        reference: Path | None = gptq.model
        if name == "text":
            text.write_text(text.read_text()[::-1])
        elif name == "reference":
            reference = None
        elif name == "window":
            evaluation["window"] = 17
        else:
            change(monkeypatch, name)
        with pytest.raises(BadJournal, match="no unfinished run"):
            evaluate(packed["llama"], evaluation, reference, resume="must")
        assert len(unfinished_runs()) == 1


def test_peak_memory_is_that_of_all_runs(gptq: Resumable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pipeline_journal, "peak_memory", lambda: 10**15)
        patch.setattr("subnibble.pipeline.driver.write_config", lambda *arguments: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            gptq.run(tmp_path / "out")
    gptq.run(tmp_path / "out")
    assert report_of(tmp_path / "out")["peak_memory"] == 10**15

"""Who may continue whose work, and what is kept after an error."""

from __future__ import annotations

import errno
import multiprocessing
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from subnibble.errors import (
    BadArgument,
    BadJournal,
    BadRecipe,
    CheckpointError,
    NotLoadable,
    NumericalFailure,
    OutputError,
    SilentFailure,
)
from subnibble.resume import fingerprint
from subnibble.resume.places import runs_folder, runs_in, work_folders
from subnibble.resume.run import Run, printing_run
from subnibble.resume.runs import unfinished_runs

FINGERPRINT = {"recipe": {"bits": 3, "method": "gptq"}, "versions": {"torch": "2.13"}}


def leave_unfinished(final: Path, target: Mapping[str, Any] = FINGERPRINT, error: BaseException | None = None) -> Path:
    """Leave a run with one step by an error; return its work folder."""
    error = error or KeyboardInterrupt()

    def fail() -> None:
        with Run(final, "quantize", target) as run:
            run.journal.record({"block 0": 7})
            folders.append(run.folder)
            raise error

    folders: list[Path] = []
    with pytest.raises(type(error) if not isinstance(error, OSError) else (OSError, OutputError)):
        fail()
    return folders[0]


def test_the_same_command_goes_on(tmp_path: Path) -> None:
    leave_unfinished(tmp_path / "out")
    with Run(tmp_path / "out", "quantize", dict(reversed(FINGERPRINT.items())), "must") as run:
        assert run.is_resumed
        assert run.journal.value("block 0") == 7
        run.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("change", "message"), [
    ({"recipe": {"bits": 4, "method": "gptq"}}, "recipe.bits was 3 and is 4"),
    ({"versions": {"torch": "2.14"}}, 'versions.torch was "2.13" and is "2.14"'),
    ({"recipe": {"bits": 3}}, 'recipe.method was "gptq" and is not there'),
    ({"machine": {"threads": 2}}, r'machine was not there and is {"threads": 2}'),
])  # fmt: skip
@pytest.mark.parametrize("resume", ["auto", "must"])
def test_another_run_is_refused_with_what_differs_and_nothing_is_lost(
    tmp_path: Path, change: dict[str, Any], message: str, resume: str
) -> None:
    work = leave_unfinished(tmp_path / "out")
    before = {path.name for path in work.iterdir()}
    with pytest.raises(BadJournal, match=message), Run(tmp_path / "out", "quantize", {**FINGERPRINT, **change}, resume):
        pass
    assert {path.name for path in work.iterdir()} == before
    with (
        pytest.raises(BadJournal, match='command was "quantize" and is "distill"'),
        Run(tmp_path / "out", "distill", FINGERPRINT),
    ):
        pass


def test_never_starts_anew(tmp_path: Path) -> None:
    leave_unfinished(tmp_path / "out")
    with Run(tmp_path / "out", "distill", {}, "never") as run:
        assert not run.is_resumed
        assert [path.name for path in run.folder.iterdir()] == ["lock"]
    assert list(tmp_path.iterdir()) == []


def test_must_needs_an_earlier_run(tmp_path: Path) -> None:
    with pytest.raises(BadJournal, match="no unfinished run to resume"), Run(tmp_path / "out", "quantize", {}, "must"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_another_word_is_a_wrong_argument(tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="give one of auto, never, must"):
        Run(tmp_path / "out", "quantize", {}, "always")


def unreadable() -> CheckpointError:
    error = CheckpointError("the network is gone")
    error.__cause__ = OSError(errno.EIO, "no route")
    return error


KEPT = [
    KeyboardInterrupt(), SystemExit(143), MemoryError(), RuntimeError("CUDA out of memory"), TypeError("a bug"),
    OSError(errno.EIO, "bad disk"), unreadable(), OutputError("a shard"),
]  # fmt: skip
GONE = [
    CheckpointError("NaN weights"),
    NumericalFailure("nan"),
    BadRecipe("bits"),
    NotLoadable("no"),
    SilentFailure("hook"),
]


@pytest.mark.parametrize("error", KEPT, ids=lambda error: type(error).__name__)
def test_work_is_kept_after_an_error_that_need_not_come_again(tmp_path: Path, error: BaseException) -> None:
    work = leave_unfinished(tmp_path / "out", error=error)
    assert str(work) in error.__notes__[0]
    assert "block 0" in error.__notes__[0]
    assert (work / "journal.json").is_file()


@pytest.mark.parametrize("error", GONE, ids=lambda error: type(error).__name__)
def test_work_is_removed_after_an_error_that_would_come_again(tmp_path: Path, error: BaseException) -> None:
    leave_unfinished(tmp_path / "out", error=error)
    assert list(tmp_path.iterdir()) == []
    assert not any(run.folder.is_relative_to(tmp_path) for run in unfinished_runs())


def test_a_run_without_steps_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Run(tmp_path / "out", "quantize", {}):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_an_output_error_that_says_what_is_kept(tmp_path: Path, code: int) -> None:
    def fail(steps: int) -> None:
        with Run(tmp_path / "out", "quantize", {}) as run:
            if steps:
                run.journal.record({"block 0": 7})
            raise OSError(code, os.strerror(code))

    with pytest.raises(OutputError, match=r"nothing was kept.*free space"):
        fail(0)
    with pytest.raises(OutputError, match=r"the same command goes on.*free space"):
        fail(1)


def hold(final: Path, ready: Any, done: Any) -> None:
    with Run(final, "quantize", {}):
        ready.set()
        done.wait(30)


@pytest.mark.parametrize("exists", [False, True])
def test_two_runs_on_one_folder_refuse_each_other(tmp_path: Path, exists: bool) -> None:
    if exists:
        (tmp_path / "out").mkdir()
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "out", ready, done))
    other.start()
    assert ready.wait(30)
    for resume in ("auto", "never", "must"):
        with (
            pytest.raises(OutputError, match=rf"another run \(process {other.pid}\)"),
            Run(tmp_path / "out", "prefix", {}, resume),
        ):
            pass
    done.set()
    other.join()
    assert other.exitcode == 0
    with Run(tmp_path / "out", "quantize", {}) as run:
        run.finish()


def test_the_work_folder_is_beside_out_or_inside_it_and_is_found_where_it_is(tmp_path: Path) -> None:
    out = tmp_path / "out"
    work = leave_unfinished(out)
    assert work == tmp_path / ".out.partial"
    out.mkdir()
    with Run(out, "quantize", FINGERPRINT, "must") as run:
        assert run.folder == work
        run.finish()
    assert leave_unfinished(out) == out / ".out.partial"


def test_unfinished_runs_are_listed_until_they_are_finished_or_removed(tmp_path: Path) -> None:
    with runs_in(tmp_path / "runs"):
        assert unfinished_runs() == []
        work = leave_unfinished(tmp_path / "out")
        leave_unfinished(tmp_path / "runs" / "evaluate-0123")
        first, second = unfinished_runs()
        assert (first.out, first.folder, first.command, first.last) == (tmp_path / "out", work, "quantize", "block 0")
        assert second.folder == tmp_path / "runs" / ".evaluate-0123.partial"
        assert first.bytes > 0
        with Run(tmp_path / "out", "quantize", FINGERPRINT) as again:
            again.finish()
        assert unfinished_runs() == [second]
        (second.folder / "journal.json").write_text("{")
        (damaged,) = unfinished_runs()
        assert "is damaged" in damaged.last


def test_a_run_that_only_prints_works_without_a_folder_for_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with runs_in(tmp_path / "file"):
        with printing_run("evaluate", FINGERPRINT) as run:
            assert run is None
        assert "cannot be resumed" in caplog.text
        with pytest.raises(OutputError), printing_run("evaluate", FINGERPRINT, "must"):
            pass
    with printing_run("evaluate", FINGERPRINT), printing_run("evaluate", FINGERPRINT) as twin:
        assert twin is None
    assert not any(runs_folder().glob(".evaluate*"))


def test_the_fingerprint_knows_model_text_and_machine(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("config.json", "model.safetensors")]
    for path in paths:
        path.write_text(path.name)
    before = fingerprint.files(paths)
    assert set(before) == {str(path) for path in paths}
    os.utime(paths[1], ns=(1, 1))
    (line,) = fingerprint.differences(before, fingerprint.files(paths))
    assert line.startswith(f"{paths[1]} was [")
    ids = torch.arange(6).view(2, 3)
    digests = [fingerprint.tokens(windows) for windows in (ids, ids.view(3, 2), ids + 1, None)]
    assert len(set(digests)) == 4
    assert fingerprint.machine(torch.device("cpu"))["threads"] == torch.get_num_threads()
    assert {"subnibble", "torch", "transformers"} <= set(fingerprint.versions())


def test_a_link_and_the_current_folder_have_the_work_folder_of_what_they_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    target = work_folders(tmp_path / "out")
    assert work_folders(tmp_path / "link") == work_folders(Path()) == work_folders(Path("../out")) == target


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("content", ['{"journal": 0}', "{"])
def test_a_complete_checkpoint_needs_no_journal_that_can_be_read(tmp_path: Path, resume: str, content: str) -> None:
    def killed(work: Path, final: Path) -> None:
        (work / "commit-phase").write_bytes(b"leaving")
        raise KeyboardInterrupt

    def write() -> None:
        with Run(out, "quantize", FINGERPRINT) as run:
            run.journal.record({"block 0": 7})
            run.checkpoint.mkdir()
            (run.checkpoint / "config.json").write_text("{}")
            run.commit()

    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("subnibble.resume.commit.commit", killed)
        with pytest.raises(KeyboardInterrupt):
            write()
    (tmp_path / ".out.partial" / "journal.json").write_text(content)
    with Run(out, "quantize", FINGERPRINT, resume) as run:
        assert (out / "config.json").is_file()
        assert not run.is_resumed
        run.finish()
    assert list(tmp_path.iterdir()) == [out]


def test_a_damaged_run_is_not_said_to_go_on(tmp_path: Path) -> None:
    error = BadJournal("a shard is damaged")
    work = leave_unfinished(tmp_path / "out", error=error)
    assert (work / "journal.json").is_file()
    assert not hasattr(error, "__notes__")

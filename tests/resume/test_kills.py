"""A run that is killed at any moment goes on to the very bytes of an undisturbed run."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from crashes import killed_after, killed_at_operation
from power import PowerFailures
from resumable import RECIPES, Resumable, comparable, recorded, saves_always

from subnibble import Recipe
from subnibble.errors import BadJournal
from subnibble.resume import durable
from subnibble.resume.journal import Journal
from subnibble.resume.runs import has_unfinished


@pytest.fixture
def resumable(kind: str, short: dict[str, Path], token_file: Path, monkeypatch: pytest.MonkeyPatch) -> Resumable:
    saves_always(monkeypatch)
    values: dict[str, Any] = {
        "bits": 4, "group_size": 16, "calibration": str(token_file), "num_windows": 8, "window": 24, "device": "cpu",
        "dtype": "float32", **RECIPES[kind],
    }  # fmt: skip
    return Resumable(short["llama"], Recipe(**values))


def check_goes_on(resumable: Resumable, out: Path, target: Any) -> None:
    """Run again after a kill; OUT must be as after an undisturbed run, and nothing else be left."""
    if not out.exists() or has_unfinished(out):
        resumable.run(out)
    # Otherwise the kill came after the work folder was removed.
    assert comparable(out) == target
    shutil.rmtree(out)


def check_kills_at(resumable: Resumable, tmp_path: Path, numbers: range) -> set[str]:
    """Kill runs at these disk operations and let each go on; return the last recorded step of each."""
    resumable.run(tmp_path / "undisturbed")
    target, out, last = comparable(tmp_path / "undisturbed"), tmp_path / "out", set()
    for number in numbers:
        if not killed_at_operation(lambda: resumable.run(out), number):
            break
        last.add(recorded(out)[-1] if recorded(out) else "")
        check_goes_on(resumable, out, target)
    else:
        pytest.fail(f"a run has more than {numbers[-1]} disk operations")
    shutil.rmtree(out)
    assert {path.name for path in tmp_path.iterdir()} == {"undisturbed"}
    return last


@pytest.mark.parametrize("kind", ["rtn", "prompt, shift, distilled"])
def test_a_run_killed_at_some_of_its_disk_operations_goes_on(resumable: Resumable, tmp_path: Path) -> None:
    last = check_kills_at(resumable, tmp_path, range(19, 1000, 25))
    assert len(last) > 1


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.slow
def test_a_run_killed_at_every_disk_operation_goes_on(resumable: Resumable, tmp_path: Path) -> None:
    last = check_kills_at(resumable, tmp_path, range(1000))
    assert {"block 0", "block 1", "final layers"} <= last


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.slow
def test_a_run_killed_fifty_times_at_random_moments_goes_on(resumable: Resumable, tmp_path: Path) -> None:
    start = time.perf_counter()
    resumable.run(tmp_path / "undisturbed")
    seconds = time.perf_counter() - start
    target, out, rng = comparable(tmp_path / "undisturbed"), tmp_path / "out", random.Random(0)
    for _ in range(10):
        # Five kills in a row, and then to the end.
        for _ in range(5):
            killed_after(lambda: resumable.run(out) if not out.exists() else None, rng.uniform(0.0, 1.1 * seconds))
        check_goes_on(resumable, out, target)


@pytest.mark.parametrize("kind", ["gptq"])
def test_a_power_failure_loses_no_recorded_step(resumable: Resumable, tmp_path: Path) -> None:
    check_power_failures(resumable, tmp_path, every=31)


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.slow
def test_a_power_failure_at_any_moment_loses_no_recorded_step(resumable: Resumable, tmp_path: Path) -> None:
    check_power_failures(resumable, tmp_path, every=1)


def check_power_failures(resumable: Resumable, tmp_path: Path, every: int) -> None:
    """After a power failure at each `every`th operation, the run goes on after the steps that were recorded."""
    resumable.run(tmp_path / "undisturbed")
    target, disk = comparable(tmp_path / "undisturbed"), tmp_path / "disk"
    disk.mkdir()
    finished: list[str] = []
    record = Journal.record

    def noting(self: Journal, values: Any, *arguments: Any, **named: Any) -> None:
        record(self, values, *arguments, **named)
        finished.extend(values)

    failures = PowerFailures(disk, mark=lambda: set(finished))
    with pytest.MonkeyPatch.context() as patch, failures.recording():
        patch.setattr(Journal, "record", noting)
        resumable.run(disk / "out")
    assert {"block 0", "block 1", "final layers"} <= set(finished)
    for number in range(0, len(failures.images), every):
        after = tmp_path / "after"
        failures.restore(number, after)
        out = after / "out"
        if (after / ".out.partial" / "journal.json").exists() or not out.exists():
            assert failures.marks[number] <= set(recorded(out))
        check_goes_on(resumable, out, target)
        shutil.rmtree(after)


@pytest.mark.parametrize("forgotten", ["sync_file", "sync_folder"])
def test_writes_that_are_not_synced_are_found_out(
    short: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    # The model of a power failure must tell such a run from a right one.
    saves_always(monkeypatch)
    resumable = Resumable(short["llama"], Recipe(method="rtn", bits=4, group_size=16, dtype="float32", device="cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(durable, forgotten, lambda path: None)
        with pytest.raises((AssertionError, BadJournal)):
            check_power_failures(resumable, tmp_path, every=3)

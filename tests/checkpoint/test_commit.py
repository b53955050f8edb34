"""A finished checkpoint takes its place or is kept; what was there stays, also where the folder is a mounted volume."""

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from writer_samples import SHARDS, bytes_by_name, content, everything, hidden, write

from subnibble.checkpoint.weight_files import INDEX
from subnibble.checkpoint.writer import CheckpointWriter, check_output
from subnibble.errors import OutputError


def fail_to_rename(error: BaseException, when: Callable[[Path, Path], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first rename fail for which `when(origin, target)` holds."""
    rename, failed = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        if not failed and when(self, Path(target)):
            failed.append(self)
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)


# Old files leave, config.json first; new ones come, config.json last.
STOPS = {
    "an old file": lambda origin, target: target.parent.name == "replaced",
    "old weights": lambda origin, target: target.parent.name == "replaced" and origin.suffix != ".json",
    "the last new file": lambda origin, target: target.name == "config.json" and origin.parent.name == "checkpoint",
}


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("stop", STOPS)
def test_a_commit_that_fails_halfway_puts_the_old_checkpoint_back_and_keeps_the_new_one(
    tmp_path, monkeypatch, kind, stop
) -> None:
    final = tmp_path / "out"
    write(final, SHARDS[:2])
    before = content(final)
    write(tmp_path / "other", SHARDS)
    fail_to_rename(kind(errno.EBUSY, "Device or resource busy"), STOPS[stop], monkeypatch)
    with pytest.raises((OutputError, KeyboardInterrupt)) as caught:
        write(final, SHARDS, replace=True)
    assert bytes_by_name(final) == before
    assert content(hidden(final)) == content(tmp_path / "other")
    assert str(hidden(final).parent) in caught.value.__notes__[0]
    monkeypatch.undo()
    write(final, SHARDS, replace=True)
    assert content(final) == content(tmp_path / "other")


def test_a_finished_checkpoint_is_kept_where_its_name_is_refused(tmp_path, monkeypatch) -> None:
    final = tmp_path / "out"
    fail_to_rename(OSError(errno.EXDEV, "Invalid cross-device link"), lambda origin, to: to == final, monkeypatch)
    with pytest.raises(OutputError, match="cannot go there") as caught:
        write(final, SHARDS)
    assert str(hidden(tmp_path).parent) in caught.value.__notes__[0]
    write(final, SHARDS, resume="must")
    write(tmp_path / "other", SHARDS)
    assert content(final) == content(tmp_path / "other")


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_that_is_there_stays_the_same_folder_and_nothing_happens_outside_it(
    tmp_path, monkeypatch, replace
) -> None:
    # So it may be a mounted volume, or have a parent that nobody may write to.
    final = tmp_path / "out"
    if replace:
        write(final, SHARDS)
    else:
        final.mkdir()
    before = final.stat()
    for name in ("rename", "mkdir"):
        plain = getattr(Path, name)

        def inside(self: Path, *arguments: object, plain: Callable[..., object] = plain, **named: object) -> object:
            if self.parent == tmp_path and self != final:
                raise PermissionError(errno.EACCES, "Permission denied")
            return plain(self, *arguments, **named)

        monkeypatch.setattr(Path, name, inside)
    write(final, SHARDS[:1], replace)
    assert everything(tmp_path) == {"out", "out/model.safetensors", "out/config.json"}
    after = final.stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


def test_a_mounted_volume_is_written_to(tmp_path) -> None:
    final = tmp_path / "out"
    final.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", final], capture_output=True).returncode:
        pytest.skip("only root mounts volumes")
    try:
        (final / "lost+found").mkdir()
        for replace in (False, True):
            write(final, SHARDS, replace)
            assert {INDEX, "config.json"} < {*content(final)}
            assert (final / "lost+found").is_dir()
    finally:
        subprocess.run(["umount", final], check=True)


def test_what_killed_runs_left_inside_an_empty_folder_does_not_fill_it(tmp_path) -> None:
    left = tmp_path / "out" / ".out.partial" / "checkpoint"
    left.mkdir(parents=True)
    (left / "half.safetensors.part").write_bytes(b"half")
    write(tmp_path / "out", SHARDS[:1])
    assert set(content(tmp_path / "out")) == {"model.safetensors", "config.json"}


def test_what_is_no_folder_is_refused(tmp_path) -> None:
    # /dev/null, too, which is no file either.
    os.mkfifo(tmp_path / "out")
    for name in (tmp_path / "out", Path(os.devnull)):
        with pytest.raises(OutputError, match="is no folder"):
            check_output(name, replace=True)


def test_a_folder_that_cannot_be_looked_into_is_an_output_error(tmp_path, monkeypatch) -> None:
    def refused(self: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(OutputError, match=r"cannot be read \(Permission denied\)"):
        check_output(tmp_path, replace=False)


def test_what_another_program_puts_into_the_folder_at_the_commit_is_left_alone(tmp_path, monkeypatch) -> None:
    final = tmp_path / "out"
    write(final, SHARDS[:2])
    before = content(final)
    rename = Path.rename

    def taken(self: Path, target: Path) -> Path:
        # Once the old files are on their way.
        (final / "model.safetensors").write_text("theirs")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", taken)
    with pytest.raises(OutputError, match="in the meantime"):
        write(final, SHARDS[:1], replace=True)
    assert {**before, "model.safetensors": b"theirs"} == bytes_by_name(final)


def test_what_arrived_in_the_meantime_is_not_overwritten(tmp_path) -> None:
    def commit_after_another_program_wrote() -> None:
        with CheckpointWriter(tmp_path / "out", 1, replace=False) as writer:
            writer.write_shard(SHARDS[0])
            writer.finish_weights()
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("kept")
            writer.commit()

    with pytest.raises(OutputError, match="is not empty"):
        commit_after_another_program_wrote()
    assert content(tmp_path) == {"out/theirs": b"kept"}

"""Nothing that a console, a pipe or a disk does to the output stops the command, or shows as a fault of its own."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import Run
from subnibble.cli import checkpoints, console, streams
from subnibble.cli.main import main
from subnibble.errors import OutputError

# Letters of several alphabets, a letter that stands for none, half of one, and no UTF-8 in a file's name.
TEXT = "plain na\u00efve \u0141\u00f3d\u017a \u4f60\u597d \U0001f600 \ufffd \ud83d caf\udce9.txt"


def wrapped(encoding: str, errors: str = "strict") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)


def bytes_of(stream: io.TextIOWrapper) -> bytes:
    stream.flush()
    return stream.buffer.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def plain_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that `prepare` may replace."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, wrapped("utf-8"))


@pytest.mark.usefixtures("plain_streams")
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "cp437", "utf-8", "shift_jis"])
def test_letters_that_a_console_lacks_are_replaced(encoding: str, errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = wrapped(encoding, errors), wrapped(encoding, errors)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    streams.prepare()
    streams.say(TEXT)
    streams.tell(TEXT)
    console.print_json({"text": TEXT})
    console.table(("file", TEXT), [(TEXT, "1")])
    for stream in (out, err):
        assert bytes_of(stream).startswith(b"plain na")
    assert TEXT[:11].encode(encoding, "replace") in bytes_of(out)


@pytest.mark.usefixtures("plain_streams")
def test_a_way_to_show_letters_that_was_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = wrapped("ascii", "backslashreplace")
    monkeypatch.setattr(sys, "stdout", chosen)
    streams.prepare()
    streams.say("\u4f60")
    assert bytes_of(chosen).split() == [b"\\u4f60"]


@pytest.mark.usefixtures("plain_streams")
def test_streams_that_are_closed_take_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    streams.prepare()
    streams.say(TEXT)
    streams.tell(TEXT)
    console.table(("a",), [("b",)])
    with console.progress("work") as on_progress:
        on_progress(1, 1, "done")
    for stream in (sys.stdout, sys.stderr):
        assert stream is not None
        stream.close()


class Gone(io.StringIO):
    """A terminal that was closed."""

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")

    def flush(self) -> None:
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.usefixtures("plain_streams")
@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_that_goes_away_does_not_stop_the_work(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Gone()
    monkeypatch.setattr(gone, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", gone)
    streams.prepare()
    steps = []
    with console.progress("work") as on_progress:
        for done in range(1, 4):
            on_progress(done, 3, "working")
            steps.append(done)
    streams.tell("done")
    assert steps == [1, 2, 3]


def test_what_was_kept_is_told_of_with_the_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object, **named: object) -> None:
        raise actual

    monkeypatch.setattr(checkpoints, "print_json", failing)
    for actual, code in ((OutputError("refused"), 2), (KeyboardInterrupt(), 130), (SystemExit(143), 143)):
        actual.add_note("kept in /x")
        result, out, err = run("list", "--json")
        assert (result, out) == (code, "")
        assert err.splitlines()[-1] == "kept in /x"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_fails_is_no_fault_of_the_command(number: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object, **named: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoints, "print_json", failing)
    code, _, err = run("list", "--json")
    assert code == 2
    assert err.startswith("error: ")
    assert os.strerror(number) in err


def command(*arguments: object, **more: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "subnibble", *map(str, arguments)], stderr=subprocess.PIPE, **more)  # type: ignore[call-overload, no-any-return]


def test_the_package_runs_as_the_command() -> None:
    result = command("--version", stdout=subprocess.PIPE)
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"subnibble" in command("--help", stdout=subprocess.PIPE).stdout


@pytest.mark.usefixtures("plain_streams")
@pytest.mark.parametrize("coding", ["ascii", "cp1252", "latin-1"])
def test_help_and_lists_show_on_every_console(coding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["quantize", "--help"], ["list"]):
        out, err = wrapped(coding), wrapped(coding)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        monkeypatch.setattr(sys, "argv", ["subnibble", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert (stop.value.code, bytes_of(err)) == (0, b"")
        assert bytes_of(out)


def test_a_pipe_that_closes_leaves_no_trace() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        result = command("list", stdout=closed)
    assert result.stderr == b""


def test_a_files_name_shows_on_a_console_that_lacks_its_letters(packed: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "mod\u00e8le \u4f60"
    folder.symlink_to(packed["llama"])
    result = command("inspect", folder, stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "ascii:strict"})
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"mod?le ?" in result.stdout

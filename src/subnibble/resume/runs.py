"""Where runs keep their unfinished work, and a list of all unfinished runs of this user.

A run that writes a folder OUT keeps its work in the hidden folder `.OUT.partial`: inside OUT if that exists, since it
may be a mounted volume, else beside it. A run that only prints keeps it in the user's cache folder. There, too, is a
small file for each run of the first kind, so that all can be listed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from subnibble.errors import BadJournal
from subnibble.resume.durable import remove, write_file
from subnibble.resume.journal import JOURNAL, Journal

# Suffix of the hidden folder of unfinished work; what is added to it while the folder is being removed.
PARTIAL, REMOVED = ".partial", "-removed"
_FOLDER: ContextVar[Path | None] = ContextVar("folder", default=None)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UnfinishedRun:
    """An unfinished run.

    out: what it writes: a folder, or the name of the run for one that only prints.
    folder: its work folder.
    command: name of the command, "?" if the journal is damaged.
    started: when it began, in seconds since 1970; 0 if the journal is damaged.
    last: name of the last finished step, or what is wrong with the journal.
    bytes: size of its work folder.
    """

    out: Path
    folder: Path
    command: str
    started: float
    last: str
    bytes: int


def runs_folder() -> Path:
    """The user's folder for runs, ~/.cache/subnibble/runs unless `runs_in` says otherwise."""
    return _FOLDER.get() or Path.home() / ".cache" / "subnibble" / "runs"


@contextmanager
def runs_in(folder: Path) -> Iterator[None]:
    """Use another folder for runs inside this context."""
    token = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(token)


def work_folders(final: Path) -> tuple[Path, Path]:
    """The two places of the work folder of a run that writes `final`: inside it, and beside it."""
    name = f".{final.name}{PARTIAL}"
    return final / name, final.with_name(name)


def has_unfinished(final: Path) -> bool:
    """Whether an earlier run on `final` left work that can be resumed."""
    return any((folder / JOURNAL).is_file() for folder in work_folders(final.resolve()))


def is_work_folder(path: Path) -> bool:
    """Whether the name is that of a work folder, or of one that is being removed."""
    return path.name.startswith(".") and path.name.endswith((PARTIAL, PARTIAL + REMOVED))


def register(folder: Path) -> None:
    """Let `unfinished_runs` find this work folder. A failure is only logged: the run itself does not need the list."""
    if folder.parent == runs_folder():
        return
    try:
        runs_folder().mkdir(parents=True, exist_ok=True)
        write_file(_entry(folder), [json.dumps(str(folder)).encode()])
    except OSError as error:
        _log.warning("%s cannot be written (%s); `subnibble list --runs` will not show this run", runs_folder(), error)


def unregister(folder: Path) -> None:
    """Take a work folder off the list."""
    try:
        if _entry(folder).exists():
            remove(_entry(folder))
    except OSError as error:
        _log.warning("%s cannot be removed (%s)", _entry(folder), error)


def unfinished_runs() -> list[UnfinishedRun]:
    """All unfinished runs of this user that still exist, oldest first."""
    if not runs_folder().is_dir():
        return []
    folders = [path for path in runs_folder().iterdir() if path.is_dir() and is_work_folder(path)]
    for entry in runs_folder().glob("*.json"):
        try:
            folders.append(Path(json.loads(entry.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError) as error:
            _log.warning("%s cannot be read (%s)", entry, error)
    runs = [_described(folder) for folder in dict.fromkeys(folders) if (folder / JOURNAL).is_file()]
    return sorted(runs, key=lambda run: run.started)


def _described(folder: Path) -> UnfinishedRun:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    name = folder.name.removeprefix(".").removesuffix(PARTIAL)
    out = folder.parent if folder.parent.name == name else folder.with_name(name)
    try:
        journal = Journal.read(folder)
    except BadJournal as error:
        return UnfinishedRun(out, folder, "?", 0.0, str(error), size)
    if journal is None:
        return UnfinishedRun(out, folder, "?", 0.0, "finished in the meantime", size)
    return UnfinishedRun(out, folder, journal.command, journal.started, journal.last, size)


def _entry(folder: Path) -> Path:
    return runs_folder() / f"{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.json"

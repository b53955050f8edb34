"""The list of all unfinished runs of this user.

Runs that only print have their work folders in the user's folder for runs. For each run that writes a folder elsewhere,
a small file there holds the path of its work folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from subnibble.errors import BadJournal
from subnibble.resume.durable import remove, write_file
from subnibble.resume.journal import JOURNAL, Journal
from subnibble.resume.places import PARTIAL, is_work_folder, runs_folder, work_folders

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


def has_unfinished(final: Path) -> bool:
    """Whether an earlier run on `final` left work that can be resumed."""
    return any((folder / JOURNAL).is_file() for folder in work_folders(final))


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

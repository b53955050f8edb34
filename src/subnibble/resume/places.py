"""Where runs keep their unfinished work.

A run that writes a folder OUT keeps its work in the hidden folder `.OUT.partial`: inside OUT if that exists, since it
may be a mounted volume, else beside it. A run that only prints keeps it in the user's folder for runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

# Suffix of the hidden folder of unfinished work; what is added to it while the folder is being removed.
PARTIAL, REMOVED = ".partial", "-removed"
_FOLDER: ContextVar[Path | None] = ContextVar("folder", default=None)


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
    # Resolved, because "." has no name, and a link would have another name than the folder.
    final = final.resolve()
    name = f".{final.name}{PARTIAL}"
    return final / name, final.with_name(name)


def is_work_folder(path: Path) -> bool:
    """Whether the name is that of a work folder, or of one that is being removed."""
    return path.name.startswith(".") and path.name.endswith((PARTIAL, PARTIAL + REMOVED))

"""Open the work folder of a run: lock it, and continue an earlier run of the same command, or start a new one."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from subnibble.errors import (
    BadArgument,
    BadJournal,
    BadRecipe,
    CalibrationError,
    CheckpointError,
    NotLoadable,
    NumericalFailure,
    OutputError,
    SilentFailure,
    UnsupportedModel,
)
from subnibble.resume import commit
from subnibble.resume.commit import CHECKPOINT
from subnibble.resume.durable import remove, remove_folder, rename
from subnibble.resume.fingerprint import differences, digest, plain
from subnibble.resume.journal import JOURNAL, Journal
from subnibble.resume.lock import LOCK, Lock
from subnibble.resume.places import REMOVED, runs_folder, work_folders
from subnibble.resume.runs import register, unregister

# What to do with the unfinished work of an earlier run.
RESUME = ("auto", "never", "must")
# Errors that the same command would meet again in the same place.
_WOULD_RECUR = (
    BadArgument, BadRecipe, CalibrationError, NotLoadable, NumericalFailure, SilentFailure, UnsupportedModel,
)  # fmt: skip
_log = logging.getLogger(__name__)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


class Run:
    """A context manager that owns the work folder of one run.

    Leaving the context without `finish` keeps the work folder if a step is recorded and the same command can go on from
    there; a note on the error says so. It removes the folder otherwise.

    final: the folder that the run writes; or, for a run that only prints, the path that names its work folder.
    command: name of the command.
    fingerprint: everything that the result depends on; see `fingerprint.py`. {} for a run without steps.
    of_final: keys of the fingerprint that describe `final` before the run. They are not compared with those of a run
        whose result is in `final` already.
    resume: "auto" continues an earlier run if its fingerprint is the same, and refuses if it is not. "never" discards
        it. "must" refuses if there is none.
    folder: the work folder.
    journal: the finished steps.
    is_committed: whether the earlier run was killed after its checkpoint was complete: it is in `final` now, and only
        `finish` is left to call.

    Entering raises `OutputError` if another process runs on the same folder or the folder cannot be written, and
    `BadJournal` if the earlier run cannot be continued.
    """

    def __init__(
        self,
        final: Path,
        command: str,
        fingerprint: Mapping[str, Any],
        resume: str = "auto",
        of_final: Sequence[str] = (),
    ) -> None:
        self.final, self.command, self._fingerprint = final.resolve(), command, plain(fingerprint)
        self._resume, self._of_final = checked_resume(resume), of_final
        self.folder = Path()
        self.journal = Journal(self.folder, command, self._fingerprint)
        self.is_committed = False
        self._lock: Lock | None = None
        self._finished = False

    @property
    def checkpoint(self) -> Path:
        """The folder in which the checkpoint grows."""
        return self.folder / CHECKPOINT

    @property
    def written(self) -> int:
        """Bytes that this run and those that it continues have written to the work folder; 0 before the first step."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file()) if self.is_resumed else 0

    @property
    def is_resumed(self) -> bool:
        """Whether an earlier run is being continued, or this one has recorded a step."""
        return bool(self.journal.steps)

    @classmethod
    def recover(cls, final: Path) -> None:
        """Finish a commit to `final` that was killed, if there is one, so that `final` is a checkpoint again."""
        if commit.is_interrupted(final):
            run = cls(final, "", {})
            run._take()
            try:
                commit.finish(run.folder, run.final)
            finally:
                run._release()

    def __enter__(self) -> Self:
        self._take()
        remove_leftovers(self.final)
        try:
            self._open()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            is_kept = self.is_resumed and not self._finished and _may_go_on(error)
            if not is_kept:
                self._discard()
            elif error is not None and not isinstance(error, BadJournal):
                error.add_note(
                    f"The work so far (last: {self.journal.last}) is kept in {self.folder}; the same "
                    "command goes on from there, and --resume never starts anew."
                )
        finally:
            self._release()
        if isinstance(error, OSError) and error.errno in _DISK:
            state = "the work so far is kept: the same command goes on from there" if is_kept else "nothing was kept"
            remedy = "free space or choose another disk" if error.errno != errno.EACCES else "make it writable"
            if self.folder.parent == runs_folder():
                remedy += " (--out, or XDG_CACHE_HOME)"
            raise OutputError(f"{self.final}: {error.strerror}; {state}. To mend it, {remedy}") from error

    def commit(self) -> None:
        """Move the checkpoint in the work folder to `final`. Raises `OutputError` if that fails."""
        commit.commit(self.folder, self.final)
        self.finish()

    def finish(self) -> None:
        """Mark the run as finished: leaving the context removes its work folder."""
        self._finished = True

    def _take(self) -> None:
        """Find or create the work folder, and lock it."""
        inside, beside = work_folders(self.final)
        existing = [folder for folder in (inside, beside) if folder.is_dir()]
        self.folder = existing[0] if existing else inside if self.final.is_dir() else beside
        try:
            self._lock = Lock.take(self.folder, self.final)
        except OSError as error:
            raise OutputError(f"{self.final}: cannot be created ({error.strerror}); choose another folder") from error

    def _open(self) -> None:
        """Read the journal of an earlier run and decide whether to continue it."""
        if commit.has_begun(self.folder):
            # The earlier run was complete: its checkpoint goes to its place, whatever happens now.
            commit.finish(self.folder, self.final)
            journal = self._readable_journal()
            if self._resume != "never" and journal is not None and not self._changes(journal, self._of_final):
                self.journal, self.is_committed = journal, True
                return
            self._clear()
        if self._resume == "never":
            self._clear()
        journal = Journal.read(self.folder)
        if journal is None or not journal.steps:
            if self._resume == "must":
                self._discard()
                raise BadJournal(f"{self.final}: there is no unfinished run to resume; leave --resume out")
            self._clear()
            self.journal = Journal(self.folder, self.command, self._fingerprint)
        else:
            self._check_same(journal)
            self.journal = journal
            journal.tidy()
        register(self.folder)

    def _readable_journal(self) -> Journal | None:
        """The journal of a run whose checkpoint is complete; None if it is unreadable, since nobody needs it then."""
        try:
            return Journal.read(self.folder)
        except BadJournal as error:
            _log.warning("%s; the checkpoint that it belongs to is complete", error)
            return None

    def _changes(self, journal: Journal, ignored: Sequence[str] = ()) -> list[str]:
        """What differs between the run of a journal and this one, a few words each; without the keys `ignored`."""
        then = {"command": journal.command, **journal.fingerprint}
        now = {"command": self.command, **self._fingerprint}
        for key in ignored:
            then.pop(key, None)
            now.pop(key, None)
        return differences(then, now)

    def _check_same(self, journal: Journal) -> None:
        changed = self._changes(journal)
        if changed:
            shown = "; ".join(changed[:8]) + ("; ..." if len(changed) > 8 else "")
            raise BadJournal(
                f"{self.folder} holds the unfinished work of another run: {shown}. Repeat the earlier command to "
                "finish it, or discard it with --resume never or by removing that folder"
            )

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _clear(self) -> None:
        """Remove everything in the work folder except the lock."""
        remove(self.folder / JOURNAL)
        for path in self.folder.iterdir():
            if path.is_dir():
                remove_folder(path)
            elif path.name != LOCK:
                path.unlink()

    def _discard(self) -> None:
        """Remove the work folder."""
        unregister(self.folder)
        # One rename, so that an interrupted removal leaves no half of a run.
        removed = self.folder.with_name(self.folder.name + REMOVED)
        remove_folder(removed)
        try:
            rename(self.folder, removed)
        except OSError as error:
            # The result is not touched by this.
            _log.warning("%s cannot be removed (%s); remove it", self.folder, error.strerror)
        else:
            # Network file systems keep a file that is open.
            self._release()
            remove_folder(removed)


def remove_leftovers(final: Path) -> None:
    """Remove what is left of a finished run on `final` that was killed while it removed its work folder."""
    for folder in work_folders(final):
        remove_folder(folder.with_name(folder.name + REMOVED))


@contextmanager
def printing_run(command: str, fingerprint: Mapping[str, Any], resume: str = "auto") -> Iterator[Run | None]:
    """The run of a command that writes no folder; its work folder is in the user's folder for runs.

    The fingerprint is part of the folder's name, so that a run with other arguments is another run.

    Yields None, after a warning, if the folder cannot be written or another process does the same: the command works
    without, and cannot be resumed. Exception: with resume "must" this raises the `OutputError`.
    """
    run = Run(runs_folder() / f"{command}-{digest(fingerprint)}", command, fingerprint, resume)
    with ExitStack() as stack:
        try:
            stack.enter_context(run)
        except OutputError as error:
            if resume == "must":
                raise
            _log.warning("this command cannot be resumed if it is killed: %s", error)
            yield None
            return
        run.journal.is_optional = True
        yield run
        run.finish()


def checked_resume(resume: Any) -> str:
    """The argument `resume`, if it is one of `RESUME`; raises `BadArgument` otherwise."""
    if resume not in RESUME:
        raise BadArgument(f"resume is {resume!r}; give one of {', '.join(RESUME)}")
    return str(resume)


def _may_go_on(error: BaseException | None) -> bool:
    """Whether the same command can get further after this error: not if it would fail again in the same place."""
    if isinstance(error, CheckpointError):
        # A file that cannot be read now may be readable later; a damaged model must be replaced.
        return isinstance(error.__cause__, OSError)
    return error is not None and not isinstance(error, _WOULD_RECUR)

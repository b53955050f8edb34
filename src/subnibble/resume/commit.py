"""Move a finished checkpoint from a work folder to its final place, so that a crash at any moment can be made good.

If the final folder does not exist, one rename does it. Else its old files leave to the work folder, config.json first,
and the new ones arrive, config.json last: without it a folder is no model, so nobody loads a mixture. A file in the
work folder says which of the two phases has begun; after a crash, `finish` goes on from there.
"""

from __future__ import annotations

import errno
from pathlib import Path

from subnibble.errors import OutputError
from subnibble.resume.durable import make_folder, remove, remove_folder, rename, sync_tree, write_file
from subnibble.resume.places import is_work_folder, work_folders

# In the work folder: the new checkpoint, the files that it replaces, the phase of the commit.
CHECKPOINT, _REPLACED, _PHASE = "checkpoint", "replaced", "commit-phase"
_LEAVING, _ARRIVING = b"leaving", b"arriving"
_CONFIG = "config.json"
# The folder that the root of an empty volume holds.
_OF_VOLUMES = "lost+found"


def contents(folder: Path) -> list[Path]:
    """List a folder without work folders and without lost+found."""
    return [entry for entry in folder.iterdir() if entry.name != _OF_VOLUMES and not is_work_folder(entry)]


def commit(work: Path, final: Path) -> None:
    """Move the checkpoint in the work folder to `final`, in place of the files there.

    Raises `OutputError` if that fails; `final` then is as it was, and the checkpoint is in the work folder.
    """
    try:
        sync_tree(work / CHECKPOINT)
        write_file(work / _PHASE, [_LEAVING])
        arrived: list[Path] = []
        try:
            _carry_out(work, final, arrived)
        except BaseException:
            # BaseException includes KeyboardInterrupt.
            _roll_back(work, final, arrived)
            raise
    except OSError as error:
        other = f"; {final} is on another disk now than when the run began" if error.errno == errno.EXDEV else ""
        raise OutputError(f"{final}: the finished checkpoint cannot go there ({error.strerror}{other})") from error


def has_begun(work: Path) -> bool:
    """Whether a commit from this work folder has begun and was neither rolled back nor cleaned up."""
    return (work / _PHASE).is_file()


def is_interrupted(final: Path) -> bool:
    """Whether a commit to `final` was killed before its last rename: then `final` is no checkpoint before `finish`."""
    return any(has_begun(work) and (work / CHECKPOINT).is_dir() for work in work_folders(final))


def finish(work: Path, final: Path) -> None:
    """Finish a commit that was killed. Raises `OutputError` if that fails; calling it again goes on."""
    try:
        _carry_out(work, final, [])
    except OSError as error:
        raise OutputError(
            f"{final}: the finished checkpoint in {work / CHECKPOINT} cannot go there ({error.strerror})"
        ) from error


def _carry_out(work: Path, final: Path, arrived: list[Path]) -> None:
    """Do what is left of a commit. arrived: gets the path of each new file in `final`, just before it is moved."""
    new, old = work / CHECKPOINT, work / _REPLACED
    if not final.is_dir():
        rename(new, final)
        return
    if not new.is_dir():
        # The one rename was done already.
        return
    if (work / _PHASE).read_bytes() == _LEAVING:
        make_folder(old)
        for entry in sorted(contents(final), key=lambda entry: entry.name != _CONFIG):
            _check_free(entry, old)
            rename(entry, old / entry.name)
        write_file(work / _PHASE, [_ARRIVING])
    for entry in sorted(new.iterdir(), key=lambda entry: entry.name == _CONFIG):
        _check_free(entry, final)
        arrived.append(final / entry.name)
        rename(entry, final / entry.name)
    remove_folder(old)
    new.rmdir()


def _roll_back(work: Path, final: Path, arrived: list[Path]) -> None:
    """Undo a commit that failed. If this is killed, `finish` still goes forward from where it was.

    arrived: paths of new files in `final`; the last one may not have been moved.
    """
    new, old = work / CHECKPOINT, work / _REPLACED
    for path in reversed(arrived):
        if not (new / path.name).exists():
            rename(path, new / path.name)
    if old.is_dir():
        write_file(work / _PHASE, [_LEAVING])
        for entry in sorted(old.iterdir(), key=lambda entry: entry.name == _CONFIG):
            if not (final / entry.name).exists():
                rename(entry, final / entry.name)
        # What another program put in the place of an old file stays, and the old file is kept, too.
        if not any(old.iterdir()):
            old.rmdir()
    remove(work / _PHASE)


def _check_free(entry: Path, folder: Path) -> None:
    if (folder / entry.name).exists():
        raise FileExistsError(errno.EEXIST, f"another program created {entry.name} in the meantime")

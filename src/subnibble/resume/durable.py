"""Write files so that a crash at any moment leaves the old content or the new one, never a part.

The order of every write: data to a file beside the target, fsync, rename over the target, fsync of the folder. A rename
that is not followed by an fsync of its folders may be lost at a power failure, and data that was not synced may come
back as zeros under the new name.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

# Suffix of a file that is being written.
INCOMPLETE = ".part"
# What `write` on a file accepts without a copy.
Chunk = bytes | memoryview


def write_file(path: Path, chunks: Iterable[Chunk]) -> str:
    """Write a file, completely or not at all; return its SHA-256, 64 hexadecimal digits.

    chunks: the content in pieces, so that it need not be in memory at once.

    Raises `OSError`; the incomplete file is then removed, so that a full disk gets its space back.
    """
    digest = hashlib.sha256()

    def fill(incomplete: Path) -> None:
        with incomplete.open("wb") as handle:
            for chunk in chunks:
                handle.write(chunk)
                digest.update(chunk)

    write_by(path, fill)
    return digest.hexdigest()


def write_by(path: Path, fill: Callable[[Path], None]) -> None:
    """Write a file with a function of another library, completely or not at all.

    fill: writes the whole content to the path that it is given.
    """
    incomplete = path.with_name(f"{path.name}{INCOMPLETE}")
    try:
        fill(incomplete)
        sync_file(incomplete)
        incomplete.replace(path)
    except BaseException:
        # BaseException includes KeyboardInterrupt.
        incomplete.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def rename(origin: Path, target: Path) -> None:
    """Rename a file or folder on one disk; it stays renamed after a power failure."""
    origin.rename(target)
    for folder in dict.fromkeys((target.parent, origin.parent)):
        sync_folder(folder)


def remove(path: Path) -> None:
    """Remove a file, if it exists; it stays removed after a power failure."""
    path.unlink(missing_ok=True)
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Create a folder with the user's default permissions, if it does not exist, and all of its parents."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder and its content; what cannot be removed stays."""
    shutil.rmtree(path, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Sync all files and folders under `folder`, and the folder itself."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            sync_file(path)
    sync_folder(folder)


def sync_file(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    # Some systems sync a file only through a handle that may write.
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system can do that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems refuse to sync folders; they keep names in order themselves.
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)

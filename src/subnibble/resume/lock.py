"""The lock of a work folder: only one process writes there, and the system releases it however the process ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from subnibble.errors import OutputError
from subnibble.resume.durable import make_folder

# The locked file in the work folder; it holds the number of the process.
LOCK = "lock"
# Errors of file systems, mostly network ones, that cannot lock files.
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lock:
    """A lock that this process holds. handle: the open file."""

    handle: int

    @classmethod
    def take(cls, folder: Path, final: Path) -> Lock:
        """Create the work folder if it does not exist, and lock it.

        final: what the run writes, for the error.

        Raises `OutputError` if another process holds the lock, and `OSError` if the folder cannot be written.
        """
        while True:
            make_folder(folder)
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _WITHOUT_LOCKS:
                    _log.warning("%s: this file system has no locks; a second run would not be noticed", folder)
                    return cls(handle)
                owner = os.pread(handle, 32, 0).decode(errors="replace").strip()
                os.close(handle)
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                raise OutputError(
                    f"{final}: another run (process {owner or 'unknown'}) is writing it; wait for its end or choose "
                    "another folder"
                ) from error
            if _is_same(handle, folder / LOCK):
                os.ftruncate(handle, 0)
                os.pwrite(handle, str(os.getpid()).encode(), 0)
                return cls(handle)
            # The process that held the lock has removed the folder in the meantime.
            os.close(handle)

    def release(self) -> None:
        """Release the lock."""
        os.close(self.handle)


def _is_same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False

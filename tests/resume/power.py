"""What a power failure leaves: a model of a disk that keeps only what was synced, at every operation of a run."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# An inode, and how often its number was given to a new file.
Inode = tuple[int, int]


@dataclass
class PowerFailures:
    """Records, before every operation on the disk, what a power failure at that moment would leave of a folder.

    A file keeps the content of its last fsync, and is empty without one. A folder keeps the names of its last fsync:
    what was created, renamed or removed since then is as before. This is harsher than most file systems are.

    root: the folder; what is in it at the start is taken as synced.
    images: one for each operation: relative path -> content, None for a folder.
    marks: one for each operation: the return value of `mark` at that moment.
    """

    root: Path
    mark: Callable[[], Any] = lambda: None
    images: list[dict[str, bytes | None]] = field(default_factory=list)
    marks: list[Any] = field(default_factory=list)
    _contents: dict[Inode, bytes] = field(default_factory=dict)
    _names: dict[Inode, dict[str, Inode]] = field(default_factory=dict)
    _ages: dict[int, int] = field(default_factory=dict)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record all operations inside the context."""
        for folder, _, files in os.walk(self.root):
            self._sync_folder(Path(folder))
            for name in files:
                self._contents[self._inode((Path(folder) / name).stat())] = (Path(folder) / name).read_bytes()
        plain = {name: getattr(os, name) for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")}

        def fsync(handle: int) -> None:
            self._take()
            plain["fsync"](handle)
            path = Path(f"/proc/self/fd/{handle}").readlink()
            if not path.is_relative_to(self.root):
                return
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                self._sync_folder(path)
            else:
                self._contents[self._inode(os.fstat(handle))] = path.read_bytes()

        def moving(name: str) -> Callable[..., None]:
            def move(origin: Any, target: Any, **named: Any) -> None:
                self._take()
                if os.path.lexists(target):
                    self._forget(Path(target).stat())
                plain[name](origin, target, **named)

            return move

        def removing(name: str) -> Callable[..., None]:
            def remove(path: Any, *, dir_fd: int | None = None) -> None:
                self._take()
                state = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
                plain[name](path, dir_fd=dir_fd)
                self._forget(state)

            return remove

        def mkdir(path: Any, *arguments: Any, **named: Any) -> None:
            self._take()
            plain["mkdir"](path, *arguments, **named)

        patched = {
            "fsync": fsync, "rename": moving("rename"), "replace": moving("replace"), "unlink": removing("unlink"),
            "rmdir": removing("rmdir"), "mkdir": mkdir,
        }  # fmt: skip
        try:
            for name, function in patched.items():
                setattr(os, name, function)
            yield
        finally:
            for name, function in plain.items():
                setattr(os, name, function)

    def restore(self, number: int, folder: Path) -> None:
        """Write what a power failure before operation `number` leaves to `folder`, which must not exist."""
        folder.mkdir()
        for name, content in self.images[number].items():
            if content is None:
                (folder / name).mkdir()
            else:
                (folder / name).write_bytes(content)

    def _take(self) -> None:
        image: dict[str, bytes | None] = {}

        def walk(inode: Inode, prefix: str) -> None:
            for name, entry in self._names.get(inode, {}).items():
                path = f"{prefix}{name}"
                if entry in self._names or entry in self._folders:
                    image[path] = None
                    walk(entry, f"{path}/")
                else:
                    image[path] = self._contents.get(entry, b"")

        walk(self._inode(self.root.stat()), "")
        self.images.append(image)
        self.marks.append(self.mark())

    def __post_init__(self) -> None:
        self._folders: set[Inode] = set()

    def _sync_folder(self, folder: Path) -> None:
        names: dict[str, Inode] = {}
        for entry in folder.iterdir():
            inode = self._inode(entry.stat())
            names[entry.name] = inode
            if entry.is_dir():
                self._folders.add(inode)
        self._names[self._inode(folder.stat())] = names

    def _inode(self, state: os.stat_result) -> Inode:
        return state.st_ino, self._ages.get(state.st_ino, 0)

    def _forget(self, state: os.stat_result) -> None:
        """An inode lost its name: the next file with its number is another one."""
        self._ages[state.st_ino] = self._ages.get(state.st_ino, 0) + 1

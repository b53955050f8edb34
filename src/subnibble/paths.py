"""File names as users type them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """The path with `~` or `~user` expanded; unchanged if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def is_file(text: str) -> bool:
    """Whether `text` is the name of an existing file; False for text that cannot be a file name, such as a long one."""
    try:
        return bool(text) and expanded(text).is_file()
    except (OSError, ValueError):
        return False


def absolute_path(name: str, words: Collection[str]) -> str:
    """The absolute path of the file `name`; `name` itself if it is one of `words` or there is no such file."""
    return str(expanded(name).resolve()) if name not in words and is_file(name) else name

"""Names of files as users give them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """The path with `~` as the user's home; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def is_file(text: str) -> bool:
    """Whether a text names a file; one that is too long for a name, or no name, does not."""
    try:
        return bool(text) and expanded(text).is_file()
    except (OSError, ValueError):
        return False


def absolute_path(name: str, words: Collection[str]) -> str:
    """The full path of the file `name`; unchanged if it is one of `words`, or no file."""
    return str(expanded(name).resolve()) if name not in words and is_file(name) else name

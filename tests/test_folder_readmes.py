"""The README of each folder of the package names what is in it."""

from __future__ import annotations

from pathlib import Path

import pytest

import subnibble

ROOT = Path(subnibble.__file__).parent
# A file a command, a file a method: the names say it.
_SELF_EXPLAINING = {"cli", "methods"}
FOLDERS = sorted(file.parent.name for file in ROOT.glob("*/__init__.py"))


def unnamed(folder: Path, text: str) -> list[str]:
    """Files of a folder that `text` does not name."""
    return sorted(file.name for file in folder.glob("*.py") if file.stem != "__init__" and f"`{file.name}`" not in text)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folders_readme_names_its_files(folder: str) -> None:
    text = (ROOT / folder / "README.md").read_text()
    if folder not in _SELF_EXPLAINING:
        assert unnamed(ROOT / folder, text) == []
    assert max(map(len, text.splitlines())) <= 120


def test_a_file_that_is_not_named_is_found() -> None:
    assert unnamed(ROOT / "report", "What `report.json` says.") == ["clock.py"]

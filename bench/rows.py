"""Rows of a growing table: finished ones are appended to a JSON file and skipped by later runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Rows:
    """A JSON list of flat rows; `key` names the fields that tell rows apart."""

    def __init__(self, path: Path, key: tuple[str, ...]) -> None:
        self._path, self._key = path, key
        self.rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []

    def has(self, row: dict[str, Any]) -> bool:
        """Whether a row with the same key fields is there."""
        return any(all(old.get(k) == row.get(k) for k in self._key) for old in self.rows)

    def append(self, row: dict[str, Any]) -> None:
        """Add a finished row; the file is replaced in one step."""
        self.rows.append(row)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self.rows, indent=1) + "\n")
        os.replace(part, self._path)  # noqa: PTH105

"""A results file that grows: finished rows are appended to a JSON list, and later runs skip them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Rows:
    """Rows of a results file, each a flat dictionary.

    path: the JSON file; it need not exist yet.
    key: names of the fields that identify a row.
    """

    def __init__(self, path: Path, key: tuple[str, ...]) -> None:
        self._path, self._key = path, key
        self.rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []

    def has(self, row: dict[str, Any]) -> bool:
        """Return whether the file has a row with the same key fields."""
        return any(all(old.get(k) == row.get(k) for k in self._key) for old in self.rows)

    def append(self, row: dict[str, Any]) -> None:
        """Append a finished row; the file is replaced in one step, so that an interrupted run cannot damage it."""
        self.rows.append(row)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_suffix(".part")
        unfinished.write_text(json.dumps(self.rows, indent=1) + "\n")
        os.replace(unfinished, self._path)  # noqa: PTH105

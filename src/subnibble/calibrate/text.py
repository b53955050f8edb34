"""Text by file or by name: what calibration and evaluation read.

- a `.txt` (or any other text) file: its content; a `.jsonl` file: the `text` of every line, joined by blank lines
- `news`: articles that ship in a PyPI package (`news.py`)
- `wikitext2`, `c4`: from the hub, when online and the `hub` extra is installed
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from subnibble.calibrate import news
from subnibble.errors import CalibrationError, MissingExtra
from subnibble.paths import expanded, is_file

_C4_DOCUMENTS = 8_000
# Of what is no file's name, in an error.
_SHOWN = 80


def read_text(name: str, split: str) -> str:
    """The text of a file or of a named set. split: "calibration" or "test"; files have no splits."""
    if name in NAMED:
        return NAMED[name](split)
    if not is_file(name):
        shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
        raise CalibrationError(
            f"{shown}: no such text file, and no named set (those are {', '.join(NAMED)}); pass a .txt or .jsonl file"
        )
    path = expanded(name)
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read ({error.strerror}); give a text file that can") from error
    return _join_jsonl(content, path) if path.suffix == ".jsonl" else content


def _join_jsonl(content: str, path: Path) -> str:
    texts = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CalibrationError(f'{path}, line {number}: expected an object with "text" ({error!r})') from error
        if not isinstance(text, str):
            raise CalibrationError(f"{path}, line {number}: text is {type(text).__name__}, not a string")
        texts.append(text)
    return "\n\n".join(texts)


def _news(split: str) -> str:
    return news.calibration_text() if split == "calibration" else news.test_text()


def _wikitext2(split: str) -> str:
    part = "train" if split == "calibration" else "test"
    rows = _hub_rows("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split=part)
    return "\n\n".join(row["text"] for row in rows)


def _c4(split: str) -> str:
    part, file = ("train", "c4-train.00000-of-01024") if split == "calibration" else (
        "validation", "c4-validation.00000-of-00008"
    )  # fmt: skip
    rows = _hub_rows("c4", "allenai/c4", data_files={part: f"en/{file}.json.gz"}, split=part, streaming=True)
    return "\n\n".join(row["text"] for row in islice(rows, _C4_DOCUMENTS))


def _hub_rows(name: str, *source: str, **arguments: Any) -> Iterator[dict[str, str]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtra(
            f"text set {name!r} comes from the hub through the datasets package: pip install 'subnibble[hub]', "
            "or pass a text file (--calibration FILE, --text FILE)"
        ) from error
    try:
        yield from load_dataset(*source, **arguments)
    # datasets raises a wide family of its own and of its HTTP libraries; all mean that the set cannot be had.
    except Exception as error:
        raise CalibrationError(
            f"text set {name!r} could not be fetched from the hub ({type(error).__name__}); "
            "go online, or pass a text file (--calibration FILE, --text FILE)"
        ) from error


NAMED: dict[str, Callable[[str], str]] = {"c4": _c4, "wikitext2": _wikitext2, "news": _news}

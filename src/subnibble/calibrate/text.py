"""Text by file or by name: what calibration and evaluation read.

- a `.jsonl` file: the `text` of every line, joined by blank lines; a `.json` file: the same, or a list of such objects
- any other text file, whatever its name ends in: its content (`text_file.py` says in which encodings)
- `news`: articles that ship in a PyPI package (`packaged/news.py`)
- `wikitext2`, `c4`: from the hub, when online and the `hub` extra is installed
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from subnibble.errors import CalibrationError, MissingExtra
from subnibble.packaged import news
from subnibble.paths import absolute_path, expanded, is_file
from subnibble.text_file import check_characters, read_text_file

_C4_DOCUMENTS = 8_000
_LINES = (".jsonl", ".ndjson", ".jsonlines")
_TABLES = (".csv", ".tsv")
# Of what is no file's name, in an error.
_SHOWN = 80


def read_text(name: str, split: str) -> str:
    """The text of a file or of a named set. split: "calibration" or "test"; files have no splits."""
    if name in NAMED:
        return NAMED[name](split)
    if not is_file(name):
        shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
        raise CalibrationError(
            f"{shown}: no such text file{_instead(name)}, and no named set (those are {', '.join(NAMED)}); pass a .txt "
            "or .jsonl file"
        )
    path = expanded(name)
    suffix = path.suffix.lower()
    if suffix in _TABLES:
        raise CalibrationError(f'{path} is a table, no text; write its texts as JSON lines, {{"text": ...}} each')
    content = read_text_file(path, CalibrationError)
    if suffix in _LINES:
        return "\n\n".join(_texts_of_lines(content, path))
    return "\n\n".join(_texts_of_json(content, path)) if suffix == ".json" else content


def _instead(name: str) -> str:
    """What has the name of a file that is none."""
    try:
        path = expanded(name)
        if name and path.is_dir():
            return " (that is a folder)"
        return " (that is a pipe or device; write it to a file)" if name and path.exists() else ""
    except (OSError, ValueError):
        return ""


def _texts_of_lines(content: str, path: Path) -> list[str]:
    """The `text` of every line that is not blank."""
    texts = []
    for number, line in enumerate(content.split("\n"), start=1):
        where = f"{path}, line {number}"
        # Of files that were put one after another, each may have its byte order mark.
        line = line.removeprefix("\ufeff")
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f'{where}: expected an object with "text" ({error})') from error
        texts.append(_text_of(item, where))
    return texts


def _texts_of_json(content: str, path: Path) -> list[str]:
    """The `text` of every object in a list, or of the one object; a file of JSON lines may have this name, too."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return _texts_of_lines(content, path)
    items = found if isinstance(found, list) else [found]
    return [_text_of(item, f"{path}, item {number}") for number, item in enumerate(items, start=1)]


def _text_of(item: Any, where: str) -> str:
    if not isinstance(item, dict) or "text" not in item:
        there = f"the keys {', '.join(item)}" if isinstance(item, dict) else type(item).__name__
        raise CalibrationError(f'{where}: expected an object with "text", found {there}')
    text = item["text"]
    if not isinstance(text, str):
        raise CalibrationError(f"{where}: text is {type(text).__name__}, not a string")
    check_characters(text, f"{where}, text", CalibrationError)
    return text


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


def absolute_text(name: str) -> str:
    """A text's full path, so that the recipe means the same from any folder; the name of a known set as it is."""
    return absolute_path(name, NAMED)

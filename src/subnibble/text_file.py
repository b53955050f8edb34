"""Read the text and JSON files that a user names or that belong to a model.

Accepted: UTF-8 with or without a byte order mark (BOM); UTF-16 and UTF-32 with a BOM. Line ends become newlines.
Refused, with file, place and remedy: other encodings, binary and compressed files, NUL characters, damaged JSON.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from subnibble.arguments import described
from subnibble.errors import BadArgument, CheckpointError, SubnibbleError

# UTF-32 before UTF-16: the UTF-32-LE mark begins with the UTF-16-LE mark.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_UNPACK = "unpack it first"
# Files that are not text: first bytes, kind, remedy.
_OTHER_KINDS = (
    (b"\x1f\x8b", "gzip-compressed", _UNPACK),
    (b"PK\x03\x04", "a zip archive", _UNPACK),
    (b"BZh", "bzip2-compressed", _UNPACK),
    (b"\xfd7zXZ\x00", "xz-compressed", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", _UNPACK),
    (b"PAR1", "a Parquet table", 'write its texts as JSON lines, {"text": ...} each'),
    (b"ARROW1", "an Arrow table", 'write its texts as JSON lines, {"text": ...} each'),
    (b"\x93NUMPY", "a NumPy array", "let its name end in .npy if it holds token ids"),
    (b"%PDF-", "a PDF document", "save its text as a .txt file"),
)
_GIT_LFS = "version https://git-lfs.github.com/spec/"


def read_text_file(path: Path, error: type[SubnibbleError]) -> str:
    """Read a text file, without its byte order mark and with newlines as line ends.

    path: the file.
    error: type of the error that is raised if the file cannot be read or is not text; it has place and remedy.
    """
    content = _read_bytes(path, error)
    mark, encoding = next(((mark, name) for mark, name in _MARKS if content.startswith(mark)), (b"", "utf-8"))
    if not mark:
        _check_kind(content, path, error)
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as fault:
        line = content.count(b"\n", 0, len(mark) + fault.start) + 1
        raise error(
            f"{path} is not {encoding.upper()} text ({fault.reason} at byte {len(mark) + fault.start}, line {line}); "
            "save it as UTF-8"
        ) from fault
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise error(
            f"{path} holds a NUL character in line {line}; if it is UTF-16 text without a byte order mark, save it as "
            "UTF-8, else give a text file"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json_file(path: Path, again: str = "fetch it again") -> Any:
    """Read a JSON file of a model; `CheckpointError`, with place and remedy, if that fails.

    again: how to get an intact copy, for the error.
    """
    return _parsed(read_text_file(path, CheckpointError), path, again)


def check_plain_utf8(path: Path) -> None:
    """Raise `CheckpointError` unless the file is UTF-8 without a byte order mark, the only form that other libraries
    read.
    """
    read_text_file(path, CheckpointError)
    if any(_read_bytes(path, CheckpointError).startswith(mark) for mark, _ in _MARKS):
        raise CheckpointError(
            f"{path} begins with a byte order mark, which transformers does not read there; save it as UTF-8 without "
            "the mark"
        )


def read_plain_json_file(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file that transformers reads, too: UTF-8 without a byte order mark.

    Raises `CheckpointError` for any other encoding and any other JSON value.
    """
    check_plain_utf8(path)
    content = read_json_file(path)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds {_kind_of(content)} instead of a JSON object; is it another file with this name?"
        )
    return content


def check_characters(text: str, where: str, error: type[SubnibbleError]) -> None:
    """Raise `error` if `text` holds half of a surrogate pair, which is no character and cannot be tokenized.

    where: what the text is, for the error.
    Raises `BadArgument` if `text` is not a string.
    """
    if not isinstance(text, str):
        raise BadArgument(f"{where} is {described(text)}; give text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as fault:
        raise error(
            f"{where}: character {fault.start + 1} is {ascii(text[fault.start])[1:-1]}, half of a surrogate pair "
            "(from text cut in the middle, or bytes that are not UTF-8); remove it or write U+FFFD in its place"
        ) from fault


def _read_bytes(path: Path, error: type[SubnibbleError]) -> bytes:
    try:
        return path.read_bytes()
    except OSError as fault:
        raise error(f"{path} cannot be read ({fault.strerror}); give a readable text file") from fault


def _check_kind(content: bytes, path: Path, error: type[SubnibbleError]) -> None:
    for start, kind, remedy in _OTHER_KINDS:
        if content.startswith(start):
            raise error(f"{path} is {kind}, not text; {remedy}")


def _parsed(text: str, path: Path, again: str) -> Any:
    if not text.strip():
        raise CheckpointError(f"{path} is empty; {again}")
    if text.startswith(_GIT_LFS):
        raise CheckpointError(f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder")
    if text.lstrip().startswith("<"):
        raise CheckpointError(f"{path} is a web page, not JSON; {again}")
    try:
        return json.loads(text)
    except json.JSONDecodeError as fault:
        ends_early = not text[fault.pos :].strip()
        place = f"line {fault.lineno}, column {fault.colno}: {fault.msg}"
        remedy = f"it ends too early: {again}" if ends_early else f"fix it there, or {again}"
        raise CheckpointError(f"{path} cannot be read as JSON ({place}); {remedy}") from fault
    # Numbers with thousands of digits, or thousands of nested brackets.
    except (ValueError, RecursionError) as fault:
        raise CheckpointError(f"{path} cannot be read as JSON ({fault}); fix it, or {again}") from fault


def _kind_of(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")

"""Read text and JSON that a user names or that lies beside a model: one decoder, and one set of refusals.

Read: UTF-8, with or without a byte order mark, and UTF-16 and UTF-32 that begin with one. Line ends become newlines.
Refused, with file, place and remedy: other encodings, binary and packed files, NUL characters, damaged JSON.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from subnibble.errors import BadArgument, CheckpointError, SubnibbleError
from subnibble.given import described

# UTF-32 first: its mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_UNPACK = "unpack it first"
# How files begin that hold something else than text: what they are, and what to do.
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
    """The text of a file without its byte order mark, line ends as newlines; else an `error` with place and remedy."""
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
    """What a JSON file beside a model holds; `CheckpointError` with place and remedy. again: how to get it whole."""
    return _parsed(read_text_file(path, CheckpointError), path, again)


def check_plain_utf8(path: Path) -> None:
    """Raise `CheckpointError` for a text file that other libraries, which take plain UTF-8 alone, would not read."""
    read_text_file(path, CheckpointError)
    if any(_read_bytes(path, CheckpointError).startswith(mark) for mark, _ in _MARKS):
        raise CheckpointError(
            f"{path} begins with a byte order mark, which transformers does not read there; save it as UTF-8 without "
            "the mark"
        )


def read_plain_json_file(path: Path) -> dict[str, Any]:
    """As `read_json_file`, for files that transformers reads, too: an object, in UTF-8 without a byte order mark."""
    check_plain_utf8(path)
    found = read_json_file(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object but {_kind_of(found)}; is it another file by this name?")
    return found


def check_characters(text: str, where: str, error: type[SubnibbleError]) -> None:
    """Raise `error` for a text with half of a surrogate pair, which is no character and has no tokens; `BadArgument`
    for what is no text.
    """
    if not isinstance(text, str):
        raise BadArgument(f"{where} is {described(text)}; give text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as fault:
        raise error(
            f"{where}: character {fault.start + 1} is {ascii(text[fault.start])[1:-1]}, half of a surrogate pair "
            "(something cut in two, or bytes that are not UTF-8); remove it or write U+FFFD in its place"
        ) from fault


def _read_bytes(path: Path, error: type[SubnibbleError]) -> bytes:
    try:
        return path.read_bytes()
    except OSError as fault:
        raise error(f"{path} cannot be read ({fault.strerror}); give a text file that can") from fault


def _check_kind(content: bytes, path: Path, error: type[SubnibbleError]) -> None:
    for start, kind, remedy in _OTHER_KINDS:
        if content.startswith(start):
            raise error(f"{path} is {kind}, no text; {remedy}")


def _parsed(text: str, path: Path, again: str) -> Any:
    if not text.strip():
        raise CheckpointError(f"{path} is empty; {again}")
    if text.startswith(_GIT_LFS):
        raise CheckpointError(f"{path} is a pointer of Git LFS and not the file itself; run `git lfs pull` there")
    if text.lstrip().startswith("<"):
        raise CheckpointError(f"{path} is a web page and no JSON; {again}")
    try:
        return json.loads(text)
    except json.JSONDecodeError as fault:
        whole = bool(text[fault.pos :].strip())
        place = f"line {fault.lineno}, column {fault.colno}: {fault.msg}"
        remedy = f"mend it there, or {again}" if whole else f"it ends too early: {again}"
        raise CheckpointError(f"{path} cannot be read as JSON ({place}); {remedy}") from fault
    # Numbers of thousands of digits, and thousands of brackets.
    except (ValueError, RecursionError) as fault:
        raise CheckpointError(f"{path} cannot be read as JSON ({fault}); mend it, or {again}") from fault


def _kind_of(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")

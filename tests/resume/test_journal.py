"""A journal comes back as it was written, or is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from subnibble.errors import BadJournal
from subnibble.resume import journal as journal_module
from subnibble.resume.journal import JOURNAL, Journal

TENSORS = [
    torch.arange(6).view(2, 3), torch.tensor(1.5, dtype=torch.bfloat16), torch.zeros(0, 4), torch.ones(3, 2).T,
]  # fmt: skip
VALUES = {"number": 0.1 + 0.2, "nan": float("nan"), "text": "ä\n", "list": [1, None, True], "table": {"b": 1, "a": 2}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    journal = Journal(tmp_path, "quantize", {"recipe": {"bits": 3}})
    journal.record({"first": VALUES, "second": {}}, TENSORS)
    return tmp_path


def read(folder: Path) -> Journal:
    journal = Journal.read(folder)
    assert journal is not None
    return journal


def test_a_journal_comes_back_as_it_was_written(folder: Path) -> None:
    journal = read(folder)
    assert (journal.command, journal.fingerprint) == ("quantize", {"recipe": {"bits": 3}})
    assert list(journal.steps) == ["first", "second"]
    assert journal.last == "second"
    assert json.dumps(journal.value("first")) == json.dumps(VALUES)
    assert journal.tensors("first") == []
    for tensor, target in zip(journal.tensors("second"), TENSORS, strict=True):
        assert tensor.dtype == target.dtype
        assert torch.equal(tensor, target)


def test_a_folder_without_a_journal_has_none(tmp_path: Path) -> None:
    assert Journal.read(tmp_path) is None


def test_a_replaced_step_is_the_last_one_and_its_old_tensors_go(folder: Path) -> None:
    journal = read(folder)
    (before,) = folder.glob("*.tensors")
    journal.record({"first": 2}, TENSORS[:1], forget=["second"])
    (after,) = folder.glob("*.tensors")
    assert before != after
    again = read(folder)
    assert list(again.steps) == ["second", "first"]
    assert (again.tensors("second"), again.value("second")) == ([], {})
    again.amend("first", 3)
    assert torch.equal(read(folder).tensors("first")[0], TENSORS[0])
    assert read(folder).value("first") == 3


def test_the_old_tensors_stay_until_the_journal_names_the_new_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("disk gone")

    journal = read(folder)
    monkeypatch.setattr(journal_module, "write_file", fail)
    with pytest.raises(OSError, match="disk gone"):
        journal.record({"second": 2}, TENSORS[:1])
    monkeypatch.undo()
    again = read(folder)
    assert again.value("second") == {}
    assert torch.equal(again.tensors("second")[0], TENSORS[0])
    assert len(list(folder.glob("*.tensors"))) == 2
    again.tidy()
    assert len(list(folder.glob("*.tensors"))) == 1


def edited(text: bytes, old: bytes, new: bytes) -> bytes:
    assert text.count(old) == 1
    return text.replace(old, new)


DAMAGES = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: b"",
    "no JSON": lambda text: b"x" + text,
    "a list": lambda text: b"[]",
    "a number changed": lambda text: edited(text, b'"bits": 3', b'"bits": 4'),
    "a step missing": lambda text: edited(text, b'"second"', b'"third"'),
    "no content": lambda text: b'{"journal": 1}',
    "no UTF-8": lambda text: edited(text, b"quantize", b"quant\xff"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_journal_is_refused_by_name(folder: Path, damage: str) -> None:
    path = folder / JOURNAL
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(BadJournal, match=r"journal\.json is damaged .*--resume never"):
        Journal.read(folder)


@pytest.mark.parametrize("version", ["0", "2", '"1"', "null"])
def test_a_journal_of_another_version_is_refused_by_name(folder: Path, version: str) -> None:
    path = folder / JOURNAL
    path.write_text(path.read_text().replace('"journal": 1', f'"journal": {version}'))
    with pytest.raises(BadJournal, match=r"journal\.json is a journal of version .* reads version 1"):
        Journal.read(folder)


@pytest.mark.parametrize("damage", ["missing", "shorter", "longer", "one bit"])
def test_damaged_tensors_are_refused_by_name(folder: Path, damage: str) -> None:
    (path,) = folder.glob("*.tensors")
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[5] ^= damage == "one bit"
        path.write_bytes(content[:-1] if damage == "shorter" else content + b"x" * (damage == "longer"))
    with pytest.raises(BadJournal, match=rf"{path.name} is damaged .*--resume never"):
        read(folder).tensors("second")

"""A GGUF model in several files is read whole, or the part that is missing is named."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from conftest import random_model
from gguf_files import Extra, write_gguf
from subnibble.checkpoint.opening import open_source
from subnibble.errors import CheckpointError
from subnibble.hf import load_model

TENSORS = 3 + 3 * 16


def split(number: int, count: int = 2, tensors: int = TENSORS) -> Extra:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", tensors)

    return add


def in_first(key: str) -> bool:
    return key == "model.embed_tokens.weight" or ".0." in key


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    files = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    write_gguf(files[0], "llama", "llama", split(0), only=in_first)
    write_gguf(files[1], "llama", "llama", split(1), only=lambda key: not in_first(key))
    return files


@pytest.mark.parametrize("index", [0, 1])
def test_all_parts_are_read_whichever_is_given(index: int, parts: list[Path]) -> None:
    source = open_source(parts[index])
    assert source.path == parts[0]
    assert source.file_bytes() == sum(part.stat().st_size for part in parts)
    read = load_model(source, "float32", "cpu")
    for key, parameter in random_model("llama").named_parameters():
        assert torch.equal(read.get_parameter(key), parameter), key


@pytest.mark.parametrize("missing", [0, 1])
def test_a_part_that_is_missing_is_named(missing: int, parts: list[Path]) -> None:
    parts[missing].unlink()
    with pytest.raises(
        CheckpointError, match=f"split into 2 files, and {parts[missing].name} .* is missing; fetch all"
    ):
        open_source(parts[1 - missing])


def test_a_part_under_another_name_is_told(parts: list[Path]) -> None:
    renamed = parts[0].rename(parts[0].with_name("model.gguf"))
    with pytest.raises(CheckpointError, match=r"say that it is part 1 of 2 .* names that llama-gguf-split gives"):
        open_source(renamed)


def test_parts_in_the_wrong_order_are_told(parts: list[Path]) -> None:
    aside = parts[0].rename(parts[0].with_name("aside"))
    parts[1].rename(parts[0])
    aside.rename(parts[1])
    with pytest.raises(CheckpointError, match=r"00001-of-00002\.gguf: its metadata say that it is part 2 of 2"):
        open_source(parts[0])


def test_parts_of_two_models_are_told(parts: list[Path]) -> None:
    write_gguf(parts[1], "llama", "llama", split(1), only=lambda key: key == "lm_head.weight")
    with pytest.raises(CheckpointError, match=rf"its 2 parts hold \d+ of {TENSORS} tensors"):
        open_source(parts[0])


def test_a_file_that_only_looks_like_the_one_part_of_one_is_read(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m-00001-of-00001.gguf", "llama", "llama")
    assert len(open_source(tmp_path / "m-00001-of-00001.gguf").names()) == TENSORS

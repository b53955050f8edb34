from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from subnibble.calibrate.windows import calibration_windows, cut_windows, evaluation_windows, tokenize
from subnibble.errors import CalibrationError

VOCABULARY = 1000


class LetterTokenizer:
    """One token a character; BOS unless special tokens are off."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, Any]:
        ids = [ord(letter) for letter in text]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


def no_tokenizer() -> Any:
    raise AssertionError("token files need no tokenizer")


def drawn(path: Path | str, count: int, length: int, seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    return calibration_windows(str(path), no_tokenizer, count, length, seed, vocabulary)


@pytest.fixture
def counted(tmp_path: Path) -> Path:
    """Tokens 0, 1, 2, ... 202, so that a window tells where it was cut."""
    path = tmp_path / "counted.npy"
    np.save(path, np.arange(203, dtype=np.int32))
    return path


def test_windows_do_not_overlap_and_are_consecutive_tokens(counted: Path) -> None:
    windows = drawn(counted, 20, 10)
    assert windows.shape == (20, 10)
    assert windows.dtype == torch.int64
    assert len(set(windows.flatten().tolist())) == 200
    assert bool((windows.diff(dim=1) == 1).all())
    assert int(windows.max()) < 200


def test_seed_alone_determines_the_windows(counted: Path) -> None:
    before = torch.random.get_rng_state()
    first = drawn(counted, 7, 10, seed=3)
    torch.manual_seed(99)
    second = drawn(counted, 7, 10, seed=3)
    torch.random.set_rng_state(before)
    assert torch.equal(first, second)
    assert not torch.equal(first, drawn(counted, 7, 10, seed=4))
    drawn(counted, 7, 10)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_fewer_windows_are_a_prefix_of_more(counted: Path) -> None:
    assert torch.equal(drawn(counted, 5, 10, seed=8), drawn(counted, 20, 10, seed=8)[:5])


def test_windows_are_not_drawn_from_the_beginning_alone(counted: Path) -> None:
    starts = drawn(counted, 20, 10)[:, 0].tolist()
    assert sorted(starts) == list(range(0, 200, 10))
    assert starts != sorted(starts)


def test_text_is_tokenized_in_one_piece_without_special_tokens(tmp_path: Path) -> None:
    path = tmp_path / "letters.txt"
    path.write_text("abcdefghijk", encoding="utf-8")
    windows = calibration_windows(str(path), LetterTokenizer, 2, 5, 0, VOCABULARY)
    assert sorted(windows.tolist()) == [[ord(c) for c in "abcde"], [ord(c) for c in "fghij"]]
    assert torch.equal(tokenize(LetterTokenizer(), "ab"), torch.tensor([97, 98]))


def test_evaluation_windows_are_the_whole_text_in_order(tmp_path: Path) -> None:
    path = tmp_path / "letters.txt"
    path.write_text("abcdefghijk", encoding="utf-8")
    windows = evaluation_windows(str(path), LetterTokenizer(), 3, None)
    assert windows.tolist() == [[ord(c) for c in part] for part in ("abc", "def", "ghi")]
    assert torch.equal(evaluation_windows(str(path), LetterTokenizer(), 3, 2), windows[:2])
    assert torch.equal(evaluation_windows(str(path), LetterTokenizer(), 3, 99), windows)


def test_too_few_windows_says_how_many_there_are(counted: Path) -> None:
    with pytest.raises(CalibrationError, match=r"20 windows of 10 tokens, but 21 are asked for.*--num-windows 20"):
        drawn(counted, 21, 10)


def test_too_short_text_says_what_to_do(counted: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"203 tokens, less than one window of 204.*shorter --window"):
        drawn(counted, 1, 204)
    with pytest.raises(CalibrationError, match="story holds 3 tokens"):
        cut_windows(torch.arange(3), 4, "story")
    empty = tmp_path / "empty.txt"
    empty.write_text("", encoding="utf-8")
    with pytest.raises(CalibrationError, match="0 tokens"):
        evaluation_windows(str(empty), LetterTokenizer(), 4, None)


def test_two_dimensional_tokens_are_windows_cut_to_length(tmp_path: Path) -> None:
    path = tmp_path / "windows.npy"
    tokens = np.arange(60, dtype=np.uint16).reshape(6, 10)
    np.save(path, tokens)
    windows = drawn(path, 6, 7)
    assert sorted(windows.tolist()) == tokens[:, :7].tolist()
    with pytest.raises(CalibrationError, match=r"hold 10 tokens; lower --window from 11"):
        drawn(path, 1, 11)
    with pytest.raises(CalibrationError, match="--num-windows 6"):
        drawn(path, 7, 10)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_token_file_is_known_by_its_suffix_in_any_case(suffix: str, counted: Path, tmp_path: Path) -> None:
    path = tmp_path / f"tokens{suffix.upper()}"
    if suffix == ".npy":
        path.write_bytes(counted.read_bytes())
    else:
        save_file({"ids": torch.arange(203)}, path)
    assert torch.equal(drawn(path, 20, 10), drawn(counted, 20, 10))


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint16", "uint8", ">i4"])
def test_every_whole_number_type_of_npy_gives_the_same_windows(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "tokens.npy"
    np.save(path, np.arange(200).astype(dtype))
    assert torch.equal(drawn(path, 20, 10), drawn_from(torch.arange(200), 20, 10, tmp_path))


def drawn_from(tokens: Tensor, count: int, length: int, folder: Path) -> Tensor:
    path = folder / "tokens.safetensors"
    save_file({"anything": tokens}, path)
    return drawn(path, count, length)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_safetensors_holds_tokens_like_npy(tmp_path: Path, counted: Path, dtype: torch.dtype) -> None:
    result = drawn_from(torch.arange(203).to(dtype), 20, 10, tmp_path)
    assert result.dtype == torch.int64
    assert torch.equal(result, drawn(counted, 20, 10))


@pytest.mark.parametrize(
    "tokens",
    [
        np.arange(40.0),
        np.arange(40).astype(np.float16),
        np.array([{"a": 1}] * 40, dtype=object),
        np.arange(60).reshape(3, 4, 5),
        np.array(7),
        np.array(["1"] * 40),
    ],
    ids=["float", "half", "pickled", "3-D", "0-D", "text"],
)
def test_unfit_npy_is_refused_by_name(tmp_path: Path, tokens: Any) -> None:
    path = tmp_path / "unfit.npy"
    np.save(path, tokens, allow_pickle=True)
    with pytest.raises(CalibrationError, match=re.escape(str(path))):
        drawn(path, 1, 2)


class Creates:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_reading_a_token_file_runs_nothing_that_is_pickled_in_it(tmp_path: Path) -> None:
    np.save(tmp_path / "trap.npy", np.array([Creates(tmp_path / "sprung")] * 40, dtype=object))
    with pytest.raises(CalibrationError):
        drawn(tmp_path / "trap.npy", 1, 2)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": torch.arange(40.0)},
        {"a": torch.arange(40).bfloat16()},
        {"a": torch.arange(40), "b": torch.arange(40)},
        {"a": torch.arange(60).view(3, 4, 5)},
    ],
    ids=["float", "bfloat16", "two tensors", "3-D"],
)
def test_unfit_safetensors_is_refused_by_name(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = tmp_path / "unfit.safetensors"
    save_file(tensors, path)
    with pytest.raises(CalibrationError, match=re.escape(str(path))):
        drawn(path, 1, 2)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_damaged_or_missing_token_file_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"damaged{suffix}"
    with pytest.raises(CalibrationError, match="no such token file"):
        drawn(path, 1, 2)
    path.write_bytes(b"\x93NUMPY and then nothing of use")
    with pytest.raises(CalibrationError, match=re.escape(str(path))):
        drawn(path, 1, 2)
    path.write_bytes(b"")
    with pytest.raises(CalibrationError, match=re.escape(str(path))):
        drawn(path, 1, 2)


@pytest.mark.parametrize("bad", [-1, VOCABULARY, 2**40])
def test_tokens_outside_the_vocabulary_say_which(tmp_path: Path, bad: int) -> None:
    tokens = np.arange(40, dtype=np.int64)
    tokens[17] = bad
    path = tmp_path / "strange.npy"
    np.save(path, tokens)
    with pytest.raises(CalibrationError, match=f"{bad}.*knows 0 to 999.*another tokenizer"):
        drawn(path, 1, 2)
    tokens[17] = VOCABULARY - 1
    np.save(path, tokens)
    assert drawn(path, 20, 2).shape == (20, 2)

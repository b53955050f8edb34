"""A text is tokenized once a process, and its ids are the tokenizer's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from subnibble.calibrate import kept_ids
from subnibble.calibrate.tokens import text_ids
from subnibble.calibrate.windows import tokenize
from subnibble.errors import CalibrationError


class Counting(PreTrainedTokenizerFast):
    """Counts its calls."""

    calls = 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        Counting.calls += 1
        return super().__call__(*arguments, **named)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Counting, "calls", 0)
    kept_ids._kept.clear()
    yield
    kept_ids._kept.clear()


def words(order: str = "abc", split: Any = pre_tokenizers.WhitespaceSplit) -> Counting:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*order, "<unk>"])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split()
    return Counting(tokenizer_object=tokenizer, unk_token="<unk>")


def test_a_text_is_tokenized_once_even_by_an_equal_tokenizer() -> None:
    first, again, other_object = (tokenize(tokenizer, "a b c") for tokenizer in [words()] * 2 + [words()])
    assert first.tolist() == again.tolist() == other_object.tolist() == [0, 1, 2]
    assert first.dtype == torch.int64
    assert Counting.calls == 1


def test_what_is_kept_is_not_what_callers_get() -> None:
    tokenize(words(), "a b c").zero_()
    assert tokenize(words(), "a b c").tolist() == [0, 1, 2]


@pytest.mark.parametrize("text", ["a b-c", "a <x> b", "c c", "", "a\n\nb"])
def test_every_tokenizer_and_text_has_its_own_ids(text: str) -> None:
    added, renamed = words(), words()
    added.add_tokens(["<x>"])
    renamed.add_tokens(["<y>"])
    for tokenizer in (words(), words("cab"), words(split=pre_tokenizers.Punctuation), added, renamed):
        for of_text in (text, f"{text} a", text):
            assert tokenize(tokenizer, of_text).tolist() == text_ids(tokenizer, of_text, "the text")


def test_only_the_last_texts_are_kept() -> None:
    for text in ("a", "b", "c", "a b", "a", "b c"):
        tokenize(words(), text)
    assert Counting.calls == 5
    # "b" was used least recently.
    tokenize(words(), "a")
    assert Counting.calls == 5
    tokenize(words(), "b")
    assert Counting.calls == 6


def test_a_tokenizer_in_python_is_asked_each_time() -> None:
    class Letters:
        offset = 0

        def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, Any]:
            return {"input_ids": [ord(letter) + self.offset for letter in text]}

    tokenizer = Letters()
    assert tokenize(tokenizer, "ab").tolist() == [97, 98]
    tokenizer.offset = 1
    assert tokenize(tokenizer, "ab").tolist() == [98, 99]


def test_half_a_surrogate_pair_is_refused_as_before() -> None:
    with pytest.raises(CalibrationError, match="half of a surrogate pair"):
        tokenize(words(), "a\ud83d")

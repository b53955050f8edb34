"""Ids of a text are the tokenizer's, whatever else it gives; what has no tokens is refused before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from subnibble.calibrate.tokens import bos_token, check_vocabulary, prompt_ids, text_ids
from subnibble.errors import CalibrationError


class Wordy:
    """One id a letter, BOS in front, and keys of which a model knows nothing."""

    bos_token, bos_token_id = "<s>", 1

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, Any]:
        begun = [1] if text.startswith("<s>") else []
        ids = [*begun, *(ord(letter) for letter in text.removeprefix("<s>"))]
        ids = [1, *ids] if add_special_tokens else ids
        return {"input_ids": ids, "token_type_ids": [0] * len(ids), "offset_mapping": [(0, 1)] * len(ids)}


class Nested(Wordy):
    """Gives a batch, as some tokenizers do."""

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, Any]:
        return {"input_ids": [super().__call__(text)["input_ids"]]}


def test_ids_are_taken_and_other_keys_left() -> None:
    assert text_ids(Wordy(), "ab", "the text") == [97, 98]
    assert prompt_ids(Wordy(), "ab", "the prompt") == [1, 97, 98]
    assert bos_token(Wordy()) == 1


def test_bos_that_a_template_put_there_is_not_put_there_again() -> None:
    assert prompt_ids(Wordy(), "<s>ab", "the prompt") == [1, 97, 98]


@pytest.mark.parametrize("text", ["a\ud83d", "\udcfcber"])
def test_half_a_surrogate_pair_never_reaches_a_tokenizer(text: str) -> None:
    for ids in (text_ids, prompt_ids):
        with pytest.raises(CalibrationError, match=r"^news: character \d is \\ud.*half of a surrogate pair"):
            ids(Wordy(), text, "news")


def test_a_batch_of_ids_is_refused() -> None:
    with pytest.raises(CalibrationError, match="the text: the tokenizer gave no plain list of ids"):
        text_ids(Nested(), "ab", "the text")


def test_ids_beyond_the_models_table_say_what_may_have_made_them() -> None:
    check_vocabulary(torch.tensor([0, 9]), 10, "the text")
    with pytest.raises(
        CalibrationError, match=r"the text: token ids run from 0 to 10, the model knows 0 to 9; .*added"
    ):
        check_vocabulary(torch.tensor([0, 10]), 10, "the text")

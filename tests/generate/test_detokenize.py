"""Pieces of text while tokens come: together the whole text, and no character in halves."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from subnibble.generate.detokenize import Detokenizer, decode

TEXT = "Grüße, 日本語 und 👩‍🚀! ça va?\n  two  spaces"


def of_bytes() -> Any:
    """A token a byte, as GPT-2 and Qwen write them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def of_words() -> Any:
    """Words with a space before them, and bytes for what is no word, as in Llama 2; the first space is dropped."""
    words = ["\u2581two", "\u2581spaces", "\u2581", "\u2581va", "?"]
    names = [*words, *(f"<0x{byte:02X}>" for byte in range(256)), "<unk>"]
    tokenizer = Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    fast.add_special_tokens({"eos_token": "<end>"})
    return fast


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(token) for token in ids]


def byte_ids(tokenizer: Any, text: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]


def test_bytes_become_text_as_soon_as_a_character_is_whole() -> None:
    tokenizer = of_bytes()
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) == len(TEXT.encode())
    parts = pieces(tokenizer, ids)
    assert [part for part in parts if part] == list(TEXT)
    # The test can fail: token by token most of these characters are lost.
    assert "\ufffd" in "".join(decode(tokenizer, [token]) for token in ids)


def test_spaces_between_words_stay_and_the_first_one_goes_as_in_the_whole_text() -> None:
    tokenizer = of_words()
    two, spaces, gap, va, mark = range(5)
    end = tokenizer.eos_token_id
    ids = [two, spaces, *byte_ids(tokenizer, "日é"), gap, va, end, mark, end, two, *byte_ids(tokenizer, "👩x")]
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == decode(tokenizer, ids) == "two spaces日é  va? two👩x"
    assert parts[:2] == ["two", " spaces"]
    assert "\ufffd" not in "".join(parts)


@pytest.mark.parametrize("make", [of_bytes, of_words])
def test_any_bytes_give_the_text_of_all_tokens(make: Any) -> None:
    tokenizer, rng = make(), random.Random(0)
    for _ in range(150):
        ids = [rng.randrange(256) for _ in range(rng.randrange(12))]
        if make is of_words:
            ids = [5 + token if rng.random() < 0.7 else token % 5 for token in ids]
        whole, parts = decode(tokenizer, ids), pieces(tokenizer, ids)
        text = "".join(parts)
        if make is of_bytes:
            assert text == whole.rstrip("\ufffd")
        # Where bytes that are no UTF-8 change earlier characters, those are out already.
        elif "\ufffd" not in whole:
            assert text == whole


def test_half_a_character_at_the_end_is_dropped() -> None:
    tokenizer = of_bytes()
    ids = tokenizer("a日")["input_ids"]
    assert pieces(tokenizer, ids[:-1]) == ["a", "", ""]


def test_bytes_that_are_no_text_do_not_hold_back_what_follows() -> None:
    tokenizer = of_words()
    broken = tokenizer.convert_tokens_to_ids("<0xFF>")
    parts = pieces(tokenizer, [*byte_ids(tokenizer, "é"), broken, 4, 0, 1])
    assert parts == ["", "é", "", "\ufffd?", " two", " spaces"]

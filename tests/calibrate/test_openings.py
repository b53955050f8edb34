"""What documents begin with, by tokenizer and chat template."""

from __future__ import annotations

from typing import Any

import pytest
from test_prompt import NO_SYSTEM, WITH_DEFAULT, WITHOUT_DEFAULT, WORDS, tokenizer

from subnibble.calibrate.openings import Opening, chosen_start, openings
from subnibble.calibrate.prompt import prefix_ids
from subnibble.calibrate.sampling import WindowSampling
from subnibble.calibrate.tokens import plain_tokens
from subnibble.errors import BadRecipe, CalibrationError

END = frozenset({WORDS.index("<e>")})


def ids(text: str) -> tuple[int, ...]:
    return tuple(WORDS.index(word) for word in text.split())


def opening(start: str, prefix: str | None = None, ends: frozenset[int] = END, **settings: Any) -> Opening:
    made = tokenizer(**settings)
    sampling = chosen_start(WindowSampling(start=start), made)
    before = None if prefix is None else prefix_ids(prefix, made)
    (kind,) = openings(sampling, made, len(WORDS), ends, before).kinds
    return kind


@pytest.mark.parametrize(
    ("template", "adds_bos", "start"),
    [
        (None, True, "bos"),
        (None, False, "vocabulary"),
        (WITH_DEFAULT, True, "bos+chat"),
        (WITH_DEFAULT, False, "vocabulary+chat"),
        # It writes nothing before a user's message.
        (NO_SYSTEM, False, "vocabulary"),
    ],
)
def test_auto_follows_tokenizer_and_template(template: str | None, adds_bos: bool, start: str) -> None:
    made = tokenizer(template, adds_bos)
    assert chosen_start(WindowSampling(), made).start == start
    assert chosen_start(WindowSampling(prompts=("be",)), made).start == "auto"
    chosen = WindowSampling(start="vocabulary", top_k=3)
    assert chosen_start(chosen, made) == chosen


def test_a_document_begins_with_bos_or_with_a_token_of_the_vocabulary() -> None:
    assert opening("bos", template=None) == Opening(ids("<s>"))
    assert opening("vocabulary", template=None) == Opening((), draws=True)
    assert opening("vocabulary", template=None, adds_bos=True) == Opening(ids("<s>"), draws=True)


def test_a_chat_begins_with_a_users_turn_and_goes_on_with_an_answer() -> None:
    # The tiny template writes "assistant", which is no word of the tiny tokenizer.
    unknown = ids("<unk>")
    assert opening("chat", template=WITHOUT_DEFAULT) == Opening(ids("user"), answer=ids("<e>") + unknown)
    assert opening("chat", template=WITH_DEFAULT) == Opening(ids("sys be kind <e> user"), answer=ids("<e>") + unknown)
    # The model does not end a text by <e>, so the template does not end a turn by an end of text.
    assert opening("chat", ends=frozenset(), template=WITHOUT_DEFAULT) == Opening(ids("user"))


def test_a_system_turn_before_the_windows_is_not_repeated_in_them() -> None:
    assert opening("chat", prefix="be short", template=WITH_DEFAULT).ids == ids("user")
    assert opening("chat", prefix="bos", template=WITH_DEFAULT).ids == ids("sys be kind <e> user")


def test_prompts_take_the_place_of_beginnings() -> None:
    made = tokenizer(None, adds_bos=True)
    kinds = openings(WindowSampling(prompts=("be kind", "hello")), made, len(WORDS), END, None).kinds
    assert kinds == (Opening(ids("<s> be kind")), Opening(ids("<s> hello")))


def test_special_tokens_are_not_drawn_as_first_ones() -> None:
    made = tokenizer(None)
    made.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    expected = [WORDS.index(word) for word in WORDS if word not in ("<s>", "<unk>")]
    assert plain_tokens(made, 100) == expected
    assert plain_tokens(made, 4) == [number for number in expected if number < 4]
    found = openings(WindowSampling(start="vocabulary"), made, 100, END, None)
    assert found.plain == tuple(expected)
    assert openings(WindowSampling(start="bos"), made, 100, END, None).plain == ()


def test_the_end_of_text_of_tokenizer_and_model_both_count() -> None:
    made = tokenizer(None)
    made.eos_token = "short"
    assert openings(WindowSampling(start="bos"), made, 100, END, None).ends == END | {*ids("short")}


def test_what_the_tokenizer_does_not_have_is_refused() -> None:
    with pytest.raises(BadRecipe, match='no BOS token; use start = "vocabulary"'):
        chosen_start(WindowSampling(start="bos"), tokenizer(None, bos=None))
    with pytest.raises(BadRecipe, match='no chat template; use start = "auto"'):
        chosen_start(WindowSampling(start="bos+chat"), tokenizer(None))
    with pytest.raises(BadRecipe, match="writes nothing before a user's message, or refuses it"):
        chosen_start(WindowSampling(start="chat"), tokenizer(NO_SYSTEM))
    several = tokenizer(None)
    several.chat_template = {"rag": WITH_DEFAULT}
    with pytest.raises(BadRecipe, match=r'none is the default.*or set sampling start = "vocabulary"'):
        chosen_start(WindowSampling(), several)


def test_ids_that_the_model_does_not_know_are_refused() -> None:
    with pytest.raises(CalibrationError, match="ids run up to 6, the model knows 0 to 3"):
        openings(WindowSampling(prompts=("short",)), tokenizer(None), 4, frozenset(), None)


def test_the_digest_shows_every_difference() -> None:
    made = tokenizer(WITH_DEFAULT, adds_bos=True)
    prefix = prefix_ids("be short", made)
    digests = {
        openings(WindowSampling(start=start), made, len(WORDS), ends, before).digest
        for start in ("bos", "vocabulary", "chat", "bos+chat", "chat+bos")
        for ends in (END, frozenset[int]())
        for before in (None, prefix)
    }
    assert len(digests) == 5 * 4
    assert openings(WindowSampling(start="bos"), made, len(WORDS) + 1, END, None).digest in digests
    assert openings(WindowSampling(start="vocabulary"), made, len(WORDS) - 2, END, None).digest not in digests

"""Tokens of a system prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from subnibble.calibrate.prompt import prefix_ids
from subnibble.errors import BadRecipe
from subnibble.generate.prompt import conversation_text

USER = [{"role": "user", "content": "hello"}]
WORDS = ["<s>", "<e>", "sys", "user", "be", "kind", "short", "hello", "<unk>"]
TURNS = (
    "{% if messages[0].role != 'system' and default %}sys be kind <e> {% endif %}"
    "{% for m in messages %}{{ 'sys' if m.role == 'system' else m.role }} {{ m.content }} <e> {% endfor %}"
)
WITH_DEFAULT, WITHOUT_DEFAULT = TURNS.replace("and default", ""), TURNS.replace("and default", "and false")
NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}"  # noqa: E501


def tokenizer(template: str | None, adds_bos: bool = False, bos: str | None = "<s>") -> PreTrainedTokenizerFast:
    word_level = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        word_level.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=word_level, unk_token="<unk>", bos_token=bos)
    fast.chat_template = template
    return fast


def words(prompt: str, **settings: object) -> list[str]:
    return [WORDS[i] for i in prefix_ids(prompt, tokenizer(**settings)).ids]


def test_text_becomes_a_system_turn_where_there_are_such() -> None:
    assert words("be short", template=WITH_DEFAULT) == ["sys", "be", "short", "<e>"]
    assert words("be short", template=WITHOUT_DEFAULT) == ["sys", "be", "short", "<e>"]
    assert words("be short", template=NO_SYSTEM) == ["<s>", "be", "short"]
    assert words("be short", template=None) == ["<s>", "be", "short"]
    assert words("be short", template=None, bos=None) == ["be", "short"]


def test_default_is_what_the_template_writes_by_itself() -> None:
    assert words("default", template=WITH_DEFAULT) == ["sys", "be", "kind", "<e>"]
    for template in (WITHOUT_DEFAULT, NO_SYSTEM):
        with pytest.raises(BadRecipe, match="chat template writes no system turn by itself"):
            words("default", template=template)
    with pytest.raises(BadRecipe, match="this model's tokenizer has no chat template"):
        words("default", template=None)


def test_bos_alone_or_a_message() -> None:
    assert words("bos", template=None) == ["<s>"]
    with pytest.raises(BadRecipe, match="has no BOS token"):
        words("bos", template=None, bos=None)


def test_the_bos_that_a_tokenizer_adds_is_there_once_and_known() -> None:
    plain = prefix_ids("be short", tokenizer(WITH_DEFAULT))
    assert plain.bos is None
    added = prefix_ids("be short", tokenizer(WITH_DEFAULT, adds_bos=True))
    assert [WORDS[i] for i in added.ids] == ["<s>", "sys", "be", "short", "<e>"]
    assert added.bos == 0
    assert words("<s> be short", template=None, adds_bos=True) == ["<s>", "be", "short"]


def test_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("be kind")
    assert words(str(file), template=None) == ["<s>", "be", "kind"]
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(BadRecipe, match="UTF-8"):
        words(str(file), template=None)
    assert words("be " * 3000, template=None) == ["<s>"] + ["be"] * 3000


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(BadRecipe, match="the system prompt is empty"):
        words("", template=None, bos=None)


def test_a_chat_behind_a_prefix_has_no_second_system_turn() -> None:
    with_default = tokenizer(WITH_DEFAULT)
    prefix = prefix_ids("be short", with_default)
    assert conversation_text(with_default, USER, None) == "sys be kind <e> user hello <e> "
    assert conversation_text(with_default, USER, prefix) == "user hello <e> "
    assert conversation_text(tokenizer(WITHOUT_DEFAULT), USER, prefix) == "user hello <e> "
    # BOS is no system turn.
    assert conversation_text(with_default, USER, prefix_ids("bos", with_default)) == "sys be kind <e> user hello <e> "
    with pytest.raises(BadRecipe, match="no chat template"):
        conversation_text(tokenizer(None), USER, prefix)


def test_what_looks_like_a_file_and_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match="there is no such file"):
        words(str(tmp_path / "prompt.txt"), template=None)
    file = tmp_path / "prompt.md"
    file.write_text("be kind\n")
    assert prefix_ids(str(file), tokenizer(None)) == prefix_ids("be kind", tokenizer(None))

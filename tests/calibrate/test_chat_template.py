"""Of a tokenizer's chat templates the default one is used; what cannot be used is refused with a remedy."""

from __future__ import annotations

from typing import Any

import pytest
from test_prompt import NO_SYSTEM, WITH_DEFAULT, tokenizer

from subnibble.calibrate.chat_template import RefusedTurns, before_answer, has_template, in_template
from subnibble.calibrate.prompt import prefix_ids
from subnibble.errors import BadRecipe

USER: list[dict[str, str]] = [{"role": "user", "content": "hello"}]
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %} sys{% endif %}"


def tokenizer_with(template: Any) -> Any:
    templated = tokenizer(None)
    templated.chat_template = template
    return templated


def test_the_default_of_several_is_the_one_that_is_used() -> None:
    several = tokenizer_with({"rag": "{{ raise_exception('no') }}", "default": PLAIN})
    for templated in (several, tokenizer(PLAIN)):
        assert has_template(templated)
        assert before_answer(templated, USER) == "hello sys"
        assert in_template(templated, USER) == "hello"


@pytest.mark.parametrize("template", [None, "", {}])
def test_without_a_template_there_are_no_turns(template: Any) -> None:
    templated = tokenizer_with(template)
    assert not has_template(templated)
    assert in_template(templated, USER) is None
    with pytest.raises(BadRecipe, match="no chat template; give a prompt as text"):
        before_answer(templated, USER)


def test_a_tokenizer_that_knows_no_templates_has_none() -> None:
    assert not has_template(object())


def test_several_without_a_default_are_named() -> None:
    templated = tokenizer_with({"tool_use": PLAIN, "rag": PLAIN})
    for use in (
        lambda: before_answer(templated, USER),
        lambda: in_template(templated, USER),
        lambda: prefix_ids("be kind", templated),
    ):
        with pytest.raises(BadRecipe, match=r"templates for rag, tool_use, and none is the default; save .*\.jinja"):
            use()
    # BOS alone needs no template.
    assert prefix_ids("bos", templated).ids == (0,)


@pytest.mark.parametrize("template", [5, ["a"], {"default": 5}])
def test_a_template_that_is_no_text_is_refused(template: Any) -> None:
    with pytest.raises(BadRecipe, match=r"chat template is (int|list), not a text; fix chat_template"):
        before_answer(tokenizer_with(template), USER)


def test_a_template_that_is_no_jinja_is_refused_and_not_passed_over() -> None:
    templated = tokenizer("{% for m in messages %}\n{{ m.content }}")
    for use in (lambda: before_answer(templated, USER), lambda: prefix_ids("be kind", templated)):
        with pytest.raises(BadRecipe, match=r"no valid Jinja \(line 2: .*endfor"):
            use()


@pytest.mark.parametrize("raised", ["raise_exception('only about cats')", "1 // 0", "messages[7].content.x", "1 + 'a'"])
def test_whatever_a_template_raises_is_a_refusal(raised: str) -> None:
    templated = tokenizer(f"{{{{ {raised} }}}}")
    assert in_template(templated, USER) is None
    with pytest.raises(RefusedTurns, match="refuses the message"):
        before_answer(templated, USER)
    with pytest.raises(BadRecipe, match="only about cats"):
        before_answer(tokenizer("{{ raise_exception('only about cats') }}"), USER)


def test_a_template_without_system_turns_is_no_error() -> None:
    assert before_answer(tokenizer(NO_SYSTEM), USER) == "hello"
    assert before_answer(tokenizer(WITH_DEFAULT), USER) == "sys be kind <e> user hello <e> "

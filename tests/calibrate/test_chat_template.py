"""Of a tokenizer's chat templates the default one is used; what cannot be used is refused with a remedy."""

from __future__ import annotations

from typing import Any

import pytest
from test_prompt import NO_SYSTEM, WITH_DEFAULT, tokenizer

from subnibble.calibrate.chat_template import RefusedTurns, has_template, in_template, question
from subnibble.calibrate.prompt import prefix_ids
from subnibble.errors import BadRecipe

USER: list[dict[str, str]] = [{"role": "user", "content": "hello"}]
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %} sys{% endif %}"


def with_templates(found: Any) -> Any:
    own = tokenizer(None)
    own.chat_template = found
    return own


def test_the_default_of_several_is_the_one_that_is_used() -> None:
    several = with_templates({"rag": "{{ raise_exception('no') }}", "default": PLAIN})
    for own in (several, tokenizer(PLAIN)):
        assert has_template(own)
        assert question(own, "hello") == "hello sys"
        assert in_template(own, USER) == "hello"


@pytest.mark.parametrize("found", [None, "", {}])
def test_without_a_template_there_are_no_turns(found: Any) -> None:
    own = with_templates(found)
    assert not has_template(own)
    assert in_template(own, USER) is None
    with pytest.raises(BadRecipe, match="no chat template; generate without --chat"):
        question(own, "hello")


def test_a_tokenizer_that_knows_no_templates_has_none() -> None:
    assert not has_template(object())


def test_several_without_a_default_are_named() -> None:
    own = with_templates({"tool_use": PLAIN, "rag": PLAIN})
    for use in (lambda: question(own, "hello"), lambda: in_template(own, USER), lambda: prefix_ids("be kind", own)):
        with pytest.raises(BadRecipe, match=r"templates for rag, tool_use, and none is the default; save .*\.jinja"):
            use()
    # BOS alone needs no template.
    assert prefix_ids("bos", own).ids == (0,)


@pytest.mark.parametrize("found", [5, ["a"], {"default": 5}])
def test_a_template_that_is_no_text_is_refused(found: Any) -> None:
    with pytest.raises(BadRecipe, match=r"chat template is (int|list), not a text; fix chat_template"):
        question(with_templates(found), "hello")


def test_a_template_that_is_no_jinja_is_refused_and_not_passed_over() -> None:
    own = tokenizer("{% for m in messages %}\n{{ m.content }}")
    for use in (lambda: question(own, "hello"), lambda: prefix_ids("be kind", own)):
        with pytest.raises(BadRecipe, match=r"no valid Jinja \(line 2: .*endfor"):
            use()


@pytest.mark.parametrize("raised", ["raise_exception('only about cats')", "1 // 0", "messages[7].content.x", "1 + 'a'"])
def test_whatever_a_template_raises_is_a_refusal(raised: str) -> None:
    own = tokenizer(f"{{{{ {raised} }}}}")
    assert in_template(own, USER) is None
    with pytest.raises(RefusedTurns, match="refuses the message"):
        question(own, "hello")
    with pytest.raises(BadRecipe, match="only about cats"):
        question(tokenizer("{{ raise_exception('only about cats') }}"), "hello")


def test_a_template_without_system_turns_is_no_error() -> None:
    assert question(tokenizer(NO_SYSTEM), "hello") == "hello"
    assert question(tokenizer(WITH_DEFAULT), "hello") == "sys be kind <e> user hello <e> "

"""Render turns of a conversation in the tokenizer's chat template.

A tokenizer may have several named templates: the one called "default" is used.
"""

from __future__ import annotations

from typing import Any

from subnibble.errors import BadRecipe, MissingExtra

# Characters of a template's own error that our message shows.
_SHOWN = 200


class RefusedTurns(BadRecipe):
    """The chat template refuses these turns; many refuse a system turn."""


def in_template(tokenizer: Any, turns: list[dict[str, str]]) -> str | None:
    """Text of the turns in the chat template, or None if there is no template or it refuses the turns.

    tokenizer: of transformers.
    turns: messages, {"role": ..., "content": ...} each.
    """
    template = _default(tokenizer)
    if template is None:
        return None
    try:
        return _fill(tokenizer, template, turns)
    except RefusedTurns:
        return None


def before_answer(tokenizer: Any, turns: list[dict[str, str]]) -> str:
    """Text of a conversation in the chat template, up to where the model's answer begins.

    tokenizer: of transformers.
    turns: messages, {"role": ..., "content": ...} each; the last one is the user's.
    Raises `BadRecipe` if there is no template, or if it is damaged or refuses the messages.
    """
    template = _default(tokenizer)
    if template is None:
        raise BadRecipe("this model's tokenizer has no chat template; give a prompt as text, without --chat")
    return _fill(tokenizer, template, turns, add_generation_prompt=True)


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template; `BadRecipe` if it has several and none is called "default"."""
    return _default(tokenizer) is not None


def _default(tokenizer: Any) -> str | None:
    # Tokenizers of mistral-common have no attribute chat_template.
    template = getattr(tokenizer, "chat_template", None) or None
    if isinstance(template, dict):
        if "default" not in template:
            raise BadRecipe(
                f"this model's tokenizer has chat templates for {', '.join(sorted(template))}, and none is the "
                "default; save the one to use as chat_template.jinja in the model's folder, or do without --chat and "
                "--system-prompt text"
            )
        template = template["default"]
    if template is not None and not isinstance(template, str):
        raise BadRecipe(
            f"this model's chat template is {type(template).__name__}, not a text; fix chat_template in "
            "tokenizer_config.json"
        )
    return template


def _fill(tokenizer: Any, template: str, turns: list[dict[str, str]], **settings: Any) -> str:
    from jinja2 import TemplateSyntaxError

    try:
        return str(tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, **settings))
    except TemplateSyntaxError as error:
        raise BadRecipe(
            f"this model's chat template is no valid Jinja (line {error.lineno}: {error.message}); fix it in "
            "chat_template.jinja or tokenizer_config.json"
        ) from error
    except ImportError as error:
        raise MissingExtra(f"the chat template cannot be used ({error}); pip install -U jinja2") from error
    # A template is a program that comes with the model, and may raise anything.
    except Exception as error:
        reason = " ".join(str(error).split())[:_SHOWN]
        raise RefusedTurns(
            f"this model's chat template refuses the message ({type(error).__name__}: {reason}); change the messages, "
            "or give a prompt as text, without --chat"
        ) from error

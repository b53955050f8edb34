"""Turns of a conversation in a tokenizer's chat template: of several that have names, the default one."""

from __future__ import annotations

from typing import Any

from subnibble.errors import BadRecipe, MissingExtra

_SHOWN = 200


class RefusedTurns(BadRecipe):
    """A chat template that does not take these turns, as many take no system turn."""


def in_template(tokenizer: Any, turns: list[dict[str, str]]) -> str | None:
    """The turns in the chat template; None where there is none or it refuses them."""
    template = _default(tokenizer)
    if template is None:
        return None
    try:
        return _fill(tokenizer, template, turns)
    except RefusedTurns:
        return None


def question(tokenizer: Any, message: str) -> str:
    """A user's message in the chat template, ready for the model's turn; `BadRecipe` where that cannot be."""
    template = _default(tokenizer)
    if template is None:
        raise BadRecipe("this model's tokenizer has no chat template; generate without --chat")
    return _fill(tokenizer, template, [{"role": "user", "content": message}], add_generation_prompt=True)


def has_template(tokenizer: Any) -> bool:
    """Whether there is a chat template; `BadRecipe` where there are several and none is the default."""
    return _default(tokenizer) is not None


def _default(tokenizer: Any) -> str | None:
    # Tokenizers of mistral-common have no such attribute.
    found = getattr(tokenizer, "chat_template", None) or None
    if isinstance(found, dict):
        if "default" not in found:
            raise BadRecipe(
                f"this model's tokenizer has chat templates for {', '.join(sorted(found))}, and none is the default; "
                "save the one to use as chat_template.jinja beside it, or do without --chat and --system-prompt text"
            )
        found = found["default"]
    if found is not None and not isinstance(found, str):
        raise BadRecipe(
            f"this model's chat template is {type(found).__name__}, not a text; mend chat_template in "
            "tokenizer_config.json"
        )
    return found


def _fill(tokenizer: Any, template: str, turns: list[dict[str, str]], **settings: Any) -> str:
    from jinja2 import TemplateSyntaxError

    try:
        return str(tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, **settings))
    except TemplateSyntaxError as error:
        raise BadRecipe(
            f"this model's chat template is no valid Jinja (line {error.lineno}: {error.message}); mend it in "
            "chat_template.jinja or tokenizer_config.json"
        ) from error
    except ImportError as error:
        raise MissingExtra(f"the chat template cannot be used ({error}); pip install -U jinja2") from error
    # A template is a program of the model's maker, and may raise anything.
    except Exception as error:
        reason = " ".join(str(error).split())[:_SHOWN]
        raise RefusedTurns(
            f"this model's chat template refuses the message ({type(error).__name__}: {reason}); change the message, "
            "or generate without --chat"
        ) from error

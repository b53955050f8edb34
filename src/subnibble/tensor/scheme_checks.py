"""Checks that the schemes of weights, inputs and KV cache share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from subnibble.errors import BadRecipe


def check_choice(value: Any, choices: Sequence[Any], subject: str, otherwise: str = "") -> None:
    """Raise `BadRecipe` unless `value` is one of the choices, and of their type.

    subject: begins the error, for example "grid is".
    otherwise: ends it: another choice, which is not a value of this setting.
    """
    if not isinstance(value, type(choices[0])) or value not in choices:
        raise BadRecipe(f"{subject} {value!r}; choose one of {', '.join(map(str, choices))}{otherwise}")


def check_clip(clip: Any, name: str) -> None:
    """Raise `BadRecipe` unless `clip` is in (0, 1]. name: names the setting in the error."""
    if isinstance(clip, bool) or not isinstance(clip, int | float) or not 0 < clip <= 1:
        raise BadRecipe(f"{name} is {clip!r}; give a number above 0 and at most 1")


def known_fields(
    kind: type[Any], values: Mapping[str, Any], message: str, but: tuple[str, ...] = ()
) -> Mapping[str, Any]:
    """Return `values` if every key is a field of the dataclass `kind`.

    message: the error, with {} in place of the unknown key.
    but: fields that do not count as known.
    Raises `BadRecipe`, which names the first unknown key and lists the known ones.
    """
    known = {field.name for field in fields(kind)} - {*but}
    unknown = sorted(set(values) - known)
    if unknown:
        raise BadRecipe(f"{message.format(repr(unknown[0]))}; known: {', '.join(sorted(known))}")
    return values

"""The TOML text that stores a recipe."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

import tomli_w

from subnibble.errors import BadRecipe
from subnibble.text_file import check_characters


def written(values: Mapping[str, Any]) -> str:
    """A dictionary as TOML text."""
    return tomli_w.dumps(values)


def parsed(text: str, where: str) -> dict[str, Any]:
    """The dictionary that TOML text holds. where: names the text in errors, for example a file name."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecipe(f"{where} is no valid TOML: {error}") from error


def check_writable(values: Mapping[str, Any]) -> None:
    """Raise `BadRecipe` for a value that TOML cannot hold: writing `recipe.toml` would fail, after hours of work."""
    for key, value in values.items():
        try:
            text = written({key: value})
        except (TypeError, ValueError, AttributeError) as error:
            raise BadRecipe(
                f"{key} is {value!r}, which cannot be written to recipe.toml ({error}); give text or numbers"
            ) from error
        check_characters(value if isinstance(value, str) else text, key, BadRecipe)

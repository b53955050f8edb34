"""The recipe's exceptions for single linears: pattern of paths -> settings that differ. The first match counts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from subnibble.device import AUTO
from subnibble.errors import BadRecipe

OVERRIDE_KEYS = ("bits", "group_size", "grid", "zero_point", "activation_bits", "skip")
# Grids whose weights have no zero-point.
WITHOUT_ZERO_POINT = ("sign", "mxfp4")
_EXPRESSION = "re:"


def matches(pattern: str, path: str) -> bool:
    """Whether an override pattern, an exact path or "re:" and a regular expression, matches the linear at `path`."""
    if pattern.startswith(_EXPRESSION):
        return re.match(pattern.removeprefix(_EXPRESSION), path) is not None
    return pattern == path


def override_of(overrides: Mapping[str, Mapping[str, Any]], path: str) -> Mapping[str, Any]:
    """The settings of the first pattern that matches the linear at `path`; empty if none does."""
    for pattern, values in overrides.items():
        if matches(pattern, path):
            return values
    return {}


def check_override(pattern: str, values: Any) -> None:
    """Raise `BadRecipe` for an invalid pattern or table; what makes a scheme is checked by the scheme."""
    if not isinstance(values, Mapping):
        raise BadRecipe(f"override {pattern!r} is {values!r}; give a table with {', '.join(OVERRIDE_KEYS)}")
    unknown = sorted(set(values) - set(OVERRIDE_KEYS))
    if unknown:
        raise BadRecipe(f"override {pattern!r} has unknown key {unknown[0]!r}; known: {', '.join(OVERRIDE_KEYS)}")
    if not isinstance(values.get("skip", False), bool):
        raise BadRecipe(f"override {pattern!r}: skip is {values['skip']!r}; give true or false")
    if pattern.startswith(_EXPRESSION):
        try:
            re.compile(pattern.removeprefix(_EXPRESSION))
        except (re.error, OverflowError) as error:
            raise BadRecipe(f"override {pattern!r} is not a regular expression: {error}") from error
    if values.get("grid") in WITHOUT_ZERO_POINT and values.get("zero_point", "none") not in ("none", AUTO):
        raise BadRecipe(f"override {pattern!r}: a {values['grid']} grid has no zero-point; leave zero_point out")


def check_matched(overrides: Mapping[str, Any], paths: list[str]) -> None:
    """Raise `BadRecipe` for a pattern that matches none of the linears at `paths`."""
    for pattern in overrides:
        if not any(matches(pattern, path) for path in paths):
            raise BadRecipe(f"override {pattern!r} matches no linear; they have names like {paths[0]}")

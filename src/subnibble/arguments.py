"""Check the arguments of Python callers: convert what is meant, or say what to give instead."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subnibble.errors import BadArgument, BadRecipe
from subnibble.paths import expanded


def as_path(value: Any, name: str, target: str) -> Path:
    """The path given as an argument, with `~` expanded.

    value: the argument.
    name: the argument's name, for the error.
    target: what the argument should be, for the error.
    Raises `BadArgument` for anything that is not a path, such as a loaded model.
    """
    text = plain(value)
    if not isinstance(text, str):
        raise BadArgument(f"{name} is {described(value)}; give {target}{_where_from(value)}")
    if not text or "\0" in text:
        raise BadArgument(f"{name} is {text!r}; give {target}")
    return expanded(text)


def plain(value: Any) -> Any:
    """Paths, torch devices and dtypes as strings, as recipes hold them; any other value unchanged."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, torch.device):
        return str(value)
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def described(value: Any) -> str:
    """A few words for a wrong argument in an error message: "None", "3", "a list", "a loaded LlamaForCausalLM"."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    kind = type(value).__name__
    article = "an" if kind[0] in "AEIOUaeiou" else "a"
    return f"a loaded {kind}" if isinstance(value, nn.Module) else f"{article} {kind}"


def check_types(holder: object, target: Mapping[str, Any]) -> None:
    """Raise `BadRecipe` if an attribute of `holder` has the wrong type; a bool always has.

    target: attribute name -> its type, or a tuple of types.
    """
    for key, kind in target.items():
        value = getattr(holder, key)
        if not isinstance(value, kind) or isinstance(value, bool):
            first = kind[0] if isinstance(kind, tuple) else kind
            raise BadRecipe(f"{key} is {value!r}; expected {'a table' if first is Mapping else first.__name__}")


def _where_from(value: Any) -> str:
    if not isinstance(value, nn.Module):
        return ""
    origin = getattr(getattr(value, "config", None), "name_or_path", "")
    source = f"the one that it was loaded from ({origin}), or " if origin else ""
    return f": {source}one that model.save_pretrained writes"

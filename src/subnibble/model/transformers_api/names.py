"""The names of the KV cache in transformers, and the errors for unknown names and for hooks that are never called."""

from __future__ import annotations

import inspect

import transformers
from torch import nn

from subnibble.errors import SilentFailure, UnsupportedTransformers

# Names of the KV cache in arguments, in outputs and in the state of `generate`: the newest first.
CACHE_NAMES = ("cache", "past_key_values")
# A cache by hand: every call of a layer needs the names, and torch.compile warns about functools.cache.
_ARGUMENTS: dict[type[nn.Module], tuple[str, ...]] = {}


def release() -> str:
    """The installed release of transformers, for messages."""
    return f"transformers {transformers.__version__}"


def unknown(what: str) -> UnsupportedTransformers:
    """The error for a transformers release that differs from all that we know.

    what: what the release does, the predicate of a sentence.
    """
    return UnsupportedTransformers(
        f"{release()} {what}, which this version of subnibble does not support; install a release of transformers that "
        "the README lists as tested, or a newer subnibble"
    )


def never_called(what: str) -> SilentFailure:
    """The error for a module or hook that should have been called, but was not. what: its name."""
    return SilentFailure(
        f"{what} was never called ({release()}); results without it would be wrong, so nothing is kept"
    )


def forward_arguments(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments of `forward` of a module class, in order."""
    if kind not in _ARGUMENTS:
        _ARGUMENTS[kind] = tuple(inspect.signature(kind.forward).parameters)[1:]
    return _ARGUMENTS[kind]


def cache_argument(module: nn.Module) -> str:
    """The name of the KV cache among the arguments of a decoder, a block or an attention module."""
    known = forward_arguments(type(module))
    for name in CACHE_NAMES:
        if name in known:
            return name
    raise unknown(f"calls the KV cache of {type(module).__name__} by none of the names {', '.join(CACHE_NAMES)}")

"""What transformers calls the KV cache, and the errors for what it calls otherwise, or no longer calls at all."""

from __future__ import annotations

import inspect

import transformers
from torch import nn

from subnibble.errors import SilentFailure, UnsupportedTransformers

# What the KV cache is called in arguments, in outputs and in what `generate` keeps: today's name first.
CACHE_NAMES = ("cache", "past_key_values")
# Each call of a layer asks; torch.compile warns of functools.cache.
_ARGUMENTS: dict[type[nn.Module], tuple[str, ...]] = {}


def release() -> str:
    """The release of transformers that is installed, for messages."""
    return f"transformers {transformers.__version__}"


def unknown(what: str) -> UnsupportedTransformers:
    """The error for a release that does something in a way that is not known. what: the rest of such a sentence."""
    return UnsupportedTransformers(
        f"{release()} {what}, which this subnibble does not know; install a release of transformers that the README "
        "lists as tested, or a newer subnibble"
    )


def never_called(what: str) -> SilentFailure:
    """The error for something that must have happened and did not. what: names it, as the subject of a sentence."""
    return SilentFailure(f"{what} was never called ({release()}); nothing that was computed without it is kept")


def forward_arguments(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments that the forward of a module of this class takes, in order."""
    if kind not in _ARGUMENTS:
        _ARGUMENTS[kind] = tuple(inspect.signature(kind.forward).parameters)[1:]
    return _ARGUMENTS[kind]


def cache_argument(module: nn.Module) -> str:
    """What the forward of a decoder, a block or an attention calls its KV cache."""
    known = forward_arguments(type(module))
    for name in CACHE_NAMES:
        if name in known:
            return name
    raise unknown(f"calls the KV cache of {type(module).__name__} by none of the names {', '.join(CACHE_NAMES)}")

"""Models that a backend runs: packed or plain, with every kind of KV cache, with and without a prefix."""

from __future__ import annotations

from typing import Any

from conftest import random_model
from subnibble.generate.prefix import attach_prefix_
from subnibble.tensor.cache_scheme import CacheScheme, PrefixIds

PREFIX = PrefixIds((5, 9, 2), None)
# None: the cache of transformers.
CACHES: dict[str, CacheScheme | None] = {
    "dynamic": None,
    "16 bits": None,
    "by token": CacheScheme(4, 8),
    "hadamard with a window": CacheScheme(4, 8, key_rotation="hadamard", window=5),
    "by channel": CacheScheme(4, 4, key_axis="channel", window=8),
    "before positions": CacheScheme(4, 8, rope="before"),
}


def model_with(cache: str, prefixed: bool, name: str = "llama") -> Any:
    model = random_model(name)
    if cache != "dynamic" or prefixed:
        attach_prefix_(model, CACHES[cache], PREFIX if prefixed else None)
    return model

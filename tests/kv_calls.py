"""Calls of a model that keep its KV cache, whatever transformers calls it."""

from __future__ import annotations

from typing import Any

import torch

from subnibble.model.transformers_api.names import CACHE_NAMES, cache_argument


def passing(model: torch.nn.Module, cache: Any) -> dict[str, Any]:
    """The argument by which a model or decoder is called with a cache."""
    return {cache_argument(model): cache}


def cache_of(output: Any) -> Any:
    """The cache in a model's output, None if there is none."""
    return next((getattr(output, name) for name in CACHE_NAMES if name in type(output).__dataclass_fields__), None)

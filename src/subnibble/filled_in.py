"""The recipe as `recipe.toml` keeps it: all that was left open filled in, so that it makes the same bytes again.

But for grid and zero_point: "auto" stays, as what the method wants depends on bits and site, and other bits or another
method over the file shall get what they want.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from subnibble.cache_scheme import CacheScheme
from subnibble.recipe import Recipe


def filled_in(
    recipe: Recipe,
    options: Any,
    cache: CacheScheme | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Recipe:
    """The recipe with everything that was resolved. options: the method's."""
    return replace(
        recipe,
        kv={} if cache is None else {key: value for key, value in cache.to_dict().items() if key != "bits"},
        system_prompt=recipe.system_prompt and absolute(recipe.system_prompt),
        calibration=recipe.calibration and absolute(recipe.calibration),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        options=asdict(options),
    )


def absolute(file: str) -> str:
    """A file's full path, so that the recipe means the same from any folder; names of sets as they are."""
    return str(Path(file).resolve()) if file and Path(file).is_file() else file

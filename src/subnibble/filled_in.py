"""The recipe as `recipe.toml` keeps it: all that was left open filled in, so that it makes the same bytes again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from subnibble.cache_scheme import CacheScheme
from subnibble.device import AUTO
from subnibble.recipe import Recipe
from subnibble.scheme import Scheme


def filled_in(
    recipe: Recipe,
    options: Any,
    schemes: Mapping[str, Scheme | None],
    cache: CacheScheme | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Recipe:
    """The recipe with everything that was resolved. options: the method's. schemes: of all linears, by path."""
    named = replace(
        recipe,
        kv={} if cache is None else {key: value for key, value in cache.to_dict().items() if key != "bits"},
        system_prompt=recipe.system_prompt and absolute(recipe.system_prompt),
        calibration=recipe.calibration and absolute(recipe.calibration),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        options=asdict(options),
    )
    return Recipe.from_dict(named.to_dict() | _agreed(recipe, schemes))


def _agreed(recipe: Recipe, schemes: Mapping[str, Scheme | None]) -> dict[str, str]:
    """What the recipe leaves to the method, where all linears came to the same and the recipe can say so."""
    used = [scheme for scheme in schemes.values() if scheme is not None]
    agreed = {}
    if recipe.grid == AUTO and {scheme.grid for scheme in used} == {"uniform"}:
        agreed["grid"] = "uniform"
        # The embedding follows the recipe's zero-point, not the method's wish: only its own default may be filled in.
        if recipe.zero_point == AUTO and {scheme.zero_point for scheme in used} == {"integer"}:
            agreed["zero_point"] = "integer"
    return agreed


def absolute(file: str) -> str:
    """A file's full path, so that the recipe means the same from any folder; names of sets as they are."""
    return str(Path(file).resolve()) if file and Path(file).is_file() else file

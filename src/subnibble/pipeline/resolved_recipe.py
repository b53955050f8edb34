"""The recipe as `recipe.toml` keeps it: all that was left open filled in, so that it makes the same bytes again.

But for grid, zero_point and the table kv: where they leave something to the method they stay so. What it wants depends
on bits and site, and other bits or another method over the file shall get theirs. `config.json` has what came of them.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from subnibble.calibrate.prompt import AUTO, BOS, DEFAULT
from subnibble.calibrate.text import absolute_text
from subnibble.paths import absolute_path
from subnibble.recipe import Recipe


def resolved_recipe(
    recipe: Recipe,
    options: Any,
    device: torch.device,
    dtype: torch.dtype,
) -> Recipe:
    """The recipe with everything that was resolved. options: the method's."""
    return replace(
        recipe,
        system_prompt=recipe.system_prompt and absolute_path(recipe.system_prompt, (DEFAULT, BOS, AUTO)),
        calibration=recipe.calibration and absolute_text(recipe.calibration),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        options=asdict(options),
    )

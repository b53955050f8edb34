"""The recipe as `recipe.toml` stores it: all open values are filled in, so that it produces the same bytes again.

Exception: `grid`, `zero_point` and the table `kv` stay open where the method chooses them. The choice depends on bit
width and site, so that it must change if the recipe is reused with other bits or another method. `config.json` has the
values that were chosen.
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
    """Fill in the open values of a recipe.

    options: the method's options, a dataclass with all defaults filled in.
    device, dtype: as resolved for this machine and model.
    """
    return replace(
        recipe,
        system_prompt=recipe.system_prompt and absolute_path(recipe.system_prompt, (DEFAULT, BOS, AUTO)),
        calibration=recipe.calibration and absolute_text(recipe.calibration),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        options=asdict(options),
    )

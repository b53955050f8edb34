"""Presets: for each common bit width, the recipe that measured best (main README, "What to choose").

A preset's name gives its bit widths. w3 has 3-bit weights; w4a4kv4 has 4-bit weights, activations (inputs of linears)
and KV cache; kv4 has a 4-bit KV cache and 16-bit weights.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from subnibble.arguments import described
from subnibble.errors import BadArgument, BadRecipe
from subnibble.recipe import PLAIN_ACTIVATIONS, Recipe
from subnibble.tensor.cache_scheme import PLAIN_CACHE

PRESETS = ("w2", "w3", "w4", "w4a8", "w4a4", "mxfp4", "w4a4kv4", "w3a3kv3", "kv4")


def preset(name: str, **changes: Any) -> Recipe:
    """Return the recipe of a preset, with `changes` applied.

    name: one of `PRESETS`.
    changes: fields of `Recipe` to replace, for example calibration="my-text.txt".
    Raises `BadRecipe` for an unknown preset (the message lists all presets), field or value.
    """
    if not isinstance(name, str):
        raise BadArgument(f"the preset name is {described(name)}; give one of {', '.join(PRESETS)}")
    if name not in PRESETS:
        raise BadRecipe(f"preset is {name!r}; choose one of {', '.join(PRESETS)}")
    text = (files("subnibble.presets") / f"{name}.toml").read_text(encoding="utf-8")
    recipe = Recipe.from_text(text, f"preset {name}")
    return Recipe.of({**recipe.to_dict(), **changes}) if changes else recipe


def preset_for(bits: int | None, activation_bits: int | None, kv_bits: int | None, grid: str | None) -> str:
    """Return the name of the preset with these bit widths.

    bits: of weights. None means the default recipe's. If bits and activation_bits are both None and kv_bits asks for
        a quantized cache, the cache is the only thing to quantize ("kv4").
    activation_bits: of inputs of linears. None means the default recipe's.
    kv_bits: of the KV cache. None means the default recipe's.
    grid: the weight grid. None accepts the preset's grid.
    Raises `BadRecipe` if no preset has these bit widths and this grid.
    """
    default = Recipe()
    inputs = default.activation_bits if activation_bits is None else activation_bits
    cache = default.kv_bits if kv_bits is None else kv_bits
    is_cache_only = bits is None and activation_bits is None and cache != PLAIN_CACHE
    name = "" if is_cache_only else f"w{default.bits if bits is None else bits}"
    name += f"a{inputs}" if inputs != PLAIN_ACTIVATIONS else ""
    name += f"kv{cache}" if cache != PLAIN_CACHE else ""
    if grid == "mxfp4" and name == "w4a4":
        name = "mxfp4"
    if name not in PRESETS or grid not in (None, preset(name).grid):
        requested = name if grid is None else f"{name} with grid {grid}"
        raise BadRecipe(
            f"there is no preset for {requested} (presets: {', '.join(PRESETS)}); name a method with --method, or "
            "choose a preset with --preset and override its settings"
        )
    return name

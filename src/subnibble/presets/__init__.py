"""Presets: one recipe for each size that people ask for, the best that our measurements know (README, "What to
choose").

Their names say the bits: w3 has 3-bit weights, w4a4kv4 4-bit weights, inputs of linears and KV cache, kv4 a 4-bit KV
cache beside 16-bit weights.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from subnibble.errors import BadArgument, BadRecipe
from subnibble.given import described
from subnibble.recipe import PLAIN_ACTIVATIONS, Recipe
from subnibble.tensor.cache_scheme import PLAIN_CACHE

PRESETS = ("w2", "w3", "w4", "w4a8", "w4a4", "mxfp4", "w4a4kv4", "w3a3kv3", "kv4")


def preset(name: str, **changes: Any) -> Recipe:
    """The recipe of a preset, with some of its fields changed.

    name: one of `PRESETS`.
    changes: fields of `Recipe`, for example calibration="my-text.txt".
    Raises `BadRecipe` for an unknown preset (the message lists all), field or value.
    """
    if not isinstance(name, str):
        raise BadArgument(f"a preset's name is {described(name)}; give one of {', '.join(PRESETS)}")
    if name not in PRESETS:
        raise BadRecipe(f"preset is {name!r}; choose one of {', '.join(PRESETS)}")
    text = (files("subnibble.presets") / f"{name}.toml").read_text(encoding="utf-8")
    recipe = Recipe.from_text(text, f"preset {name}")
    return Recipe.of({**recipe.to_dict(), **changes}) if changes else recipe


def preset_for(bits: int | None, activation_bits: int | None, kv_bits: int | None, grid: str | None) -> str:
    """The name of the preset with these bits, None for those of the default recipe; `BadRecipe` if there is none."""
    default = Recipe()
    inputs = default.activation_bits if activation_bits is None else activation_bits
    cache = default.kv_bits if kv_bits is None else kv_bits
    alone = bits is None and activation_bits is None and cache != PLAIN_CACHE
    name = "" if alone else f"w{default.bits if bits is None else bits}"
    name += f"a{inputs}" if inputs != PLAIN_ACTIVATIONS else ""
    name += f"kv{cache}" if cache != PLAIN_CACHE else ""
    if grid == "mxfp4" and name == "w4a4":
        name = "mxfp4"
    if name not in PRESETS or grid not in (None, preset(name).grid):
        asked = name if grid is None else f"{name} on a grid {grid}"
        raise BadRecipe(
            f"no preset is made for {asked} ({', '.join(PRESETS)} are there); name a method with --method, or a preset "
            "with --preset to go over its settings"
        )
    return name

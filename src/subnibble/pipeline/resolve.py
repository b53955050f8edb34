"""What a recipe comes to on a model: all that can be known, and refused, before text and weights are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from subnibble.arch.site import Heads
from subnibble.calibrate.prompt import AUTO, given_prefix
from subnibble.calibrate.tokens import check_vocabulary
from subnibble.calibrate.windows import check_positions
from subnibble.checkpoint.manifest import check_plain
from subnibble.checkpoint.opening import open_source
from subnibble.checkpoint.source import Source
from subnibble.device import resolve_device, resolve_dtype
from subnibble.errors import BadRecipe
from subnibble.methods import find_method
from subnibble.methods.method import Steps
from subnibble.model.skeleton import Skeleton
from subnibble.pipeline.plan import Plan, make_plan, needs_data, plan_rotation
from subnibble.pipeline.resolved_recipe import filled_in
from subnibble.recipe import Recipe
from subnibble.tensor.cache_scheme import PrefixIds
from subnibble.transforms.rotate import Rotation
from subnibble.transforms.rotate_values import ValueRotation, make_value_rotation

_FEWEST_TUNED_WINDOWS = 2


@dataclass(frozen=True)
class Resolved:
    """recipe: with everything filled in that was left open. prefix: the system prompt's, None for none and for one that
    is yet to be found.
    """

    recipe: Recipe
    steps: Steps
    skeleton: Skeleton
    plan: Plan
    rotation: Rotation | None
    values: ValueRotation | None
    prefix: PrefixIds | None


def resolve(model: str | Path | Source, recipe: Recipe) -> Resolved:
    """Resolve `recipe` for `model` (folder, hub id, .gguf file or open); a `SubnibbleError` says what does not fit.

    What no model would change is known before one is opened, which may fetch it.
    """
    method = find_method(recipe.method)
    options = method.configure(recipe.options)
    steps = method.build(options)
    if recipe.calibration is None and needs_data(recipe, steps):
        recipe = replace(recipe, calibration="c4")
    _check(recipe, steps)
    source = open_source(model)
    check_plain(source)
    device = resolve_device(recipe.device)
    dtype = resolve_dtype(recipe.dtype, source.config.dtype, device)
    skeleton = Skeleton(source, dtype, device)
    plan = make_plan(recipe, steps, skeleton)
    rotation = plan_rotation(recipe, steps, skeleton)
    values = make_value_rotation(steps.value_rotation, Heads.of(skeleton.config).width, recipe.seed)
    prefix = given_prefix(recipe.system_prompt, source.load_tokenizer)
    others = (plan.cache, recipe.system_prompt, recipe.embedding_scheme)
    if steps.leaves_weights and others == (None, None, None):
        raise BadRecipe(
            f"method {recipe.method} leaves all weights, and there is nothing else to do; set kv_bits, system_prompt "
            "or embedding_bits"
        )
    window = 1 if recipe.calibration is None else recipe.window
    check_positions(window, source.config, 0 if prefix is None else len(prefix.ids))
    if prefix is not None:
        check_vocabulary(torch.tensor(prefix.ids), source.config.vocab_size, "the system prompt")
    whole = filled_in(recipe, options, device, dtype)
    return Resolved(whole, steps, skeleton, plan, rotation, values, prefix)


def _check(recipe: Recipe, steps: Steps) -> None:
    """Raise `BadRecipe` where the recipe's calibration does not do for the steps, whatever the model."""
    if recipe.system_prompt == AUTO and recipe.calibration is None:
        raise BadRecipe('system_prompt = "auto" is found in calibration text; set calibration')
    if steps.tuning is not None and recipe.num_windows < _FEWEST_TUNED_WINDOWS:
        raise BadRecipe(f"tuning holds some windows out and num_windows is {recipe.num_windows}; use 2 or more")

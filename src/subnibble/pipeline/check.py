"""Check whether a recipe can run on a model, before text and weights are read.

`quantize`, `estimate` and `compare` call `resolve`; those that write call the checks of the output, too.
`distill_checkpoint` calls `given_distillation` and `check_can_distill`. A rule about a single step is defined by that
step (`Scheme.check_width`, `Rounder.check`, ...); this file calls all of these checks.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from subnibble.arch.site import Arch, Heads
from subnibble.calibrate.openings import chosen_start
from subnibble.calibrate.prompt import AUTO, prompt_prefix
from subnibble.calibrate.tokens import check_vocabulary
from subnibble.calibrate.windows import check_positions
from subnibble.checkpoint.manifest import PackedConfig, check_plain
from subnibble.checkpoint.module_specs import NormBiasSpec
from subnibble.checkpoint.opening import open_source
from subnibble.checkpoint.original import check_original
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.checkpoint.source import Source
from subnibble.device import resolve_device, resolve_dtype
from subnibble.distill.settings import Distillation, learnable
from subnibble.errors import BadRecipe, OutputError, UnsupportedModel
from subnibble.methods import find_method
from subnibble.methods.method import Steps
from subnibble.model.skeleton import Skeleton
from subnibble.paths import expanded, is_file
from subnibble.pipeline.plan import (
    Plan,
    Resolved,
    needs_data,
    plan_inputs,
    plan_rotation,
    plan_schemes,
    stores_column_scales,
)
from subnibble.pipeline.resolved_recipe import resolved_recipe
from subnibble.pipeline.size import disk_bytes
from subnibble.pipeline.streams import prefix_length
from subnibble.recipe import PLAIN_ACTIVATIONS, Recipe
from subnibble.resume.run import Run
from subnibble.tensor.cache_scheme import PrefixIds
from subnibble.tensor.scheme import Scheme
from subnibble.transforms.rotate import can_rotate
from subnibble.transforms.rotate_values import make_value_rotation
from subnibble.tuning.clipping import check_scheme
from subnibble.tuning.input_clip import check_inputs

_FEWEST_TUNED_WINDOWS = 2


def resolve(model: str | Path | Source, recipe: Recipe) -> Resolved:
    """Check `recipe` against `model`, and fill in what it left open.

    model: folder, hub id, .gguf file, or an open source.

    Checks that do not depend on the model come before it is opened, because opening may download it. Raises a
    `SubnibbleError` that says what does not fit.
    """
    method = find_method(recipe.method)
    options = method.configure(recipe.options)
    steps = method.build(options)
    if recipe.calibration is None and needs_data(recipe, steps):
        recipe = replace(recipe, calibration="c4")
    _check_calibration(recipe, steps)
    source = open_source(model)
    check_plain(source)
    device = resolve_device(recipe.device)
    dtype = resolve_dtype(recipe.dtype, source.config.dtype, device)
    skeleton = Skeleton(source, dtype, device)
    plan = checked_plan(recipe, steps, skeleton)
    _check_rotation(steps, skeleton.arch)
    rotation = plan_rotation(recipe, steps, skeleton)
    value_rotation = make_value_rotation(steps.value_rotation, Heads.of(skeleton.config).width, recipe.seed)
    prefix = prompt_prefix(recipe.system_prompt, source.load_tokenizer)
    _check_purpose(recipe, steps, plan)
    check_tokens(recipe, source, prefix, "the system prompt")
    recipe = with_chosen_start(recipe, source.load_tokenizer)
    complete = resolved_recipe(recipe, options, device, dtype)
    return Resolved(complete, steps, skeleton, plan, rotation, value_rotation, prefix)


def with_chosen_start(recipe: Recipe, load_tokenizer: Callable[[], Any]) -> Recipe:
    """The recipe with all settings filled in of windows that the model writes; unchanged if there are none.

    load_tokenizer: returns the tokenizer; called only if it is needed.
    Raises `BadRecipe` if the tokenizer does not have what the settings need.
    """
    sampling = recipe.window_sampling
    if sampling is None:
        return recipe
    return replace(recipe, sampling=chosen_start(sampling, load_tokenizer()).to_dict())


def checked_plan(recipe: Recipe, steps: Steps, skeleton: Skeleton) -> Plan:
    """Plan how each linear and the KV cache are quantized.

    Raises `BadRecipe` if the plan does not fit the model or a step of the method.
    """
    _check_sites(steps, skeleton.arch)
    recipe.check_overrides(list(skeleton.linear_shapes()))
    schemes = plan_schemes(recipe, steps, skeleton)
    _check_weights(recipe, steps, skeleton, schemes)
    plan = Plan(schemes, plan_inputs(recipe, steps, schemes), recipe.cache_scheme(steps.cache))
    if steps.tuning is not None and steps.tuning.input_clipping != "none":
        check_inputs(plan.activations.values())
    _check_distillation(recipe, steps, skeleton, plan)
    if plan.cache is not None:
        plan.cache.check_width(Heads.of(skeleton.config).width)
    if recipe.embedding_scheme is not None:
        recipe.embedding_scheme.check_width(skeleton.config.hidden_size, skeleton.arch.embedding)
    return plan


def check_tokens(recipe: Recipe, source: Source, prefix: PrefixIds | None, what: str) -> None:
    """Check that the model has enough positions for prefix and window, and that the prefix's ids are in its vocabulary.

    prefix: token ids before each window, or None.
    what: name of the prefix in the error.

    Raises `CalibrationError`.
    """
    window = 1 if recipe.calibration is None else recipe.window
    check_positions(window, source.config, prefix_length(prefix))
    if prefix is not None:
        check_vocabulary(torch.tensor(prefix.ids), source.config.vocab_size, what)


def given_distillation(recipe: Recipe) -> Distillation:
    """The recipe's settings of distillation; `BadRecipe` if it has none. Needs no model."""
    if recipe.distillation is None:
        raise BadRecipe("distill_steps is 0; give a positive number")
    return recipe.distillation


def check_can_distill(
    settings: Distillation, window: int, original: Source, packed: SafetensorsSource, config: PackedConfig
) -> None:
    """Raise a `SubnibbleError` if a packed checkpoint cannot be tuned towards a model.

    window: tokens of a calibration window.
    original: the unquantized model.
    packed, config: the packed checkpoint.
    """
    check_plain(original)
    check_original(original, packed)
    linears = config.linears
    parameters = learnable(
        [scheme for spec in linears for matrix in spec.matrices.values() for _, scheme in matrix.ranges],
        [spec.activation for spec in linears],
        column_scales=any(spec.column_scale for spec in linears),
        norm_biases=any(isinstance(spec, NormBiasSpec) for spec in config.modules.values()),
    )
    settings.check_learns(parameters, packed.path.name)
    check_positions(window, original.config, prefix_length(config.prefix))


def check_apart(out: Path, model: Path, texts: Iterable[str | None] = ()) -> None:
    """Raise `OutputError` if replacing the folder `out` would delete the model or a text that the run reads.

    texts: names or files of texts, None for none.
    """
    if model.resolve() == out.resolve():
        raise OutputError(f"the output folder {out} is the model itself; choose another folder")
    files = [expanded(name) for name in texts if name and is_file(name)]
    for path in (model, *files):
        if out.resolve() in path.resolve().parents:
            raise OutputError(f"{path} lies in {out}, which would be replaced; choose another output folder")


def check_disk(resolved: Resolved, run: Run) -> None:
    """Raise `OutputError` if the disk of the run's work folder cannot hold the checkpoint and the unfinished work."""
    needed = disk_bytes(resolved)["peak"]
    # What is written already counts as free.
    free = shutil.disk_usage(run.folder).free + run.written
    if free < needed:
        raise OutputError(
            f"{run.final}: {free / 1e9:.2f} GB are free and about {needed / 1e9:.2f} GB are needed; free space or "
            "choose another disk"
        )


def _check_calibration(recipe: Recipe, steps: Steps) -> None:
    """Raise `BadRecipe` if the recipe has too little calibration text for the steps; needs no model."""
    if recipe.system_prompt == AUTO and recipe.calibration is None:
        raise BadRecipe('system_prompt = "auto" needs calibration text, to find sink tokens in it; set calibration')
    if steps.tuning is not None and recipe.num_windows < _FEWEST_TUNED_WINDOWS:
        raise BadRecipe(f"tuning holds out some windows, but num_windows is {recipe.num_windows}; use 2 or more")


def _check_sites(steps: Steps, arch: Arch) -> None:
    """Raise `BadRecipe` if the steps name a site that the architecture does not have."""
    named = {*steps.online, *steps.rounders, *(() if steps.tuning is None else steps.tuning.unsmoothed)}
    missing = named - {site.name for site in arch.sites}
    if missing:
        raise BadRecipe(
            f"the method has a step at the site {min(missing)}, which {arch.model_type} does not have; use another "
            "method, or switch that step off"
        )


def _check_weights(recipe: Recipe, steps: Steps, skeleton: Skeleton, schemes: dict[str, Scheme | None]) -> None:
    """Raise `BadRecipe` if a scheme does not fit its linear, its rounder, the tuning or the correction."""
    if steps.rounds_no_weights:
        if recipe.activation_bits < PLAIN_ACTIVATIONS:
            raise BadRecipe(
                f"method {recipe.method} leaves all linears unquantized, but activation_bits is "
                f"{recipe.activation_bits}; use another method, or activation_bits = 16"
            )
        return
    quantized = {path: scheme for path, scheme in schemes.items() if scheme is not None}
    if not quantized:
        raise BadRecipe("the overrides skip every linear; nothing would be quantized")
    shapes = skeleton.linear_shapes()
    for path, scheme in quantized.items():
        scheme.check_width(shapes[path][1], path)
    for path, scheme in quantized.items():
        steps.rounder_of(skeleton.site_of(path).name).check(scheme, path)
        if steps.tuning is not None:
            check_scheme(scheme, path)
        steps.correction.check(shapes[path][1], scheme, path)


def _check_distillation(recipe: Recipe, steps: Steps, skeleton: Skeleton, plan: Plan) -> None:
    """Raise `BadRecipe` if distillation is asked for and the packed model will have no parameter that it may learn."""
    if recipe.distillation is None:
        return
    quantized = [scheme for scheme in plan.schemes.values() if scheme is not None]
    quantized += [added for scheme in quantized for added in steps.correction.schemes(scheme)]
    columns = any(stores_column_scales(steps, plan.schemes, skeleton, path) for path in plan.schemes)
    parameters = learnable(quantized, plan.activations.values(), columns, norm_biases=steps.corrects_norms)
    recipe.distillation.check_learns(parameters, "the model")


def _check_rotation(steps: Steps, arch: Arch) -> None:
    """Raise `UnsupportedModel` if the steps rotate the residual stream and the architecture does not allow it."""
    if steps.rotation != "none" and not can_rotate(arch):
        raise UnsupportedModel(
            f"the residual stream of {arch.model_type} cannot be rotated, because a linear reads it without a norm; "
            'use rotation = "none"'
        )


def _check_purpose(recipe: Recipe, steps: Steps, plan: Plan) -> None:
    """Raise `BadRecipe` if the recipe would leave the model as it is."""
    others = (plan.cache, recipe.system_prompt, recipe.embedding_scheme)
    if steps.rounds_no_weights and others == (None, None, None):
        raise BadRecipe(
            f"method {recipe.method} leaves all weights unquantized, and there is nothing else to do; set kv_bits, "
            "system_prompt or embedding_bits"
        )

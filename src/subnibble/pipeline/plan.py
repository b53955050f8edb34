"""What a recipe and a method come to on a model, from shapes alone: how each linear and the cache are coded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from subnibble.arch.site import Arch, Heads
from subnibble.distill.settings import learnable
from subnibble.errors import BadRecipe, UnsupportedModel
from subnibble.methods.method import Steps
from subnibble.model.skeleton import Block, Skeleton
from subnibble.recipe import PLAIN_ACTIVATIONS, Recipe
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.cache_scheme import CacheScheme
from subnibble.tensor.scheme import Scheme
from subnibble.transforms.absorb import has_source
from subnibble.transforms.rotate import Rotation, can_rotate, make_rotation
from subnibble.tuning.clipping import check_scheme
from subnibble.tuning.input_clip import check_inputs


@dataclass(frozen=True)
class Plan:
    """Path of each linear -> how its weight and its input are quantized, None for not at all.

    cache: how keys and values are coded, None for not at all.
    """

    schemes: Mapping[str, Scheme | None]
    activations: Mapping[str, ActivationScheme | None]
    cache: CacheScheme | None = None

    def of_block(self, block: Block) -> tuple[dict[str, Scheme | None], dict[str, ActivationScheme | None]]:
        """The same for one block, by names in it."""
        names = block.arch.linears
        return (
            {name: self.schemes[f"{block.path}.{name}"] for name in names},
            {name: self.activations[f"{block.path}.{name}"] for name in names},
        )


def make_plan(recipe: Recipe, steps: Steps, skeleton: Skeleton) -> Plan:
    """Plan every linear. Raises what `plan_schemes` raises, and `BadRecipe` where a correction does not fit."""
    _check_roles(steps, skeleton.arch)
    schemes = plan_schemes(recipe, steps, skeleton)
    shapes = skeleton.linear_shapes()
    planned: dict[str, ActivationScheme | None] = dict.fromkeys(schemes)
    for path, scheme in schemes.items():
        if scheme is None:
            continue
        site = skeleton.site_of(path)
        steps.rounder_of(site.name).check(scheme, path)
        if steps.tuning is not None:
            check_scheme(scheme, path)
        steps.correction.check(shapes[path][1], scheme, path)
        inputs = recipe.activation_of(path, scheme)
        planned[path] = None if inputs is None else steps.correction.inputs(inputs)
    if steps.tuning is not None and steps.tuning.input_clipping != "none":
        check_inputs(planned.values())
    if recipe.distillation is not None:
        coded = [scheme for scheme in schemes.values() if scheme is not None]
        coded += [added for scheme in coded for added in steps.correction.schemes(scheme)]
        columns = any(stores_column_scales(steps, schemes, skeleton, path) for path in schemes)
        there = learnable(coded, planned.values(), columns, norm_biases=steps.corrects_norms)
        recipe.distillation.check_learns(there, "the model")
    return Plan(schemes, planned, plan_cache(recipe, steps, skeleton))


def stores_column_scales(steps: Steps, schemes: Mapping[str, Scheme | None], skeleton: Skeleton, path: str) -> bool:
    """Whether the linear at `path` stores its own column scales: it is rounded with some that no writer can take.

    Leaves out those that are too large to be absorbed, or whose writers have bare exponents as scales.
    """
    scheme, site = schemes[path], skeleton.site_of(path)
    if scheme is None or not steps.rounder_of(site.name).scales_columns:
        return False
    block = next(path.removesuffix(name) for name in site.readers if path.endswith(f".{name}"))
    together = {schemes[f"{block}{name}"] for name in site.readers} == {scheme}
    return not (together and has_source(site, Heads.of(skeleton.config)))


def _check_roles(steps: Steps, arch: Arch) -> None:
    """Raise `BadRecipe` if the steps ask for a site that the architecture does not have."""
    asked = {*steps.online, *steps.rounders, *(() if steps.tuning is None else steps.tuning.unsmoothed)}
    missing = asked - {site.name for site in arch.sites}
    if missing:
        raise BadRecipe(
            f"the method does something at the site {min(missing)}, which {arch.model_type} does not have; use another "
            "method, or switch that step off"
        )


def needs_data(recipe: Recipe, steps: Steps) -> bool:
    """Whether calibration text is needed."""
    cache = recipe.cache_scheme(steps.cache)
    return steps.needs_data or recipe.distillation is not None or (cache is not None and cache.is_centered)


def plan_cache(recipe: Recipe, steps: Steps, skeleton: Skeleton) -> CacheScheme | None:
    """How the KV cache is coded, None for not at all; `BadRecipe` if its groups do not fit a head."""
    scheme = recipe.cache_scheme(steps.cache)
    if scheme is not None:
        scheme.check_width(Heads.of(skeleton.config).width)
    return scheme


def plan_schemes(recipe: Recipe, steps: Steps, skeleton: Skeleton) -> dict[str, Scheme | None]:
    """Path of each linear -> its scheme, None where an override skips it.

    Raises `BadRecipe` if a group does not fit a linear, an override matches none, or nothing would be quantized.
    """
    shapes = skeleton.linear_shapes()
    recipe.check_overrides(list(shapes))
    if steps.leaves_weights:
        if recipe.activation_bits < PLAIN_ACTIVATIONS:
            raise BadRecipe(
                f"method {recipe.method} leaves all linears, and activation_bits is {recipe.activation_bits}; use "
                "another method, or activation_bits = 16"
            )
        return dict.fromkeys(shapes)
    schemes = {}
    for path, (_, columns) in shapes.items():
        scheme = schemes[path] = recipe.scheme_of(path, partial(steps.prefers, skeleton.site_of(path).name))
        if scheme is not None:
            scheme.check_width(columns, path)
    if all(scheme is None for scheme in schemes.values()):
        raise BadRecipe("the overrides skip every linear; nothing would be quantized")
    return schemes


def plan_rotation(recipe: Recipe, steps: Steps, skeleton: Skeleton) -> Rotation | None:
    """The rotation of the residual stream, None for none; `BadRecipe` if its width or the groups do not allow it."""
    if steps.rotation != "none" and not can_rotate(skeleton.arch):
        raise UnsupportedModel(
            f'{skeleton.arch.model_type} has a reader of the residual stream without a norm; use rotation = "none"'
        )
    width = skeleton.config.hidden_size
    return make_rotation(steps.rotation, width, recipe.scheme, recipe.seed, skeleton.device)

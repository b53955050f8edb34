"""Plan how each linear and the KV cache are quantized, from recipe, method and tensor shapes.

`check.py` checks whether the plan is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from subnibble.arch.site import Heads
from subnibble.methods.method import Steps
from subnibble.model.skeleton import Block, Skeleton
from subnibble.recipe import Recipe
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.cache_scheme import CacheScheme, PrefixIds
from subnibble.tensor.scheme import Scheme
from subnibble.transforms.absorb import has_source
from subnibble.transforms.rotate import Rotation, make_rotation
from subnibble.transforms.rotate_values import ValueRotation


@dataclass(frozen=True)
class Plan:
    """How each linear and the KV cache are quantized.

    schemes: module path of a linear -> scheme of its weight, None if it is not quantized.
    activations: module path of a linear -> scheme of its input, None if it is not quantized.
    cache: scheme of keys and values, None if they are not quantized.
    """

    schemes: Mapping[str, Scheme | None]
    activations: Mapping[str, ActivationScheme | None]
    cache: CacheScheme | None = None

    def of_block(self, block: Block) -> tuple[dict[str, Scheme | None], dict[str, ActivationScheme | None]]:
        """`schemes` and `activations` of one block, by the linears' names relative to the block."""
        names = block.arch.linears
        return (
            {name: self.schemes[f"{block.path}.{name}"] for name in names},
            {name: self.activations[f"{block.path}.{name}"] for name in names},
        )


@dataclass(frozen=True)
class Resolved:
    """A recipe for one model, after the checks of `check.resolve`.

    recipe: the recipe with all open values filled in.
    steps: what the method does.
    skeleton: the model without weights, and its source.
    plan: how linears and KV cache are quantized.
    rotation: rotation of the residual stream, or None.
    value_rotation: rotation of the values within each head, or None.
    prefix: token ids of the system prompt, None if there is none or if `survey` will find it ("auto").
    """

    recipe: Recipe
    steps: Steps
    skeleton: Skeleton
    plan: Plan
    rotation: Rotation | None
    value_rotation: ValueRotation | None
    prefix: PrefixIds | None


def plan_schemes(recipe: Recipe, steps: Steps, skeleton: Skeleton) -> dict[str, Scheme | None]:
    """Plan the weights: module path of each linear -> scheme of its weight.

    The scheme is None if an override skips the linear or the method quantizes no weights.
    """
    paths = skeleton.linear_shapes()
    if steps.rounds_no_weights:
        return dict.fromkeys(paths)
    return {path: recipe.scheme_of(path, partial(steps.prefers, skeleton.site_of(path).name)) for path in paths}


def plan_inputs(
    recipe: Recipe, steps: Steps, schemes: Mapping[str, Scheme | None]
) -> dict[str, ActivationScheme | None]:
    """Plan the inputs: module path of each linear -> scheme of its input, None if the input is not quantized.

    schemes: module path of each linear -> scheme of its weight, or None.
    """
    activations: dict[str, ActivationScheme | None] = dict.fromkeys(schemes)
    for path, scheme in schemes.items():
        activation = None if scheme is None else recipe.activation_of(path, scheme)
        activations[path] = None if activation is None else steps.correction.inputs(activation)
    return activations


def plan_rotation(recipe: Recipe, steps: Steps, skeleton: Skeleton) -> Rotation | None:
    """Build the rotation of the residual stream, None if the method has none. Raises the errors of `make_rotation`."""
    width = skeleton.config.hidden_size
    return make_rotation(steps.rotation, width, recipe.scheme, recipe.seed, skeleton.device)


def needs_data(recipe: Recipe, steps: Steps) -> bool:
    """Whether the method, the distillation or the KV cache needs calibration text."""
    cache = recipe.cache_scheme(steps.cache)
    return steps.needs_data or recipe.distillation is not None or (cache is not None and cache.is_centered)


def stores_column_scales(steps: Steps, schemes: Mapping[str, Scheme | None], skeleton: Skeleton, path: str) -> bool:
    """Whether the linear at `path` stores column scales, because they cannot be absorbed upstream.

    Ignores two cases, which shapes do not show: column scales that are too large to be absorbed, and upstream weights
    whose scales are powers of two (E8M0).
    """
    scheme, site = schemes[path], skeleton.site_of(path)
    if scheme is None or not steps.rounder_of(site.name).has_column_scales:
        return False
    block = next(path.removesuffix(name) for name in site.readers if path.endswith(f".{name}"))
    share_scheme = {schemes[f"{block}{name}"] for name in site.readers} == {scheme}
    return not (share_scheme and has_source(site, Heads.of(skeleton.config)))

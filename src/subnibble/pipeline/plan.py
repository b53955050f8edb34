"""What a recipe and a method come to on a model, from shapes alone: how each linear and the cache are coded.

`check.py` says whether they may.
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


@dataclass(frozen=True)
class Resolved:
    """A recipe on a model, as `check.resolve` admits it.

    recipe: with everything filled in that was left open. rotation: of the residual stream; values: of heads' values;
    None for none. prefix: the system prompt's, None for none and for one that is yet to be found.
    """

    recipe: Recipe
    steps: Steps
    skeleton: Skeleton
    plan: Plan
    rotation: Rotation | None
    values: ValueRotation | None
    prefix: PrefixIds | None


def plan_schemes(recipe: Recipe, steps: Steps, skeleton: Skeleton) -> dict[str, Scheme | None]:
    """Path of each linear -> its weight's scheme, None where an override skips it or the method leaves weights."""
    paths = skeleton.linear_shapes()
    if steps.leaves_weights:
        return dict.fromkeys(paths)
    return {path: recipe.scheme_of(path, partial(steps.prefers, skeleton.site_of(path).name)) for path in paths}


def plan_inputs(
    recipe: Recipe, steps: Steps, schemes: Mapping[str, Scheme | None]
) -> dict[str, ActivationScheme | None]:
    """Path of each linear -> its input's scheme, None for not at all. schemes: of the weights."""
    found: dict[str, ActivationScheme | None] = dict.fromkeys(schemes)
    for path, scheme in schemes.items():
        inputs = None if scheme is None else recipe.activation_of(path, scheme)
        found[path] = None if inputs is None else steps.correction.inputs(inputs)
    return found


def plan_rotation(recipe: Recipe, steps: Steps, skeleton: Skeleton) -> Rotation | None:
    """The rotation of the residual stream, None for none; raises what `make_rotation` raises."""
    width = skeleton.config.hidden_size
    return make_rotation(steps.rotation, width, recipe.scheme, recipe.seed, skeleton.device)


def needs_data(recipe: Recipe, steps: Steps) -> bool:
    """Whether calibration text is needed."""
    cache = recipe.cache_scheme(steps.cache)
    return steps.needs_data or recipe.distillation is not None or (cache is not None and cache.is_centered)


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

"""What a recipe and a method come to on a model, from shapes alone: each linear's scheme, the bytes of the result."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from subnibble.checkpoint.packed import packed_config_of
from subnibble.checkpoint.source import Source
from subnibble.errors import BadRecipe, CheckpointError, UnsupportedModel
from subnibble.methods.method import Steps
from subnibble.model.skeleton import Skeleton
from subnibble.recipe import Recipe
from subnibble.scheme import Scheme
from subnibble.transforms.rotate import Rotation, can_rotate, make_rotation


def check_plain(source: Source) -> None:
    """Raise `CheckpointError` if the source is quantized already. GGUF files count as plain: they are dequantized."""
    if packed_config_of(source.config) is not None or getattr(source.config, "quantization_config", None):
        raise CheckpointError(f"{source.path} is quantized already; give the original model")


def plan_schemes(recipe: Recipe, steps: Steps, skeleton: Skeleton) -> dict[str, Scheme | None]:
    """Path of each linear -> its scheme, None where an override skips it.

    Raises `BadRecipe` if a group does not fit a linear, an override matches none, or nothing would be quantized.
    """
    shapes = skeleton.linear_shapes()
    recipe.check_overrides(list(shapes))
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


def packed_bytes(recipe: Recipe, steps: Steps, schemes: Mapping[str, Scheme | None], skeleton: Skeleton) -> int:
    """Bytes of the weight files that a recipe will give, headers aside. schemes: see `plan_schemes`."""
    bits = 0
    tables = {f"{skeleton.arch.embedding}.weight", f"{skeleton.arch.head}.weight"}
    shapes = skeleton.parameter_shapes()
    if steps.rotation != "none" and skeleton.tied:
        shapes[f"{skeleton.arch.head}.weight"] = shapes[f"{skeleton.arch.embedding}.weight"]
    for name, shape in shapes.items():
        scheme = recipe.embedding_scheme if name in tables else schemes.get(name.removesuffix(".weight"))
        if scheme is not None:
            bits += shape[0] * scheme.row_bits(shape[1])
        else:
            bits += torch.Size(shape).numel() * (16 if len(shape) > 1 else 32)
    return bits // 8


def effective_bits(schemes: Mapping[str, Scheme | None], skeleton: Skeleton) -> float:
    """Stored bits over weights of all quantized linears, without norm biases and unabsorbed column scales."""
    bits = weights = 0
    for path, (rows, columns) in skeleton.linear_shapes().items():
        scheme = schemes[path]
        if scheme is not None:
            bits += rows * scheme.row_bits(columns)
            weights += rows * columns
    return bits / weights

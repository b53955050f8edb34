"""Compute the size of a packed checkpoint from tensor shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from subnibble.checkpoint.module_specs import PackedLinearSpec
from subnibble.checkpoint.safetensors_source import SafetensorsSource
from subnibble.checkpoint.size import cache_bytes
from subnibble.checkpoint.source import numel
from subnibble.methods.method import Steps
from subnibble.model.skeleton import Skeleton
from subnibble.pipeline.plan import Plan, Resolved, stores_column_scales
from subnibble.recipe import Recipe
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.cache_scheme import PrefixIds
from subnibble.tensor.packed import PackedLayout
from subnibble.tensor.scheme import Scheme
from subnibble.transforms.rotate import block_widths

_FLOAT_BYTES = 4
# Bytes of disk space for JSON files, tokenizer and headers.
_SLACK = 64 * 2**20
# Numbers that distillation's state keeps for each learned value.
_KEPT_COPIES = 4
# Ends of the names of tensors that distillation may learn.
_LEARNED = (".scales", ".zeros", ".column_scale", "norm.weight", "norm.bias")
# Norm biases are stored in float16.
_NORM_BIAS_BITS = 16


def packed_bytes(
    recipe: Recipe,
    steps: Steps,
    plan: Plan,
    skeleton: Skeleton,
    prefix: PrefixIds | None,
) -> int:
    """Bytes of the packed weight files, without headers.

    plan: how each linear is quantized.
    prefix: token ids of the system prompt, whose keys and values are stored in 16 bits, or None.
    """
    schemes = plan.schemes
    states = 0 if prefix is None else round(len(prefix.ids) * cache_bytes(skeleton.config, None))
    bits = 8 * (states + table_bytes(recipe, skeleton))
    bits += sum(_extra_bits(steps, plan, skeleton).values()) + _norm_bias_bits(steps, schemes, skeleton)
    if steps.rotation != "none" and skeleton.tied:
        # The float32 matrix that multiplies the input of a tied head.
        width = skeleton.config.hidden_size
        bits += 32 * width * max(block_widths(steps.rotation, width, recipe.scheme))
    tables = _tables(skeleton)
    for name, shape in skeleton.parameter_shapes().items():
        if name not in tables:
            bits += _stored_bits(shape, schemes.get(name.removesuffix(".weight")))
    return bits // 8


def disk_bytes(resolved: Resolved) -> dict[str, int]:
    """Bytes of disk space that a quantization needs, by part; "peak" is the largest sum at one time.

    The journal keeps the newest activation streams, and writes the next ones before it removes these. It keeps
    distillation's state likewise: parameters, best parameters and two moments of the optimizer.
    """
    recipe, steps, skeleton = resolved.recipe, resolved.steps, resolved.skeleton
    tokens = 0 if recipe.calibration is None else recipe.num_windows * recipe.window
    width = int(skeleton.config.hidden_size)
    stream = tokens * width * torch.empty(0, dtype=skeleton.dtype).element_size()
    prompt = 0 if resolved.prefix is None else len(resolved.prefix.ids) * width * _FLOAT_BYTES
    parts = {
        "checkpoint": packed_bytes(recipe, steps, resolved.plan, skeleton, resolved.prefix),
        "activation streams": 2 * prompt + stream * (2 * (1 + steps.needs_reference) + steps.corrects_norms),
        "distillation": 0,
    }
    if recipe.distillation is not None:
        learned = _FLOAT_BYTES * _num_learned(resolved.plan, skeleton)
        # When it is finished, its result and a new shard are written before the old shard is removed; the largest
        # shard is that of embedding and head, or that of a block.
        largest = max(table_bytes(recipe, skeleton), parts["checkpoint"] // skeleton.num_blocks)
        parts["distillation"] = max(2 * _KEPT_COPIES * learned, learned + largest)
    peak = parts["checkpoint"] + max(parts["activation streams"], parts["distillation"]) + _SLACK
    return {**parts, "peak": peak}


def _num_learned(plan: Plan, skeleton: Skeleton) -> int:
    """Upper bound of the number of values that distillation learns."""
    count = 4 * skeleton.num_blocks * int(skeleton.config.hidden_size)
    for path, (rows, columns) in skeleton.linear_shapes().items():
        scheme = plan.schemes[path]
        if scheme is not None:
            # Scales and zero-points of the weight and of a second matrix of salient columns; column scales.
            count += 4 * rows * scheme.groups(columns) + columns
    return count


def state_bytes(packed: SafetensorsSource) -> int:
    """Bytes of disk space for the state of a distillation of this packed checkpoint, the old and the new one; a bound.

    It counts all scales and zero-points, those of embedding and head too, which are not learned.
    """
    shapes = (packed.shape(name) for name in packed.names() if name.endswith(_LEARNED))
    return 2 * _KEPT_COPIES * _FLOAT_BYTES * sum(numel(shape) for shape in shapes)


def table_bytes(recipe: Recipe, skeleton: Skeleton) -> int:
    """Bytes of embedding and head, which are stored in the last shard."""
    shapes = skeleton.parameter_shapes()
    return sum(_stored_bits(shapes[name], recipe.embedding_scheme) for name in _tables(skeleton) & shapes.keys()) // 8


def _tables(skeleton: Skeleton) -> set[str]:
    """Names of the weights of embedding and head."""
    return {f"{skeleton.arch.embedding}.weight", f"{skeleton.arch.head}.weight"}


def _stored_bits(shape: tuple[int, ...], scheme: Scheme | None) -> int:
    """Bits of a tensor: quantized by `scheme`, or (None) a matrix in 16 bits and a vector in 32 bits."""
    if scheme is not None:
        return shape[0] * scheme.row_bits(shape[1])
    return torch.Size(shape).numel() * (16 if len(shape) > 1 else 32)


def effective_bits(steps: Steps, plan: Plan, skeleton: Skeleton) -> float:
    """Stored bits of all quantized linears over their number of weights; 16 if no linear is quantized.

    Excludes column scales that are too large to be absorbed upstream (rare).
    """
    extra, schemes = _extra_bits(steps, plan, skeleton), plan.schemes
    bits, weights = _norm_bias_bits(steps, schemes, skeleton), 0
    for path, (rows, columns) in skeleton.linear_shapes().items():
        scheme = schemes[path]
        if scheme is not None:
            bits += rows * scheme.row_bits(columns) + extra[path]
            weights += rows * columns
    return bits / weights if weights else 16.0


def activation_bits(steps: Steps, plan: Plan, skeleton: Skeleton) -> float:
    """Bits per input channel of the quantized linears at run time, see `Size`; 16 if no linear is quantized."""
    bits = channels = 0
    for path, (rows, columns) in skeleton.linear_shapes().items():
        scheme = plan.schemes[path]
        if scheme is not None:
            bits += _spec(steps, rows, columns, scheme, plan.activations[path]).token_bits()
            channels += columns
    return bits / channels if channels else 16.0


def _spec(
    steps: Steps, rows: int, columns: int, scheme: Scheme, activation: ActivationScheme | None = None
) -> PackedLinearSpec:
    """The spec of a linear (rows, columns) as the checkpoint will store it, without bias, gather and column scales."""
    spec = PackedLinearSpec(PackedLayout(rows, ((columns, scheme),)), bias=False, activation=activation)
    return steps.correction.planned(spec, scheme)


def _extra_bits(steps: Steps, plan: Plan, skeleton: Skeleton) -> dict[str, int]:
    """Bits that each linear stores besides its main weight, by module path; 0 if it is not quantized."""
    extra: dict[str, int] = {}
    # (block, site) -> specs of readers that store how their input is transformed and quantized.
    firsts: dict[tuple[str, str], list[PackedLinearSpec]] = {}
    for path, (rows, columns) in skeleton.linear_shapes().items():
        scheme, extra[path] = plan.schemes[path], 0
        if scheme is None:
            continue
        site = skeleton.site_of(path)
        gathers = steps.saliency is not None and steps.saliency.gathers(site, site.name in steps.online)
        scales = stores_column_scales(steps, plan.schemes, skeleton, path)
        spec = _spec(steps, rows, columns, scheme, plan.activations[path])
        spec = replace(spec, gather=gathers, column_scale=scales)
        # Readers that treat their input alike share what is stored about it: only the first one stores it.
        block = next(path.removesuffix(name) for name in site.readers if path.endswith(f".{name}"))
        others = firsts.setdefault((block, site.name), [])
        if any(spec.enters_as(other) for other in others):
            spec = replace(spec, input=block)
        else:
            others.append(spec)
        extra[path] = spec.stored_bits - rows * scheme.row_bits(columns)
    return extra


def _norm_bias_bits(steps: Steps, schemes: Mapping[str, Scheme | None], skeleton: Skeleton) -> int:
    """Bits of the norm biases against mean shift: norms after quantized linears of their block, and the final norm."""
    if not steps.corrects_norms:
        return 0
    norms = 1
    for index in range(skeleton.num_blocks):
        block = skeleton.arch.block_path(index)
        any_quantized = False
        for site in skeleton.arch.sites:
            norms += any_quantized and site.norm is not None
            any_quantized = any_quantized or any(schemes[f"{block}.{name}"] is not None for name in site.readers)
    return norms * _NORM_BIAS_BITS * int(skeleton.config.hidden_size)

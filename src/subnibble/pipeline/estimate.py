"""Estimate the size, memory and time of a quantization from tensor shapes, without reading weights."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from subnibble.checkpoint.size import cache_bytes
from subnibble.checkpoint.source import Source, numel
from subnibble.device import free_memory
from subnibble.distill.models import FREE_SHARE, states_bytes
from subnibble.distill.settings import Distillation
from subnibble.methods.method import Steps
from subnibble.model.skeleton import Skeleton
from subnibble.pipeline.check import resolve
from subnibble.pipeline.plan import Resolved
from subnibble.pipeline.size import activation_bits, disk_bytes, effective_bits, packed_bytes
from subnibble.pipeline.windows import batch_bytes
from subnibble.recipe import AnyRecipe, Recipe
from subnibble.tuning.tuning import EFFORTS

_FLOAT_BYTES = 4
# Speed of a whole forward pass as a share of the measured matrix-product speed; rough.
_FORWARD_EFFICIENCY = 0.8
# Cost of a Gram matrix computed in panels up to its diagonal, as a share of the full product.
_GRAM_SHARE = 0.6
# Seconds per weight of a linear, rounded column by column on one CPU core of 2025; rough.
_ROUND_SECONDS = 3.5e-7
# Time of a tuning step over the time of its three products: fake quantization, norms, optimizer. Rough.
_STEP_OVERHEAD = 3.0
# Time of the native decoder step over the time of its products in torch, when the model writes windows. Rough.
_WRITING_OVERHEAD = 2.5
# Float32 copies of a block during a tuning step: intermediate stages of the weights, and gradients. Rough.
_TUNED_COPIES = 12


@dataclass(frozen=True)
class Estimate:
    """Estimated size, memory and time of a quantization.

    parameters: number of parameters of the model.
    file_bytes: bytes of the packed weight files, without headers.
    effective_bits: stored bits per weight of the quantized linears.
    activation_bits: bits per input channel of these linears at run time.
    memory_bytes: bytes of memory by part, with their sum as "peak".
    disk_bytes: bytes of disk space by what needs it while quantizing, and the largest sum at one time as "peak".
    seconds: run time from the speed of a matrix product measured on this machine; right within a factor of about two.
    cache_bytes: bytes of one token in the KV caches of all layers, when the packed model runs.

    file_bytes and effective_bits exclude column scales that are too large to be absorbed upstream: these are rare, and
    cost thousandths of a bit.
    """

    parameters: int
    file_bytes: int
    effective_bits: float
    activation_bits: float
    memory_bytes: dict[str, int]
    disk_bytes: dict[str, int]
    seconds: float
    cache_bytes: float

    def to_dict(self) -> dict[str, object]:
        """Plain dictionary."""
        return asdict(self)


def estimate(model: str | Path | Source, recipe: AnyRecipe) -> Estimate:
    """Estimate size, memory and time of quantizing a model.

    model: folder, hub id, .gguf file, or an open source.
    recipe: a `Recipe`, a table of its keys, or the path of a TOML file.

    Raises the errors that `quantize` would raise for this model and recipe.
    """
    resolved = resolve(model, Recipe.of(recipe))
    recipe, steps, skeleton, plan = resolved.recipe, resolved.steps, resolved.skeleton, resolved.plan
    config = skeleton.source.config
    tokens = recipe.num_windows * recipe.window if recipe.calibration is not None else 0
    return Estimate(
        parameters=sum(numel(shape) for shape in skeleton.parameter_shapes().values()),
        file_bytes=packed_bytes(recipe, steps, plan, skeleton, resolved.prefix),
        effective_bits=effective_bits(steps, plan, skeleton),
        activation_bits=activation_bits(steps, plan, skeleton),
        memory_bytes=_memory(resolved, tokens),
        disk_bytes=disk_bytes(resolved),
        seconds=_seconds(steps, skeleton, tokens, _tuned_tokens(recipe, steps), recipe.distillation)
        + (0.0 if recipe.window_sampling is None else _writing_seconds(skeleton, tokens)),
        cache_bytes=cache_bytes(config, plan.cache),
    )


def _memory(resolved: Resolved, tokens: int) -> dict[str, int]:
    """Bytes by part: this process so far, one block, its statistics, the embedding, the activation streams, tuning.

    tokens: number of calibration tokens.
    """
    recipe, steps, skeleton = resolved.recipe, resolved.steps, resolved.skeleton
    distilled = recipe.distillation
    item = torch.empty(0, dtype=skeleton.dtype).element_size()
    shapes = skeleton.parameter_shapes()
    first = f"{skeleton.arch.block_path(0)}."
    block = sum(numel(shape) for name, shape in shapes.items() if name.startswith(first))
    linears = {p: s for p, s in skeleton.linear_shapes().items() if p.startswith(first)}
    widest = max(columns for _, columns in linears.values())
    tails = [site.readers[0] for site in skeleton.arch.sites if site.tail is not None]
    tail_channels = sum(linears[first + reader][1] for reader in tails)
    hidden = skeleton.config.hidden_size
    has_copy = steps.needs_reference or steps.corrects_norms or steps.needs_survey
    streams = 2 if steps.needs_reference else 1
    parts = {
        "this process now": psutil.Process().memory_info().rss,
        # One float32 copy, one or two in the compute type, and working copies of the largest linear.
        "block": block * (item * (2 if has_copy else 1) + _FLOAT_BYTES)
        + 3 * _FLOAT_BYTES * max(rows * columns for rows, columns in linears.values()),
        "statistics": (3 + streams) * _FLOAT_BYTES * widest**2 if tokens else 0,
        "embedding": numel(shapes[f"{skeleton.arch.embedding}.weight"]) * (_FLOAT_BYTES + 2),
        "activation streams": (streams * (hidden + tail_channels) + hidden * steps.corrects_norms) * tokens * item,
        **_tuning_memory(steps, block, hidden * tokens * item),
    }
    quantizing = sum(parts.values())
    if distilled is not None:
        # Distillation starts after the parts above are freed. It holds the original model, the packed model, both
        # embedding tables, and the logits and activations of one step.
        tables = numel(shapes[f"{skeleton.arch.embedding}.weight"]) * _FLOAT_BYTES
        logits = 4 * distilled.tokens * skeleton.config.vocab_size * _FLOAT_BYTES
        models = sum(numel(shape) for shape in shapes.values()) * (item + 1)
        states = states_bytes(skeleton.num_blocks, distilled.tokens, hidden)
        if states >= FREE_SHARE * free_memory(skeleton.device):
            states = states_bytes(1, distilled.tokens, hidden)
        needed = parts["this process now"] + models + 2 * tables + logits + states
        parts["distillation, beyond that"] = max(0, needed - quantizing)
    if recipe.window_sampling is not None:
        # The whole model writes the windows before anything else is loaded.
        model = sum(numel(shape) for shape in shapes.values()) * item
        writing = parts["this process now"] + model + batch_bytes(skeleton.config, recipe.window, recipe.num_windows)
        parts["writing windows, beyond that"] = max(0, writing - sum(parts.values()))
    return {**parts, "peak": sum(parts.values())}


def _tuning_memory(steps: Steps, block: int, stream: int) -> dict[str, int]:
    """Bytes of a tuned block with its gradients, and of its training samples, {} without tuning.

    block: number of parameters of a block. stream: bytes of all hidden states between two blocks.
    """
    return {} if steps.tuning is None else {"tuning": _TUNED_COPIES * _FLOAT_BYTES * block + 3 * stream}


def _tuned_tokens(recipe: Recipe, steps: Steps) -> int:
    """Number of tokens that each block is trained on, summed over all epochs; 0 without tuning."""
    if steps.tuning is None:
        return 0
    effort = EFFORTS[steps.tuning.effort]
    windows, tokens = min(effort.windows, recipe.num_windows), min(effort.tokens, recipe.window)
    return (effort.first + effort.second) * windows * tokens


def _seconds(steps: Steps, skeleton: Skeleton, tokens: int, tuned_tokens: int, distilled: Distillation | None) -> float:
    """Seconds of the run, from the number of floating-point operations of its matrix products.

    forward pass: 2 per weight and token
    statistic (k, k): 2 k² per token; little more than half of it for a Gram matrix
    tuning: 3 forward passes per token (forward, gradient of inputs, gradient of weights)
    distillation: 5 forward passes per token (these three, the original model, activations computed twice at times)
    """
    speed = _product_speed(skeleton.device, skeleton.dtype)
    float32_speed = _product_speed(skeleton.device, torch.float32)
    shapes = skeleton.linear_shapes()
    weights = sum(rows * columns for rows, columns in shapes.values())
    read_once = {site.readers[0] for site in skeleton.arch.sites}
    grams = sum(s[1] ** 2 for path, s in shapes.items() if path.endswith(tuple(read_once)))
    forward = 2 * weights * tokens / (speed * _FORWARD_EFFICIENCY)
    passes = (2 if steps.needs_reference else 1) + 0.4 * steps.corrects_norms + steps.needs_survey
    passes += steps.orders_residual
    statistics = steps.needs_drift + _GRAM_SHARE * (1 + steps.needs_survey)
    tuning = _STEP_OVERHEAD * 3 * 2 * weights * tuned_tokens / (speed * _FORWARD_EFFICIENCY)
    parameters = sum(numel(shape) for shape in skeleton.parameter_shapes().values())
    learned_tokens = 0 if distilled is None else distilled.steps * distilled.tokens
    tuning += 5 * 2 * parameters * learned_tokens / (float32_speed * _FORWARD_EFFICIENCY)
    return forward * passes + 2 * grams * statistics * tokens / float32_speed + weights * _ROUND_SECONDS + tuning


def _writing_seconds(skeleton: Skeleton, tokens: int) -> float:
    """Seconds in which the model writes calibration windows on the native decoder step."""
    weights = sum(numel(shape) for shape in skeleton.parameter_shapes().values())
    return _WRITING_OVERHEAD * 2 * weights * tokens / _product_speed(skeleton.device, skeleton.dtype)


def _product_speed(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Measured speed of a (size, size) matrix product, in floating-point operations per second."""
    a = torch.ones(size, size, dtype=dtype, device=device)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)

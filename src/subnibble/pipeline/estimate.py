"""What a quantization would take, from shapes alone: no weight is read."""

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
from subnibble.pipeline.size import activation_bits, effective_bits, packed_bytes
from subnibble.recipe import AnyRecipe, Recipe
from subnibble.tuning.tuning import EFFORTS

_FLOAT_BYTES = 4
# Share of the measured product speed that forward passes reach beside their products; rough.
_FORWARD_EFFICIENCY = 0.8
# Of the products of a whole Gram matrix, what its panels up to the diagonal take.
_GRAM_SHARE = 0.6
# Seconds per linear weight for rounding column by column on one core of 2025; rough.
_ROUND_SECONDS = 3.5e-7
# A step of tuning over its three products: fake quantization, norms, the optimizer. Rough.
_STEP_OVERHEAD = 3.0
# Float32 copies of a block that a step of tuning holds: weights as they go through their stages, gradients. Rough.
_TUNED_COPIES = 12


@dataclass(frozen=True)
class Estimate:
    """file_bytes: of the packed weights, headers aside. effective_bits: of quantized linears; both without column
    scales that what writes them cannot take for their size: rare, and thousandths of a bit. activation_bits: of the
    inputs of these linears as they run. memory_bytes: by part, with "peak". cache_bytes: of one token in the KV caches
    of all layers while the result runs.

    seconds: rough, from the speed of one matrix product measured here; within a factor of about two.
    """

    parameters: int
    file_bytes: int
    effective_bits: float
    activation_bits: float
    memory_bytes: dict[str, int]
    seconds: float
    cache_bytes: float

    def to_dict(self) -> dict[str, object]:
        """Plain dictionary."""
        return asdict(self)


def estimate(model: str | Path | Source, recipe: AnyRecipe) -> Estimate:
    """Size, memory and time of quantizing `model` by `recipe`; raises what `quantize` would raise of both."""
    found = resolve(model, Recipe.of(recipe))
    recipe, steps, skeleton, plan = found.recipe, found.steps, found.skeleton, found.plan
    config = skeleton.source.config
    tokens = recipe.num_windows * recipe.window if recipe.calibration is not None else 0
    return Estimate(
        parameters=sum(numel(shape) for shape in skeleton.parameter_shapes().values()),
        file_bytes=packed_bytes(recipe, steps, plan, skeleton, found.prefix),
        effective_bits=effective_bits(steps, plan, skeleton),
        activation_bits=activation_bits(steps, plan, skeleton),
        memory_bytes=_memory(steps, skeleton, tokens, recipe.distillation),
        seconds=_seconds(steps, skeleton, tokens, _tuned_tokens(recipe, steps), recipe.distillation),
        cache_bytes=cache_bytes(config, plan.cache),
    )


def _memory(steps: Steps, skeleton: Skeleton, tokens: int, distilled: Distillation | None) -> dict[str, int]:
    """One block, its statistics, embeddings and the activation streams, on top of what libraries and headers take."""
    item = torch.empty(0, dtype=skeleton.dtype).element_size()
    shapes = skeleton.parameter_shapes()
    first = f"{skeleton.arch.block_path(0)}."
    block = sum(numel(shape) for name, shape in shapes.items() if name.startswith(first))
    linears = {p: s for p, s in skeleton.linear_shapes().items() if p.startswith(first)}
    widest = max(columns for _, columns in linears.values())
    tails = [site.readers[0] for site in skeleton.arch.sites if site.tail is not None]
    kept = sum(linears[first + reader][1] for reader in tails)
    hidden = skeleton.config.hidden_size
    has_twin = steps.needs_reference or steps.corrects_norms or steps.needs_survey
    streams = 2 if steps.needs_reference else 1
    parts = {
        "this process now": psutil.Process().memory_info().rss,
        # In float32 and in the compute type, and one site's readers again with working copies.
        "block": block * (item * (2 if has_twin else 1) + _FLOAT_BYTES)
        + 3 * _FLOAT_BYTES * max(rows * columns for rows, columns in linears.values()),
        "statistics": (3 + streams) * _FLOAT_BYTES * widest**2 if tokens else 0,
        "embedding": numel(shapes[f"{skeleton.arch.embedding}.weight"]) * (_FLOAT_BYTES + 2),
        "activation streams": (streams * (hidden + kept) + hidden * steps.corrects_norms) * tokens * item,
        **_tuning_memory(steps, block, hidden * tokens * item),
    }
    most = sum(parts.values())
    if distilled is not None:
        # After the rest is gone: the original, the packed model's numbers, tables, one step's logits and states.
        tables = numel(shapes[f"{skeleton.arch.embedding}.weight"]) * _FLOAT_BYTES
        logits = 4 * distilled.tokens * skeleton.config.vocab_size * _FLOAT_BYTES
        whole = sum(numel(shape) for shape in shapes.values()) * (item + 1)
        states = states_bytes(skeleton.num_blocks, distilled.tokens, hidden)
        if states >= FREE_SHARE * free_memory(skeleton.device):
            states = states_bytes(1, distilled.tokens, hidden)
        needed = parts["this process now"] + whole + 2 * tables + logits + states
        parts["distillation, beyond that"] = max(0, needed - most)
    return {**parts, "peak": sum(parts.values())}


def _tuning_memory(steps: Steps, block: int, stream: int) -> dict[str, int]:
    """A tuned block with what its gradients need, and the outputs to aim at. stream: bytes of all hidden states."""
    return {} if steps.tuning is None else {"tuning": _TUNED_COPIES * _FLOAT_BYTES * block + 3 * stream}


def _tuned_tokens(recipe: Recipe, steps: Steps) -> int:
    """How many tokens go through each block while it is tuned, forward and back, all epochs taken together."""
    if steps.tuning is None:
        return 0
    effort = EFFORTS[steps.tuning.effort]
    windows, tokens = min(effort.windows, recipe.num_windows), min(effort.tokens, recipe.window)
    return (effort.first + effort.second) * windows * tokens


def _seconds(steps: Steps, skeleton: Skeleton, tokens: int, tuned_tokens: int, distilled: Distillation | None) -> float:
    """Two operations a weight and token for a forward pass, two a token and input pair for each statistic, of which a
    Gram matrix needs little more than half; tuning goes forward, back to inputs and back to weights; distillation
    forward in the original, too, and at times twice.
    """
    speed = _product_speed(skeleton.device, skeleton.dtype)
    exact = _product_speed(skeleton.device, torch.float32)
    shapes = skeleton.linear_shapes()
    weights = sum(rows * columns for rows, columns in shapes.values())
    read_once = {site.readers[0] for site in skeleton.arch.sites}
    grams = sum(s[1] ** 2 for path, s in shapes.items() if path.endswith(tuple(read_once)))
    forward = 2 * weights * tokens / (speed * _FORWARD_EFFICIENCY)
    passes = (2 if steps.needs_reference else 1) + 0.4 * steps.corrects_norms + steps.needs_survey
    passes += steps.orders_residual
    statistics = steps.needs_drift + _GRAM_SHARE * (1 + steps.needs_survey)
    tuning = _STEP_OVERHEAD * 3 * 2 * weights * tuned_tokens / (speed * _FORWARD_EFFICIENCY)
    whole = sum(numel(shape) for shape in skeleton.parameter_shapes().values())
    learned = 0 if distilled is None else distilled.steps * distilled.tokens
    tuning += 5 * 2 * whole * learned / (exact * _FORWARD_EFFICIENCY)
    return forward * passes + 2 * grams * statistics * tokens / exact + weights * _ROUND_SECONDS + tuning


def _product_speed(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Operations a second of a square matrix product, measured."""
    a = torch.ones(size, size, dtype=dtype, device=device)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)

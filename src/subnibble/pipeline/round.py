"""Round a prepared block site by site, in data-flow order: each site sees the rounding error of the sites before it.

Linears that read the same input and share their schemes are stacked and rounded together: their rows are independent.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from subnibble.arch.site import Site
from subnibble.calibrate.prefix import States
from subnibble.corrections.correction import Branch, Correction, Rounded, RoundMain
from subnibble.errors import NumericalFailure
from subnibble.methods.method import Steps
from subnibble.model.skeleton import Block
from subnibble.pipeline.observe import Observed, Quantization, View, Watch, observe
from subnibble.pipeline.passage import Passage
from subnibble.pipeline.plan import Resolved
from subnibble.report import LinearReport
from subnibble.report.clock import Clock
from subnibble.rounding import grid
from subnibble.rounding.error import RelativeError, relative_errors
from subnibble.rounding.rounder import Rounder, Rounding
from subnibble.runtime.kv_cache import CacheQuantizer
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.linear import Linear, PackedWeight, SiteInput
from subnibble.tensor.packed import PackedTensor
from subnibble.tensor.scheme import Scheme
from subnibble.transforms.absorb import can_absorb
from subnibble.transforms.input_basis import InputBasis


@dataclass(frozen=True)
class Stack:
    """Linears of a block that are rounded together, their weights stacked by rows.

    block: module path of the block.
    names: names of the linears in the block.
    heights: number of output rows of each linear.
    scheme: how the weights are quantized.
    activation: how the common input is quantized, or None.
    requantized: number of salient channels whose input is quantized twice; see `SiteInput`.
    where: path of the linears, for errors.
    """

    block: str
    names: tuple[str, ...]
    heights: tuple[int, ...]
    scheme: Scheme
    activation: ActivationScheme | None
    requantized: int
    where: str

    def rows(self, device: torch.device) -> tuple[Tensor, ...]:
        """Row indices of each linear in the stack, (height,) int64 each."""
        rows: tuple[Tensor, ...] = torch.arange(sum(self.heights), device=device).split(list(self.heights))
        return rows


@dataclass(frozen=True)
class RoundedStack:
    """Rounded linears that read one input; all mappings are by name in the block.

    terms: packed linears, without biases and gathers.
    linears: report of each linear, with effective_bits still NaN.
    dense: dequantized weights, (m, k) float32 each, for the input before channel order and Hadamard transform.
    absorbed: column scales (k,) that upstream weights are to absorb, or None.
    """

    terms: Mapping[str, Linear]
    linears: Mapping[str, LinearReport]
    dense: Mapping[str, Tensor]
    absorbed: Tensor | None


@dataclass(frozen=True)
class RoundedBlock:
    """A block whose linears are rounded.

    block: the block after the transforms, float32.
    terms: packed linears by name in the block, without biases and gathers.
    exact: all parameters of the block in float32 by name, transformed but not rounded, and new biases of norms.
    bases: name of a site -> channel order and Hadamard transform of its readers' input.
    absorbed: (site, column scales (channels,)) that the site's upstream weights are to absorb.
    prefix: keys and values of the system prompt, (heads, tokens, width) each, or None.
    cache_quantizer: how the block's KV cache quantizes, or None.
    linears: report of each rounded linear by name, with effective_bits still NaN.
    """

    block: Block
    terms: Mapping[str, Linear]
    exact: Mapping[str, Tensor]
    bases: Mapping[str, InputBasis]
    absorbed: tuple[tuple[Site, Tensor], ...]
    prefix: States | None
    cache_quantizer: CacheQuantizer | None
    linears: Mapping[str, LinearReport]


# A function with the arguments and the result of `round_stack`.
RoundStack = Callable[[Stack, Tensor, Observed, Rounder, Correction], Rounded]


def round_block(
    passage: Passage, resolved: Resolved, rounds: RoundStack, on_site: Callable[[int, str], None]
) -> RoundedBlock:
    """Round all linears of a block that the plan quantizes.

    passage: the windows' forward pass through the block; it gets the dequantized weights.
    resolved: the recipe on the model; its plan has the schemes.
    rounds: rounds one stack of linears.
    on_site: called with the number of finished sites and the name of the last one.
    """
    prepared, plan, steps = passage.prepared, resolved.plan, resolved.steps
    block = prepared.block
    exact = {name: parameter.data for name, parameter in block.module.named_parameters()}
    terms: dict[str, Linear] = {}
    linears: dict[str, LinearReport] = {}
    absorbed: list[tuple[Site, Tensor]] = []
    last_norm = [site for site in block.arch.sites if site.norm is not None][-1]
    keys = {name for site in block.arch.sites for name in site.keys}
    for number, site in enumerate(block.arch.sites, start=1):
        if passage.teacher is not None and site.norm is not None and terms:
            exact[f"{site.norm}.bias"] = passage.shift_norm(site, site.norm, passage.teacher)
        if passage.teacher is not None and site == last_norm and block.index == resolved.skeleton.num_blocks - 1:
            passage.streams.unrounded = passage.outputs()
        for rounded in _round_site(site, passage, resolved, rounds, terms):
            terms |= rounded.terms
            linears |= rounded.linears
            absorbed += [] if rounded.absorbed is None else [(site, rounded.absorbed)]
        if plan.cache is not None and set(site.readers) & keys:
            inputs = _run_time_inputs(terms, keys) if steps.inputs == "exact" else {}
            passage.quantize_cache(plan.cache, inputs, steps.sees_cache)
        on_site(number, f"block {block.index} {site.name}")
    return RoundedBlock(
        block, terms, exact, prepared.bases, tuple(absorbed), prepared.states, passage.cache_quantizer, linears
    )


def _round_site(
    site: Site, passage: Passage, resolved: Resolved, rounds: RoundStack, done: Mapping[str, Linear]
) -> Iterator[RoundedStack]:
    """Observe the site's tensor and round its readers. done: the block's linears rounded so far, by name."""
    prepared, steps = passage.prepared, resolved.steps
    basis, rounder = prepared.bases[site.name], steps.rounder_of(site.name)
    stacks = _stacks(site, prepared.block, resolved)
    views = [_view(stack, steps) for stack in stacks]
    observed = _observe(site, set(views), passage, steps) if stacks and passage.streams.hidden else {}
    for stack, view in zip(stacks, views, strict=True):

        def rounded(weight: Tensor, statistics: Observed, stack: Stack = stack) -> Rounded:
            result = rounds(stack, weight, statistics, rounder, steps.correction)
            _check_column_scales(result[0], rounder, stack.where)
            return result

        def absorbs(column_scales: Tensor, stack: Stack = stack) -> bool:
            weights = {name: linear.weight.main for name, linear in done.items()}
            return can_absorb(site, prepared.block.heads, stack.names, weights, column_scales)

        natural = torch.cat([prepared.block.linear(name).weight.data for name in stack.names])
        statistics = observed.get(view, Observed())
        readers = round_readers(stack, natural, basis, statistics, steps.correction, rounded, absorbs, passage.clock)
        for name, dense in readers.dense.items():
            passage.rounded.put(name, dense, view)
        yield readers


def _observe(site: Site, views: set[View], passage: Passage, steps: Steps) -> dict[View, Observed]:
    """Gather statistics of the site's tensor for each view, before any of its readers is rounded."""
    drift = steps.rounder_of(site.name).needs_drift
    weight = passage.prepared.block.linear(site.readers[0]).weight
    watch = partial(Watch.of, weight.shape[1], weight.device, drift=drift, mean_abs=steps.correction.needs_mean_abs)
    return observe(passage.at(site, drift), views, passage.prepared.bases[site.name], watch, passage.clock)


def _view(stack: Stack, steps: Steps) -> View:
    """How calibration quantizes the stack's input, or None."""
    if steps.inputs == "exact" or stack.activation is None:
        return None
    return stack.activation, stack.requantized


def _run_time_inputs(terms: Mapping[str, Linear], names: set[str]) -> dict[str, Quantization]:
    """Name of a linear -> how its input is quantized at run time.

    Includes those of `names` that are rounded and have a quantized input.

    terms: linears rounded so far, by name.
    names: names of linears.
    """
    inputs = {}
    for name in names & terms.keys():
        site_input = terms[name].input
        if site_input.activation is not None:
            inputs[name] = site_input.activation, site_input.requantized
    return inputs


def _stacks(site: Site, block: Block, resolved: Resolved) -> list[Stack]:
    """Stack the site's readers that share their schemes; readers that the plan skips are left out."""
    groups: dict[tuple[Scheme, ActivationScheme | None], list[str]] = {}
    schemes, activations = resolved.plan.of_block(block)
    for name in site.readers:
        scheme = schemes[name]
        if scheme is not None:
            groups.setdefault((scheme, activations[name]), []).append(name)
    stacks = []
    for (scheme, activation), names in groups.items():
        where = f"{block.path}.{{{', '.join(names)}}}" if len(names) > 1 else f"{block.path}.{names[0]}"
        heights = tuple(block.linear(name).out_features for name in names)
        requantized = 0 if activation is None else resolved.steps.correction.requantized
        stacks.append(Stack(block.path, tuple(names), heights, scheme, activation, requantized, where))
    return stacks


def _check_column_scales(rounding: Rounding, rounder: Rounder, where: str) -> None:
    """Raise `TypeError` if a rounder returns column scales, but its `has_column_scales` is False.

    `Steps` checks `has_column_scales`, because some steps cannot be combined with column scales.
    """
    if rounding.quantized.column_scales is not None and not rounder.has_column_scales:
        name = type(rounder).__name__
        raise TypeError(f"{where}: {name} returned column scales, but its scales_columns is False; let it return True")


def round_readers(
    stack: Stack,
    natural: Tensor,
    basis: InputBasis,
    observed: Observed,
    correction: Correction,
    rounded: Callable[[Tensor, Observed], Rounded],
    absorbs: Callable[[Tensor], bool],
    clock: Clock,
) -> RoundedStack:
    """Round a stack of weights, and measure its errors.

    stack: the linears.
    natural: (m, k) float32, their weights in the natural basis: before channel order and Hadamard transform.
    basis: channel order and Hadamard transform of the input.
    observed: statistics of the input before channel order and Hadamard transform.
    correction: terms besides the codes.
    rounded: rounds a weight (m, k) in the basis, given the statistics in the basis.
    absorbs: whether upstream weights can absorb column scales (k,).
    clock: counts the seconds of each step.

    Raises `NumericalFailure` if the dequantized weight is not finite.
    """
    statistics, start = observed.in_basis(basis), time.perf_counter()
    with clock.step("round"):
        weight = basis.to_basis(natural)
        rounding, main, salient = rounded(weight, statistics)
        column_scales, stored, absorbed = rounding.quantized.column_scales, None, None
        dense = main.dequantize()
        if column_scales is not None:
            if absorbs(column_scales):
                absorbed = column_scales
            else:
                stored = column_scales.to(torch.float16)
                column_scales = stored.float()
            dense = dense * column_scales
        if salient is not None:
            dense[:, : salient.num_columns] += salient.dequantize()
        branches = branches_of(stack, weight - dense, statistics, correction)
        rows = stack.rows(weight.device)
        _add_branches_(dense, rows, branches)
    if not bool(torch.isfinite(dense).all()):
        raise NumericalFailure(
            f"{stack.where}: the rounded weight is not finite, because values exceed the range of their stored type; "
            "use another method, or another grid for these linears by an override"
        )
    seconds = round(time.perf_counter() - start, 3)
    with clock.step("measure error"):
        errors = relative_errors(weight, dense, statistics.gram, stack.heights)
        floors = relative_errors(natural, grid.nearest(natural, stack.scheme), observed.gram, stack.heights)
        dense = basis.natural(dense)
    site = SiteInput(stored, None, basis.blocks, stack.activation, stack.requantized)
    stacked = PackedWeight(main, None, None if salient is None else PackedTensor((salient,)))
    terms = {
        name: Linear(replace(stacked.rows(index), low_rank=branch), site)
        for name, index, branch in zip(stack.names, rows, branches, strict=True)
    }
    notes = {**rounding.notes, **_notes(correction, basis)}
    reports = _reports(stack, terms, errors, floors, seconds, notes)
    weights = {name: dense[index] for name, index in zip(stack.names, rows, strict=True)}
    return RoundedStack(terms, reports, weights, absorbed)


def _reports(
    stack: Stack,
    terms: Mapping[str, Linear],
    errors: Sequence[RelativeError],
    floors: Sequence[RelativeError],
    seconds: float,
    notes: Mapping[str, float],
) -> dict[str, LinearReport]:
    """What the report says of each linear of a stack; `store.py` adds effective_bits.

    errors, floors: of the rounded weights, and of rounding to nearest, in the stack's order.
    """
    return {
        name: LinearReport(
            path=f"{stack.block}.{name}",
            shape=terms[name].weight.main.shape,
            scheme=stack.scheme.name,
            effective_bits=math.nan,
            weight_error=error.weight,
            output_error=error.output,
            nearest_error=floor.output,
            seconds=seconds,
            notes=dict(notes),
        )
        for name, error, floor in zip(stack.names, errors, floors, strict=True)
    }


def round_stack(stack: Stack, weight: Tensor, observed: Observed, rounder: Rounder, correction: Correction) -> Rounded:
    """Round a stack of weights with the method's rounder and correction.

    stack: the linears.
    weight: (m, k) float32, in the basis of the input (after channel order and Hadamard transform).
    observed: statistics of the input, in the same basis.
    rounder: computes the codes.
    correction: adds terms besides the codes.

    Returns the codes with the rounder's notes, the packed weight, and the packed second weight of salient columns or
    None.
    """
    for name, index in zip(stack.names, stack.rows(weight.device), strict=True):
        grid.check_range(weight[index], stack.scheme, f"{stack.where}: {name}" if len(stack.names) > 1 else stack.where)
    main = RoundMain(rounder, stack.scheme, stack.where, observed.drift)
    return correction.round(weight, observed.gram, stack.scheme, main)


def branches_of(stack: Stack, error: Tensor, observed: Observed, correction: Correction) -> list[Branch | None]:
    """The low-rank branch of each linear in the stack, None if the correction adds none.

    error: (m, k) float32, weight minus rounded weight.
    observed: statistics of the input, in the same basis.
    """
    return correction.branches(error.split(list(stack.heights)), observed.gram, observed.mean_abs, stack.scheme)


def _add_branches_(dense: Tensor, rows: tuple[Tensor, ...], branches: list[Branch | None]) -> None:
    """Add the product up @ down of each linear's low-rank branch to its rows of `dense` (m, k)."""
    for index, branch in zip(rows, branches, strict=True):
        if branch is not None:
            dense[index] += branch[1].dequantize() @ branch[0].dequantize()


def _notes(correction: Correction, basis: InputBasis) -> dict[str, float]:
    """Notes for the report on a linear: number of salient channels, number of blocks of the Hadamard transform."""
    counts = {"rank": correction.salient, "hadamard_blocks": len(basis.blocks)}
    return {name: count for name, count in counts.items() if count}

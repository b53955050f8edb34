"""Round a prepared block: site by site in data-flow order, each on what it sees of the sites rounded before.

Linears that read one input by one scheme are rounded on top of each other: their rows are independent.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
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
from subnibble.rounding.error import relative_errors
from subnibble.rounding.rounder import Rounder, Rounding
from subnibble.runtime.kv_cache import Coding
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.linear import Linear, PackedWeight, SiteInput
from subnibble.tensor.packed import PackedTensor
from subnibble.tensor.scheme import Scheme
from subnibble.transforms.absorb import can_absorb
from subnibble.transforms.input_basis import InputBasis


@dataclass(frozen=True)
class Stack:
    """block: path of the block. names: of the linears in it. heights: rows of each. scheme, activation: of weights and
    inputs.

    repeated: see `SiteInput`. where: names them in errors.
    """

    block: str
    names: tuple[str, ...]
    heights: tuple[int, ...]
    scheme: Scheme
    activation: ActivationScheme | None
    repeated: int
    where: str

    def rows(self, device: torch.device) -> tuple[Tensor, ...]:
        """Rows of each linear in the stack, (height,) each."""
        rows: tuple[Tensor, ...] = torch.arange(sum(self.heights), device=device).split(list(self.heights))
        return rows


@dataclass(frozen=True)
class RoundedStack:
    """Readers of one input, by name in their block.

    terms: without biases and gathers. linears: what the report says, without bits. dense: (m, k) float32, what each
    weight stands for on the input as it comes. absorbed: column scales (k,) that the writers of the input are to take,
    or None.
    """

    terms: Mapping[str, Linear]
    linears: Mapping[str, LinearReport]
    dense: Mapping[str, Tensor]
    absorbed: Tensor | None


@dataclass(frozen=True)
class RoundedBlock:
    """A block whose linears are rounded.

    terms: of what was rounded, by name in the block; biases, gathers aside. exact: every parameter in float32, edited
    or not, by name. bases: in which readers meet their inputs, by name of the site. absorbed: column scales (channels,)
    that the writers of a site are to take. prefix: keys and values of the system prompt, (heads, tokens, width), or
    None. coding: how its cache quantizes, or None. linears: what the report says of each, its bits aside.
    """

    block: Block
    terms: Mapping[str, Linear]
    exact: Mapping[str, Tensor]
    bases: Mapping[str, InputBasis]
    absorbed: tuple[tuple[Site, Tensor], ...]
    prefix: States | None
    coding: Coding | None
    linears: Mapping[str, LinearReport]


# Rounds a stack's weight (m, k) float32, as inputs meet it, with what the correction adds; see `round_stack`.
RoundStack = Callable[[Stack, Tensor, Observed, Rounder, Correction], Rounded]


def round_block(
    passage: Passage, resolved: Resolved, rounds: RoundStack, on_site: Callable[[int, str], None]
) -> RoundedBlock:
    """Round the linears of a block; its passage gets them dequantized.

    rounds: how. on_site: is called with how many sites are done, and the name of the last.
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
        for found in _round_site(site, passage, resolved, rounds, terms):
            terms |= found.terms
            linears |= found.linears
            absorbed += [] if found.absorbed is None else [(site, found.absorbed)]
        if plan.cache is not None and set(site.readers) & keys:
            inputs = _unseen_inputs(terms, keys) if steps.inputs == "exact" else {}
            passage.use_cache(plan.cache, inputs, steps.sees_cache)
        on_site(number, f"block {block.index} {site.name}")
    return RoundedBlock(block, terms, exact, prepared.bases, tuple(absorbed), prepared.states, passage.coding, linears)


def _round_site(
    site: Site, passage: Passage, resolved: Resolved, rounds: RoundStack, done: Mapping[str, Linear]
) -> Iterator[RoundedStack]:
    """Observe the site's tensor and round its readers. done: what is rounded by now."""
    prepared, steps = passage.prepared, resolved.steps
    basis, rounder = prepared.bases[site.name], steps.rounder_of(site.name)
    stacks = _stacks(site, prepared.block, resolved)
    views = [_view(stack, steps) for stack in stacks]
    observed = _observe(site, set(views), passage, steps) if stacks and passage.streams.hidden else {}
    for stack, view in zip(stacks, views, strict=True):

        def rounded(weight: Tensor, seen: Observed, stack: Stack = stack) -> Rounded:
            found = rounds(stack, weight, seen, rounder, steps.correction)
            _check_promise(found[0], rounder, stack.where)
            return found

        def absorbs(columns: Tensor, stack: Stack = stack) -> bool:
            weights = {name: own.weight.main for name, own in done.items()}
            return can_absorb(site, prepared.block.heads, stack.names, weights, columns)

        natural = torch.cat([prepared.block.linear(name).weight.data for name in stack.names])
        seen = observed.get(view, Observed())
        found = round_readers(stack, natural, basis, seen, steps.correction, rounded, absorbs, passage.clock)
        for name, dense in found.dense.items():
            passage.put(name, dense, view)
        yield found


def _observe(site: Site, views: set[View], passage: Passage, steps: Steps) -> dict[View, Observed]:
    """Statistics of the site's tensor in each view, before any of its readers is rounded."""
    drift = steps.rounder_of(site.name).needs_drift
    weight = passage.prepared.block.linear(site.readers[0]).weight
    watch = partial(Watch.of, weight.shape[1], weight.device, drift=drift, sizes=steps.correction.needs_sizes)
    return observe(passage.at(site, drift), views, passage.prepared.bases[site.name], watch, passage.clock)


def _view(stack: Stack, steps: Steps) -> View:
    """How calibration sees the stack's input."""
    if steps.inputs == "exact" or stack.activation is None:
        return None
    return stack.activation, stack.repeated


def _unseen_inputs(terms: Mapping[str, Linear], names: set[str]) -> dict[str, Quantization]:
    """How the running model quantizes the inputs of linears that are rounded."""
    found = {}
    for name in names & terms.keys():
        own = terms[name].input
        if own.activation is not None:
            found[name] = own.activation, own.repeated
    return found


def _stacks(site: Site, block: Block, resolved: Resolved) -> list[Stack]:
    """The readers to round, together where they share schemes; skipped ones are left out."""
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
        repeated = 0 if activation is None else resolved.steps.correction.repeated
        stacks.append(Stack(block.path, tuple(names), heights, scheme, activation, repeated, where))
    return stacks


def _check_promise(rounding: Rounding, rounder: Rounder, where: str) -> None:
    """Raise `TypeError` if a rounder scaled columns that does not say so: it may be where they meet others."""
    if rounding.quantized.columns is not None and not rounder.scales_columns:
        name = type(rounder).__name__
        raise TypeError(f"{where}: {name} scales columns, and its scales_columns says that it does not")


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
    """Round a stack of weights.

    natural: (m, k) float32, on inputs as they come. basis: in which inputs meet them. observed: of the input as it
    comes. rounded: rounds a weight in that basis. absorbs: whether column scales (k,) can be taken by who writes the
    input.
    """
    seen, start = observed.seen_in(basis), time.perf_counter()
    with clock.step("round"):
        weight = basis.columns(natural)
        rounding, whole, salient = rounded(weight, seen)
        columns, stored, absorbed = rounding.quantized.columns, None, None
        dense = whole.dequantize()
        if columns is not None:
            if absorbs(columns):
                absorbed = columns
            else:
                stored = columns.to(torch.float16)
                columns = stored.float()
            dense = dense * columns
        if salient is not None:
            dense[:, : salient.columns] += salient.dequantize()
        branches = branches_of(stack, weight - dense, seen, correction)
        rows = stack.rows(weight.device)
        _add_branches_(dense, rows, branches)
    if not bool(torch.isfinite(dense).all()):
        raise NumericalFailure(
            f"{stack.where}: the rounded weight is not finite: numbers leave the types they are stored in; "
            "use another method or grid there, by an override"
        )
    seconds = round(time.perf_counter() - start, 3)
    with clock.step("measure error"):
        errors = relative_errors(weight, dense, seen.gram, stack.heights)
        floors = relative_errors(natural, grid.nearest(natural, stack.scheme), observed.gram, stack.heights)
        dense = basis.natural(dense)
    site = SiteInput(stored, None, basis.blocks, stack.activation, stack.repeated)
    stacked = PackedWeight(whole, None, None if salient is None else PackedTensor((salient,)))
    terms = {
        name: Linear(replace(stacked.rows(index), low_rank=branch), site)
        for name, index, branch in zip(stack.names, rows, branches, strict=True)
    }
    linears = {
        name: LinearReport(
            path=f"{stack.block}.{name}",
            shape=terms[name].weight.main.shape,
            scheme=stack.scheme.name,
            # Known once it is stored: see `store.py`.
            effective_bits=math.nan,
            weight_error=error.weight,
            output_error=error.output,
            nearest_error=floor.output,
            seconds=seconds,
            notes={**rounding.notes, **_notes(correction, basis)},
        )
        for name, error, floor in zip(stack.names, errors, floors, strict=True)
    }
    return RoundedStack(
        terms, linears, {name: dense[index] for name, index in zip(stack.names, rows, strict=True)}, absorbed
    )


def round_stack(stack: Stack, weight: Tensor, seen: Observed, rounder: Rounder, correction: Correction) -> Rounded:
    """Round a stack of weights (m, k) float32, as inputs meet it, with what the correction adds."""
    for name, index in zip(stack.names, stack.rows(weight.device), strict=True):
        grid.check_range(weight[index], stack.scheme, f"{stack.where}: {name}" if len(stack.names) > 1 else stack.where)
    main = RoundMain(rounder, stack.scheme, stack.where, seen.drift)
    return correction.round(weight, seen.gram, stack.scheme, main)


def branches_of(stack: Stack, error: Tensor, seen: Observed, correction: Correction) -> list[Branch | None]:
    """The low-rank branch of each linear. error: (m, k), what rounding left."""
    return correction.branches(error.split(list(stack.heights)), seen.gram, seen.sizes, stack.scheme)


def _add_branches_(dense: Tensor, rows: tuple[Tensor, ...], branches: list[Branch | None]) -> None:
    for index, branch in zip(rows, branches, strict=True):
        if branch is not None:
            dense[index] += branch[1].dequantize() @ branch[0].dequantize()


def _notes(correction: Correction, basis: InputBasis) -> dict[str, float]:
    """What the report says of a linear's terms: salient channels, and into how many blocks an online transform fell."""
    found = {"rank": correction.salient, "hadamard_blocks": len(basis.blocks)}
    return {name: count for name, count in found.items() if count}

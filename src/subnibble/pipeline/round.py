"""Linears that read one input by one scheme are rounded on top of each other: their rows are independent."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subnibble.corrections.correction import Branch, Correction, Rounded, RoundMain
from subnibble.errors import NumericalFailure
from subnibble.pipeline.observe import Observed
from subnibble.report import LinearReport
from subnibble.report.clock import Clock
from subnibble.rounding import grid
from subnibble.rounding.error import relative_errors
from subnibble.rounding.rounder import Rounder
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.linear import Linear, PackedWeight, SiteInput
from subnibble.tensor.packed import PackedTensor
from subnibble.tensor.scheme import Scheme
from subnibble.transforms.input_basis import InputBasis


@dataclass(frozen=True)
class Stack:
    """block: path of the block. names: of the linears in it. heights: rows of each. scheme, activation: of weights and
    inputs. repeated: see `SiteInput`. where: names them in errors.
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
        columns, stored, absorbed = rounding.coded.columns, None, None
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
    second = None if salient is None else PackedTensor((salient,))
    whole_stack = PackedWeight(whole, None, second)
    terms = {
        name: Linear(replace(whole_stack.rows(index), low_rank=branch), site)
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

"""Linears that read one site by one scheme, rounded on top of each other: their rows are independent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.corrections.correction import Branch, Correction, Rounded, RoundMain
from subnibble.pipeline.observe import Observed
from subnibble.rounding import grid
from subnibble.rounding.rounder import Rounder
from subnibble.scheme import ActivationScheme, Scheme


@dataclass(frozen=True)
class Stack:
    """block: path of the block. names: of the linears in it. heights: rows of each. scheme, activation: of weights and
    inputs.

    residual: see `ops.LinearTerms`. where: names them in errors.
    """

    block: str
    names: tuple[str, ...]
    heights: tuple[int, ...]
    scheme: Scheme
    activation: ActivationScheme | None
    residual: str
    where: str

    def rows(self, device: torch.device) -> tuple[Tensor, ...]:
        """Rows of each linear in the stack, (height,) each."""
        rows: tuple[Tensor, ...] = torch.arange(sum(self.heights), device=device).split(list(self.heights))
        return rows


def round_stack(stack: Stack, weight: Tensor, seen: Observed, rounder: Rounder, correction: Correction) -> Rounded:
    """Round a stack of weights (m, k) float32, as inputs meet it, with what the correction adds."""
    for name, index in zip(stack.names, stack.rows(weight.device), strict=True):
        grid.check_range(weight[index], stack.scheme, f"{stack.where}: {name}" if len(stack.names) > 1 else stack.where)
    main = RoundMain(rounder, stack.scheme, stack.where, seen.drift)
    return correction.round(weight, seen.gram, stack.scheme, main)


def branches_of(stack: Stack, error: Tensor, seen: Observed, correction: Correction) -> list[Branch | None]:
    """The low-rank branch of each linear. error: (m, k), what rounding left."""
    return correction.branches(error.split(list(stack.heights)), seen.gram, seen.sizes, stack.scheme)

"""Linears that read one site by one scheme, rounded on top of each other: their rows are independent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subnibble.calibrate.stats import AbsMean, Drift, Gram
from subnibble.corrections.low_rank import LowRank
from subnibble.corrections.outliers import OutlierColumns
from subnibble.corrections.salient import SalientColumns
from subnibble.errors import NumericalFailure
from subnibble.methods.method import Correction
from subnibble.rounding.gptq import GPTQ
from subnibble.rounding.rounder import Rounder, Rounding
from subnibble.scheme import ActivationScheme, Scheme
from subnibble.tensor import PackedRange, PackedTensor
from subnibble.transforms.input_basis import InputBasis

# The packed factors of a low-rank branch, down and up.
Branch = tuple[PackedTensor, PackedTensor]
# How calibration sees an input: quantized by a scheme, so many salient channels twice; None for as it is.
View = tuple[ActivationScheme, int] | None


@dataclass(frozen=True)
class Observed:
    """Statistics of a site's tensor, each None if it is not needed; see `Rounder`. sizes: (k,), mean magnitudes."""

    gram: Tensor | None = None
    drift: Tensor | None = None
    sizes: Tensor | None = None

    def seen_in(self, basis: InputBasis) -> Observed:
        """The same in another basis of the input."""
        gram, drift = (None if matrix is None else basis.both(matrix) for matrix in (self.gram, self.drift))
        return Observed(gram, drift, None if self.sizes is None else basis.columns(self.sizes.unsqueeze(0))[0])


@dataclass(frozen=True)
class Watch:
    """Gathers what `Observed` holds; drift, sizes: None where it is not needed."""

    gram: Gram
    drift: Drift | None
    sizes: AbsMean | None

    def update(self, seen: Tensor, target: Tensor | None) -> None:
        """Add tokens (t, k), and the same in the full-precision model."""
        self.gram.update(seen)
        if self.sizes is not None:
            self.sizes.update(seen)
        if self.drift is not None and target is not None:
            self.drift.update(seen, target)

    @property
    def value(self) -> Observed:
        """The statistics over all tokens seen."""
        drift, sizes = (None if part is None else part.value for part in (self.drift, self.sizes))
        return Observed(self.gram.value, drift, sizes)


@dataclass(frozen=True)
class Stack:
    """names: of the linears in their block. heights: rows of each. scheme, activation: of weights and inputs.

    rank: salient channels, 0 for none. residual: see `ops.LinearTerms`. where: names them in errors.
    """

    names: tuple[str, ...]
    heights: tuple[int, ...]
    scheme: Scheme
    activation: ActivationScheme | None
    rank: int
    residual: str
    where: str

    def rows(self, device: torch.device) -> tuple[Tensor, ...]:
        """Rows of each linear in the stack, (height,) each."""
        rows: tuple[Tensor, ...] = torch.arange(sum(self.heights), device=device).split(list(self.heights))
        return rows


def round_stack(
    stack: Stack, weight: Tensor, seen: Observed, rounder: Rounder, correction: Correction
) -> tuple[Rounding, PackedTensor, PackedRange | None]:
    """How the weights were rounded, packed, and the salient channels' second weight.

    weight: (m, k) float32, as inputs meet it.
    """
    if isinstance(correction, OutlierColumns):

        def round_main(main: Tensor, gram: Tensor | None) -> Rounding:
            return _rounded(stack, rounder, main, replace(seen, gram=gram))

        compensated = seen.gram if rounder.needs_gram else None
        return *correction(weight, compensated, stack.scheme, round_main), None
    rounding, salient = _round_whole(stack, weight, seen, rounder, correction)
    return rounding, PackedTensor((PackedRange.pack(rounding.coded, stack.scheme),)), salient


def _round_whole(
    stack: Stack, weight: Tensor, seen: Observed, rounder: Rounder, correction: Correction
) -> tuple[Rounding, PackedRange | None]:
    if not isinstance(correction, SalientColumns) or stack.rank == 0:
        return _rounded(stack, rounder, weight, seen), None
    if isinstance(rounder, GPTQ) and rounder.needs_drift and seen.gram is not None and seen.drift is not None:
        # What the second weight takes must be part of the target, not of what rounding moves later.
        weight, rounder = rounder.settled(weight, seen.gram, seen.drift, stack.where)
    settled, final = replace(seen, drift=None), rounder
    own = replace(correction, rank=stack.rank)
    return own(weight, seen.gram, stack.scheme, lambda main: _rounded(stack, final, main, settled))


def less_branches(stack: Stack, weight: Tensor, branches: Sequence[Branch | None]) -> Tensor:
    """A weight (m, k) less what the stack's branches add to it; the same tensor where there are none."""
    if not any(branches):
        return weight
    left = weight.clone()
    for index, branch in zip(stack.rows(weight.device), branches, strict=True):
        if branch is not None:
            left[index] -= branch[1].dequantize() @ branch[0].dequantize()
    return left


def branches_of(stack: Stack, error: Tensor, seen: Observed, correction: Correction) -> list[Branch | None]:
    """The low-rank branch of each linear. error: (m, k), what rounding left."""
    if not isinstance(correction, LowRank):
        return [None] * len(stack.names)
    return [correction(error[index], seen.gram, seen.sizes, stack.scheme) for index in stack.rows(error.device)]


def _rounded(stack: Stack, rounder: Rounder, weight: Tensor, seen: Observed) -> Rounding:
    """Round; a failure that does not name its linears gets their names."""
    try:
        return rounder(weight, seen.gram, stack.scheme, stack.where, seen.drift)
    except NumericalFailure as error:
        if str(error).startswith(stack.where):
            raise
        raise NumericalFailure(f"{stack.where}: {error}") from error

"""Linears that read one site by one scheme, rounded on top of each other: their rows are independent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.calibrate.stats import AbsMean, Drift, Gram
from subnibble.corrections.correction import Branch, Correction, Rounded, RoundMain
from subnibble.rounding import grid
from subnibble.rounding.rounder import Rounder
from subnibble.runtime.precision import narrowed
from subnibble.runtime.site_input import SiteInput
from subnibble.scheme import ActivationScheme, Scheme
from subnibble.transforms.input_basis import InputBasis

# How an input is quantized: by a scheme, so many salient channels twice.
Quantization = tuple[ActivationScheme, int]
# How calibration sees an input; None for as it is.
View = Quantization | None


def quantized_tokens(x: Tensor, view: Quantization, basis: InputBasis) -> Tensor:
    """What an input (..., k) stands for once it is quantized, exactly: (t, k) float32, in its own basis.

    bfloat16 would round 8-bit numbers times their scales by up to half of their step. The remainder of salient channels
    counts as if it met both their weights, of which it meets the coarse one.
    """
    scheme, repeated = view
    own = SiteInput(None, basis.order, basis.blocks, scheme, repeated)
    return basis.natural(own.apply(x).values())


def quantized_input(x: Tensor, view: Quantization, basis: InputBasis) -> Tensor:
    """The same in x's type and shape, for a block that runs in that type."""
    return narrowed(quantized_tokens(x, view, basis), x.dtype).view(x.shape)


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

    residual: see `ops.LinearTerms`. where: names them in errors.
    """

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

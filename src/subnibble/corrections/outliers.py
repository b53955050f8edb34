"""Outlier channels in 8 bits (Atom, Zhao et al., arXiv 2310.19102): a linear's last input columns, and their inputs.

R are the outlier columns, S the columns before them, G the Gram matrix, Q rounding. Round S with the Schur complement
G_S' of G; add the least-squares correction of its error to R; then round R to 8 bits. This equals GPTQ over S, then R:

    G_S' = G_SS - G_SR (G_RR + d)^-1 G_RS;    W_R' = W_R + (W_S - Q(W_S)) G_SR (G_RR + d)^-1
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from subnibble.checkpoint.module_specs import PackedLinearSpec
from subnibble.corrections.correction import Correction, Rounded, RoundMain
from subnibble.errors import BadRecipe
from subnibble.rounding import grid
from subnibble.rounding.grid import Clip
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.groups import WHOLE_CHANNEL
from subnibble.tensor.packed import PackedLayout, PackedRange, PackedTensor
from subnibble.tensor.scheme import Scheme

_DAMPING = 0.01


@dataclass(frozen=True)
class OutlierColumns(Correction):
    """Outlier columns in 8 bits, symmetric: one scale per row for weights, one per token for inputs.

    count: number of outlier columns.
    """

    needs_data: ClassVar[bool] = True

    count: int = 128

    def __post_init__(self) -> None:
        if self.count < 1:
            raise BadRecipe(f"outliers is {self.count}; give a positive number of channels")

    @property
    def outliers(self) -> int:
        """Number of outlier columns."""
        return self.count

    def check(self, columns: int, scheme: Scheme, where: str) -> None:
        """Raise `BadRecipe` on an mxfp4 grid, or if no column is left for the main weight; see `Correction`."""
        if scheme.grid == "mxfp4":
            raise BadRecipe(f"outlier channels have no codes beside an mxfp4 grid ({where}); use a uniform grid")
        if self.count >= columns:
            raise BadRecipe(
                f"{self.count} outlier channels leave none of the {columns} inputs of {where} to quantize; "
                f"use at most {columns - 1}"
            )

    def scheme(self, weight: Scheme) -> Scheme:
        """The scheme of the outlier columns. weight: scheme of the main weight."""
        return Scheme(8, WHOLE_CHANNEL, "none", weight.scale_type)

    def schemes(self, weight: Scheme) -> tuple[Scheme, ...]:
        """The scheme of the outlier columns. weight: scheme of the main weight."""
        return (self.scheme(weight),)

    def inputs(self, scheme: ActivationScheme) -> ActivationScheme:
        """The activation scheme with the outlier channels in 8 bits."""
        return replace(scheme, outliers=self.count)

    def planned(self, spec: PackedLinearSpec, weight: Scheme) -> PackedLinearSpec:
        """The spec with the last columns in 8 bits, from shapes alone; see `Correction`."""
        ranges = (spec.layout.num_columns - self.count, weight), (self.count, self.scheme(weight))
        return replace(spec, layout=PackedLayout(spec.layout.rows, ranges))

    def round(self, weight: Tensor, gram: Tensor | None, scheme: Scheme, round_main: RoundMain) -> Rounded:
        """Round the main columns, then the outliers; see `Correction`.

        The outliers compensate for the main columns' error only if the rounder uses the Gram matrix, too.
        """
        split = weight.shape[1] - self.count
        compensation = schur = None
        if gram is not None and round_main.needs_gram:
            compensation = _compensation(gram, split)
            schur = gram[:split, :split] - compensation @ gram[split:, :split]
        rounding = round_main(weight[:, :split].contiguous(), schur)
        main = PackedRange.pack(rounding.quantized, scheme)
        outliers = weight[:, split:]
        if compensation is not None:
            outliers = outliers + (weight[:, :split] - main.dequantize()) @ compensation.to(outliers.dtype)
        outlier_scheme = self.scheme(scheme)
        outlier_range = PackedRange.pack(grid.quantized(outliers, outlier_scheme, Clip("minmax")), outlier_scheme)
        return rounding, PackedTensor((main, outlier_range)), None

    def outlier_weight(self, weight: Tensor, scheme: Scheme) -> Tensor:
        """The outlier columns of `weight` (m, k), rounded and dequantized: (m, count)."""
        return grid.nearest(weight[:, -self.count :], self.scheme(scheme))


def _compensation(gram: Tensor, split: int) -> Tensor:
    """G_SR (G_RR + d)^-1, (split, count): how much of each main column's error each outlier column compensates."""
    g_rr = gram[split:, split:].double()
    mean = float(g_rr.diagonal().mean())
    if not mean > 0:
        return torch.zeros(split, g_rr.shape[0], dtype=gram.dtype, device=gram.device)
    damped = g_rr + _DAMPING * mean * torch.eye(g_rr.shape[0], dtype=g_rr.dtype, device=g_rr.device)
    compensation: Tensor = torch.linalg.solve(damped, gram[split:, :split].double()).T
    return compensation.to(gram.dtype)

"""Outlier channels at 8 bits (Atom, Zhao et al., arXiv 2310.19102): a linear's last input columns, and their inputs.

With S the columns before and R the outliers, S is rounded as if R could make up for all of its error that it can, and
then R takes what it can before it goes to 8 bits, which is what error compensation over S, then R, amounts to:

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
from subnibble.tensor.packed import PackedLayout, PackedRange, PackedTensor
from subnibble.tensor.scheme import WHOLE_CHANNEL, Scheme

_DAMPING = 0.01


@dataclass(frozen=True)
class OutlierColumns(Correction):
    """count: columns at 8 bits, symmetric, one scale a row; of inputs, one scale a token."""

    needs_data: ClassVar[bool] = True

    count: int = 128

    def __post_init__(self) -> None:
        if self.count < 1:
            raise BadRecipe(f"outliers is {self.count}; give a positive number of channels")

    @property
    def outliers(self) -> int:
        """See `Correction`."""
        return self.count

    def check(self, columns: int, scheme: Scheme, where: str) -> None:
        """See `Correction`: something must be left, on a uniform grid."""
        if scheme.grid == "mxfp4":
            raise BadRecipe(f"outlier channels have no codes beside an mxfp4 grid ({where}); use a uniform grid")
        if self.count >= columns:
            raise BadRecipe(
                f"{self.count} outlier channels leave none of the {columns} inputs of {where} to quantize; "
                f"use at most {columns - 1}"
            )

    def scheme(self, weight: Scheme) -> Scheme:
        """That of the outliers beside weights of `weight`."""
        return Scheme(8, WHOLE_CHANNEL, "none", weight.scale_type)

    def schemes(self, weight: Scheme) -> tuple[Scheme, ...]:
        """See `Correction`."""
        return (self.scheme(weight),)

    def inputs(self, scheme: ActivationScheme) -> ActivationScheme:
        """See `Correction`."""
        return replace(scheme, outliers=self.count)

    def planned(self, spec: PackedLinearSpec, weight: Scheme) -> PackedLinearSpec:
        """See `Correction`."""
        parts = (spec.layout.columns - self.count, weight), (self.count, self.scheme(weight))
        return replace(spec, layout=PackedLayout(spec.layout.rows, parts))

    def round(self, weight: Tensor, gram: Tensor | None, scheme: Scheme, round_main: RoundMain) -> Rounded:
        """See `Correction`; outliers make up for error where rounding does."""
        split = weight.shape[1] - self.count
        share = seen = None
        if gram is not None and round_main.needs_gram:
            share = _share(gram, split)
            seen = gram[:split, :split] - share @ gram[split:, :split]
        rounding = round_main(weight[:, :split].contiguous(), seen)
        main = PackedRange.pack(rounding.quantized, scheme)
        rest = weight[:, split:]
        if share is not None:
            rest = rest + (weight[:, :split] - main.dequantize()) @ share.to(rest.dtype)
        own = self.scheme(scheme)
        last = PackedRange.pack(grid.quantized(rest, own, Clip("minmax")), own)
        return rounding, PackedTensor((main, last)), None

    def last(self, weight: Tensor, scheme: Scheme) -> Tensor:
        """See `Correction`."""
        return grid.nearest(weight[:, -self.count :], self.scheme(scheme))


def _share(gram: Tensor, split: int) -> Tensor:
    """G_SR (G_RR + d)^-1, (split, count): how much of each column's error each outlier can take."""
    part = gram[split:, split:].double()
    mean = float(part.diagonal().mean())
    if not mean > 0:
        return torch.zeros(split, part.shape[0], dtype=gram.dtype, device=gram.device)
    damped = part + _DAMPING * mean * torch.eye(part.shape[0], dtype=part.dtype, device=part.device)
    found: Tensor = torch.linalg.solve(damped, gram[split:, :split].double()).T
    return found.to(gram.dtype)

"""Saliency-aware error reconstruction (SERQ, arXiv 2603.08185): the r salient input channels get a second weight.

With W (m, k) in the order of falling saliency (`transforms/input_basis.py`), W_s its first r columns, and Q rounding,

    R = Q(W_s);  main = round([W_s - R, rest]);  y = main x + R x_s       (the released program, and appendix A.3)

Both are read by the same quantized input, so R is r more columns of one product. It holds the coarse part, so that
rounding with error compensation starts with small, finely coded residuals; R as the residual of the rounded W
(equations 5 to 7) is the same where r is a multiple of the group size and rounding is to nearest, and loses with
error compensation, since it takes back what that moved to other columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from subnibble.checkpoint.module_specs import PackedLinearSpec
from subnibble.corrections.correction import Correction, Rounded, RoundMain
from subnibble.errors import BadRecipe
from subnibble.rounding import grid
from subnibble.rounding.levels import Fitter
from subnibble.tensor.packed import PackedLayout, PackedRange, PackedTensor
from subnibble.tensor.scheme import Scheme

# What meets the remainder of the salient channels' quantized inputs: nothing, or their second weight.
RESIDUALS = ("none", "salient")


@dataclass(frozen=True)
class SalientColumns(Correction):
    """rank: r. fitter: of R's grids. residual: "salient" runs the remainder of the quantized salient channels through
    the coarse weight, too: twice r more columns of the product, no more weights.
    """

    needs_data: ClassVar[bool] = True

    rank: int
    fitter: Fitter = field(default_factory=grid.Clip)
    residual: str = "none"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise BadRecipe(f"rank is {self.rank}; give a positive number of salient channels")
        if self.residual not in RESIDUALS:
            raise BadRecipe(f"residual is {self.residual!r}; choose one of {', '.join(RESIDUALS)}")

    @property
    def salient(self) -> int:
        """See `Correction`."""
        return self.rank

    @property
    def repeated(self) -> int:
        """See `Correction`."""
        return 0 if self.residual == "none" else self.rank

    def check(self, columns: int, scheme: Scheme, where: str) -> None:
        """See `Correction`."""
        if self.rank > columns:
            raise BadRecipe(
                f"rank {self.rank} is larger than the {columns} inputs of {where}; use at most {columns} salient "
                "channels"
            )

    def schemes(self, weight: Scheme) -> tuple[Scheme, ...]:
        """See `Correction`: R is coded as the main matrix is."""
        return (weight,)

    def planned(self, spec: PackedLinearSpec, weight: Scheme) -> PackedLinearSpec:
        """See `Correction`."""
        repeated = 0 if spec.activation is None else self.repeated
        return replace(spec, salient=PackedLayout(spec.layout.rows, ((self.rank, weight),)), repeated=repeated)

    def round(self, weight: Tensor, gram: Tensor | None, scheme: Scheme, round_main: RoundMain) -> Rounded:
        """See `Correction`."""
        salient = PackedRange.pack(grid.quantized(weight[:, : self.rank], scheme, self.fitter), scheme)
        rest = weight.clone()
        rest[:, : self.rank] -= salient.dequantize()
        rounding = round_main(rest, gram)
        return rounding, PackedTensor((PackedRange.pack(rounding.quantized, scheme),)), salient

    def second(self, weight: Tensor, scheme: Scheme) -> Tensor:
        """See `Correction`."""
        return grid.nearest(weight[:, : self.rank], scheme, self.fitter)

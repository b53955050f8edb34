"""Saliency-aware error reconstruction (SERQ, arXiv 2603.08185): the r salient input channels get a second weight.

W (m, k) has its columns in descending order of saliency (`transforms/input_basis.py`), W_s are its first r columns, W_o
the others, and Q is rounding:

    R = Q(W_s);  main = round([W_s - R, W_o]);  y = main x + R x_s       (the released program, and appendix A.3)

Both weights read the same quantized input, so R adds r columns to one matrix product. R holds the coarse part, so that
error compensation starts with small, finely quantized residuals. In equations 5 to 7, R is instead the residual of the
rounded W. That is the same if rounding is to nearest and r a multiple of the group size. With error compensation it is
worse: R takes back the error that was moved to other columns.
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

# Which weight multiplies the quantization error of the salient channels' inputs (quantized again): none, or R.
RESIDUALS = ("none", "salient")


@dataclass(frozen=True)
class SalientColumns(Correction):
    """A second weight R for the salient channels.

    rank: r, number of salient channels.
    fitter: fits R's grids.
    residual: "none", or "salient": quantize the remainder (input minus quantized input) of the salient channels and
        multiply it by R, too. The product then has 2 r more columns instead of r, with no more weights.
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
        """Number of salient channels."""
        return self.rank

    @property
    def requantized(self) -> int:
        """Number of salient channels if their remainder is quantized, too; otherwise 0."""
        return 0 if self.residual == "none" else self.rank

    def check(self, columns: int, scheme: Scheme, where: str) -> None:
        """Raise `BadRecipe` if there are more salient channels than columns; see `Correction`."""
        if self.rank > columns:
            raise BadRecipe(
                f"rank {self.rank} is larger than the {columns} inputs of {where}; use at most {columns} salient "
                "channels"
            )

    def schemes(self, weight: Scheme) -> tuple[Scheme, ...]:
        """The scheme of R, that of the main weight."""
        return (weight,)

    def planned(self, spec: PackedLinearSpec, weight: Scheme) -> PackedLinearSpec:
        """The spec with R, from shapes alone; see `Correction`."""
        requantized = 0 if spec.activation is None else self.requantized
        return replace(spec, salient=PackedLayout(spec.layout.rows, ((self.rank, weight),)), requantized=requantized)

    def round(self, weight: Tensor, gram: Tensor | None, scheme: Scheme, round_main: RoundMain) -> Rounded:
        """Round R, then the main weight without R; see `Correction`."""
        salient = PackedRange.pack(grid.quantized(weight[:, : self.rank], scheme, self.fitter), scheme)
        main = weight.clone()
        main[:, : self.rank] -= salient.dequantize()
        rounding = round_main(main, gram)
        return rounding, PackedTensor((PackedRange.pack(rounding.quantized, scheme),)), salient

    def salient_weight(self, weight: Tensor, scheme: Scheme) -> Tensor:
        """R of `weight` (m, k), dequantized: (m, rank)."""
        return grid.nearest(weight[:, : self.rank], scheme, self.fitter)

"""Saliency-aware error reconstruction (SERQ, arXiv 2603.08185): the r salient input channels get a second weight.

With W (m, k) in the order of falling saliency (`transforms/input_basis.py`), W_s its first r columns, and Q rounding,

    before   R = Q(W_s);  main = round([W_s - R, rest])              (the released program, and appendix A.3)
    after    main = round(W);  R = Q(W_s - main_s)                   (equations 5 to 7)
    fitted   main = round(W);  R = Q((E G_:s + d E_s) (G_ss + d)^-1), E = W - main    (least squares on the inputs)

and y = main x + R x_s: both are read by the same quantized input, so R is r more columns of one product. `before` keeps
the coarse part in R: rounding with error compensation then starts with small, finely coded residuals. Where r is a
multiple of the group size and rounding is to nearest, `before` and `after` are the same numbers; where it is not,
`after` and `fitted` would share a group between salient and other columns, and are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from subnibble.checkpoint.entries import PackedLinearEntry
from subnibble.corrections.correction import Correction, Rounded, RoundMain
from subnibble.errors import BadRecipe
from subnibble.rounding import grid
from subnibble.rounding.levels import Fitter
from subnibble.scheme import WHOLE_CHANNEL, Scheme
from subnibble.tensor import PackedLayout, PackedRange, PackedTensor

FORMS = ("before", "after", "fitted")
# What the quantized input's remainder on the salient channels is multiplied with: nothing, or the coarse weight.
RESIDUALS = ("none", "salient")
_DAMPING = 0.01


@dataclass(frozen=True)
class SalientColumns(Correction):
    """rank: r. form: see the module. fitter: of R's grids. residual: "salient" runs the remainder of the
    quantized salient channels through the coarse weight, too: twice r more columns of the product, no more weights.
    """

    noun: ClassVar[str] = "salient columns"
    # What a second weight takes must be known before; see `round_stack`.
    asymmetries: ClassVar[tuple[str, ...]] = ("none", "shifted")
    needs_data: ClassVar[bool] = True

    rank: int
    form: str = "before"
    fitter: Fitter = field(default_factory=grid.Clip)
    residual: str = "none"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise BadRecipe(f"rank is {self.rank}; give a positive number of salient channels")
        if self.form not in FORMS:
            raise BadRecipe(f"form is {self.form!r}; choose one of {', '.join(FORMS)}")
        if self.residual not in RESIDUALS:
            raise BadRecipe(f"residual is {self.residual!r}; choose one of {', '.join(RESIDUALS)}")

    @property
    def salient(self) -> int:
        """See `Correction`."""
        return self.rank

    @property
    def coarse(self) -> str:
        """See `Correction`."""
        if self.residual == "none":
            return "none"
        return "salient" if self.form == "before" else "weight"

    def check(self, columns: int, scheme: Scheme, where: str) -> None:
        """See `Correction`."""
        if self.rank > columns:
            raise BadRecipe(
                f"rank {self.rank} is larger than the {columns} inputs of {where}; use at most {columns} salient "
                "channels"
            )
        width = columns if scheme.group_size == WHOLE_CHANNEL else scheme.group_size
        if self.form != "before" and self.rank % width and self.rank != columns:
            raise BadRecipe(
                f"rank {self.rank} is no multiple of {where}'s group size {width}: form {self.form!r} "
                'would split a group between salient and other channels; use a multiple, or form = "before"'
            )

    def check_tuned(self) -> None:
        """See `Correction`."""
        if self.form != "before":
            raise BadRecipe('tuning with salient columns needs form = "before"')

    def schemes(self, weight: Scheme) -> tuple[Scheme, ...]:
        """See `Correction`: R is coded as the main matrix is."""
        return (weight,)

    def planned(self, entry: PackedLinearEntry, weight: Scheme) -> PackedLinearEntry:
        """See `Correction`."""
        residual = "none" if entry.activation is None else self.coarse
        return replace(entry, salient=PackedLayout(entry.layout.rows, ((self.rank, weight),)), residual=residual)

    def round(self, weight: Tensor, gram: Tensor | None, scheme: Scheme, round_main: RoundMain) -> Rounded:
        """See `Correction`."""
        if self.form == "before":
            salient = self._pack(weight[:, : self.rank], scheme)
            rest = weight.clone()
            rest[:, : self.rank] -= salient.dequantize()
            rounding = round_main(rest, gram)
            return rounding, PackedTensor((PackedRange.pack(rounding.coded, scheme),)), salient
        rounding = round_main(weight, gram)
        main = PackedRange.pack(rounding.coded, scheme)
        error = weight - main.dequantize()
        if self.form == "fitted":
            if gram is None:
                raise BadRecipe('form = "fitted" needs calibration text; set calibration')
            taken = least_squares(error, gram, self.rank)
        else:
            taken = error[:, : self.rank]
        return rounding, PackedTensor((main,)), self._pack(taken, scheme)

    def second(self, weight: Tensor, scheme: Scheme) -> Tensor:
        """See `Correction`; in the form `before`."""
        return grid.nearest(weight[:, : self.rank], scheme, self.fitter)

    def _pack(self, matrix: Tensor, scheme: Scheme) -> PackedRange:
        return PackedRange.pack(grid.coded(matrix, scheme, self.fitter), scheme)


def least_squares(error: Tensor, gram: Tensor, rank: int) -> Tensor:
    """R (m, rank) with the least ||error X - R X_s||² + damping, X_s the first rows of X.

    error: (m, k). gram: (k, k) = X Xᵀ. Damping as in GPTQ: 1 % of the mean of the diagonal.
    """
    part = gram[:rank, :rank].double()
    mean = part.diagonal().mean()
    if not float(mean) > 0:
        return error[:, :rank]
    damped = part + _DAMPING * mean * torch.eye(rank, dtype=part.dtype, device=part.device)
    # Towards the plain residual where the inputs say little.
    right = error.double() @ gram[:, :rank].double() + _DAMPING * mean * error[:, :rank].double()
    solved: Tensor = torch.linalg.solve(damped, right.T).T
    return solved.to(error.dtype)

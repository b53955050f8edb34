"""Low-rank error reconstruction: W ~ Q(W) + B A with A (r, k), B (m, r) from a scaled SVD of the rounding error E.

For S with S Sᵀ the weight that the inputs give to directions, the truncated SVD of E S, U Σ Vᵀ, has the least
||(E - B A) S||: B = U_r, A = Σ_r V_rᵀ S⁻¹. Forms:

    svd     S = 1                                                    (ZeroQuant-V2, arXiv 2303.08302)
    l2qer   S = diag(mean |x_j|)                                     (LQER's L²QER, arXiv 2402.02446)
    qera    S = (sum of x xᵀ)^(1/2), the least output error          (QERA, exact form, arXiv 2410.06040)

Singular values go to A, whose rows have scales of their own, so that rounding B does not lose the small ones. Factors
are rounded to nearest; at run time A reads the quantized input and its output is quantized again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from subnibble.corrections.correction import Branch, Correction
from subnibble.errors import BadRecipe
from subnibble.rounding import grid
from subnibble.scheme import Scheme
from subnibble.tensor import PackedRange, PackedTensor

FORMS = ("svd", "l2qer", "qera")
# Of the largest eigenvalue or mean size: directions that calibration hardly saw must not be blown up.
_FLOOR = 1e-6


@dataclass(frozen=True)
class LowRank(Correction):
    """rank: r, at most the smaller side of a weight. form: see the module. bits: of both factors."""

    noun: ClassVar[str] = "low-rank factors"
    asymmetries: ClassVar[tuple[str, ...]] = ("none",)
    needs_data: ClassVar[bool] = True
    needs_sizes: ClassVar[bool] = True

    rank: int
    form: str
    bits: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise BadRecipe(f"rank is {self.rank}; give a positive number")
        if self.form not in FORMS:
            raise BadRecipe(f"the low-rank form is {self.form!r}; choose one of {', '.join(FORMS)}")

    def scheme(self, weight: Scheme) -> Scheme:
        """How factors are coded, beside a weight coded by `weight`."""
        if weight.grid == "mxfp4" and self.bits == weight.bits:
            return weight
        zero_point = "integer" if weight.grid != "uniform" or weight.zero_point == "real" else weight.zero_point
        scale_type = "float16" if weight.grid == "mxfp4" else weight.scale_type
        return Scheme(self.bits, weight.group_size, zero_point, scale_type)

    def check_tuned(self) -> None:
        """See `Correction`."""
        raise BadRecipe('tuning learns low-rank factors of its own; use low_rank = "side"')

    def schemes(self, weight: Scheme) -> tuple[Scheme, ...]:
        """See `Correction`."""
        return (self.scheme(weight),)

    def stored_bits(self, rows: int, columns: int, weight: Scheme) -> int:
        """See `Correction`."""
        scheme, rank = self.scheme(weight), min(self.rank, rows, columns)
        return rank * scheme.row_bits(columns) + rows * scheme.row_bits(rank)

    def branch(self, error: Tensor, gram: Tensor | None, sizes: Tensor | None, scheme: Scheme) -> Branch:
        """Packed A (r, k) and B (m, r). error: (m, k) float32. gram: (k, k), sum of x xᵀ. sizes: (k,), mean |x|."""
        down, up = factorize(error, self.form, gram, sizes, min(self.rank, *error.shape))
        return self.packed(down.to(error.dtype), up.to(error.dtype), scheme)

    def packed(self, down: Tensor, up: Tensor, weight: Scheme) -> Branch:
        """Packed A (r, k) and B (m, r), however they were found, beside a weight coded by `weight`."""
        scheme = self.scheme(weight)
        clip = grid.Clip("minmax" if scheme.bits == 8 else "mse")
        pack = [PackedRange.pack(grid.coded(m, scheme, clip), scheme) for m in (down, up)]
        return PackedTensor((pack[0],)), PackedTensor((pack[1],))


def factorize(error: Tensor, form: str, gram: Tensor | None, sizes: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, k) and B (m, rank), float64; see the module."""
    e = error.double()
    root, inverse = _roots(form, gram, sizes, e)
    u, s, vh = torch.linalg.svd(e @ root, full_matrices=False)
    return s[:rank, None] * vh[:rank] @ inverse, u[:, :rank]


def _roots(form: str, gram: Tensor | None, sizes: Tensor | None, e: Tensor) -> tuple[Tensor, Tensor]:
    """S and its inverse, (k, k) float64."""
    eye = torch.eye(e.shape[1], dtype=e.dtype, device=e.device)
    if form == "svd":
        return eye, eye
    if form == "l2qer":
        if sizes is None:
            raise ValueError("L2QER needs the mean sizes of the inputs")
        scale = sizes.double().clamp(min=_FLOOR * max(float(sizes.max()), _FLOOR))
        return torch.diag(scale), torch.diag(1 / scale)
    if gram is None:
        raise ValueError("QERA needs the Gram matrix of the inputs")
    values, vectors = torch.linalg.eigh(gram.double())
    roots = values.clamp(min=_FLOOR * max(float(values.max()), _FLOOR)).sqrt()
    return vectors * roots @ vectors.T, vectors / roots @ vectors.T

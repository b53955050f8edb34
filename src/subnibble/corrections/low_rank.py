"""Low-rank error reconstruction: W ~ Q(W) + B A with A (r, k), B (m, r) from a scaled SVD of the rounding error E.

S Sᵀ weights the directions of the input space. The truncated SVD of E S, U_r Σ_r V_rᵀ, minimises ||(E - B A) S|| with
B = U_r, A = Σ_r V_rᵀ S⁻¹. Forms:

    l2qer   S = diag(mean |x_j|)                                     (LQER's L²QER, arXiv 2402.02446)
    qera    S = (sum of x xᵀ)^(1/2), the least output error          (QERA, exact form, arXiv 2410.06040)

A takes the singular values, because each of its rows has its own scales; in B, rounding would lose the small ones. Both
factors are rounded to nearest. At run time A reads the quantized input, and its output is quantized again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from subnibble.checkpoint.module_specs import PackedLinearSpec
from subnibble.corrections.correction import Branch, Correction
from subnibble.errors import BadRecipe
from subnibble.rounding import grid
from subnibble.tensor.packed import PackedLayout, PackedRange, PackedTensor
from subnibble.tensor.scheme import BITS, Scheme

FORMS = ("l2qer", "qera")
# Lower bound relative to the largest eigenvalue or mean magnitude: S⁻¹ must not blow up directions with little input.
_FLOOR = 1e-6


@dataclass(frozen=True)
class LowRank(Correction):
    """Low-rank factors of the rounding error.

    rank: r; a weight with a smaller side gets that as its rank.
    form: "l2qer" or "qera"; see the module.
    bits: bit width of both factors.
    """

    needs_data: ClassVar[bool] = True
    needs_mean_abs: ClassVar[bool] = True

    rank: int
    form: str
    bits: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise BadRecipe(f"rank is {self.rank}; give a positive number")
        if self.form not in FORMS:
            raise BadRecipe(f"the low-rank form is {self.form!r}; choose one of {', '.join(FORMS)}")
        if self.bits not in BITS:
            raise BadRecipe(f"factor_bits is {self.bits}; choose one of {', '.join(map(str, BITS))}")

    def scheme(self, weight: Scheme) -> Scheme:
        """The scheme of both factors. weight: scheme of the main weight."""
        if weight.grid == "mxfp4" and self.bits == weight.bits:
            return weight
        zero_point = "integer" if weight.grid != "uniform" or weight.zero_point == "real" else weight.zero_point
        scale_type = "float16" if weight.grid == "mxfp4" else weight.scale_type
        return Scheme(self.bits, weight.group_size, zero_point, scale_type)

    def check_tuned(self) -> None:
        """Raise `BadRecipe`: tuning does not support it."""
        raise BadRecipe("tuning does not go with low-rank factors of the rounding error; leave one of them out")

    def schemes(self, weight: Scheme) -> tuple[Scheme, ...]:
        """The scheme of the factors. weight: scheme of the main weight."""
        return (self.scheme(weight),)

    def planned(self, spec: PackedLinearSpec, weight: Scheme) -> PackedLinearSpec:
        """The spec with both factors, from shapes alone; see `Correction`."""
        rows, columns, scheme = spec.layout.rows, spec.layout.num_columns, self.scheme(weight)
        rank = min(self.rank, rows, columns)
        factors = PackedLayout(rank, ((columns, scheme),)), PackedLayout(rows, ((rank, scheme),))
        return replace(spec, low_rank=factors)

    def branches(
        self, errors: Sequence[Tensor], gram: Tensor | None, mean_abs: Tensor | None, scheme: Scheme
    ) -> list[Branch | None]:
        """Packed A (r, k) and B (m, r) for each error (m, k). gram, mean_abs: only that of the form is needed."""
        roots = roots_of(self.form, gram, mean_abs)
        factors: list[Branch | None] = []
        for error in errors:
            down, up = factorize(error, roots, min(self.rank, *error.shape))
            factors.append(self._packed(down.to(error.dtype), up.to(error.dtype), scheme))
        return factors

    def _packed(self, down: Tensor, up: Tensor, weight: Scheme) -> Branch:
        """Round and pack A (r, k) and B (m, r). weight: scheme of the main weight."""
        scheme = self.scheme(weight)
        clip = grid.Clip("minmax" if scheme.bits == 8 else "mse")
        packed = [PackedRange.pack(grid.quantized(m, scheme, clip), scheme) for m in (down, up)]
        return PackedTensor((packed[0],)), PackedTensor((packed[1],))


def factorize(error: Tensor, roots: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, k) and B (m, rank), float64, with the least ||(E - B A) S||.

    error: E (m, k).
    roots: S and its inverse, (k, k) float64; see the module.
    """
    root, inverse = roots
    u, s, vh = torch.linalg.svd(error.double() @ root, full_matrices=False)
    return s[:rank, None] * vh[:rank] @ inverse, u[:, :rank]


def roots_of(form: str, gram: Tensor | None, mean_abs: Tensor | None) -> tuple[Tensor, Tensor]:
    """S and its inverse, (k, k) float64.

    form: "l2qer" or "qera"; see the module.
    gram: (k, k), sum of x xᵀ over the inputs; for "qera".
    mean_abs: (k,), mean |x| over the inputs; for "l2qer".
    """
    if form == "l2qer":
        if mean_abs is None:
            raise ValueError("L2QER needs the mean magnitudes of the inputs; pass `mean_abs`")
        scale = mean_abs.double().clamp(min=_FLOOR * max(float(mean_abs.max()), _FLOOR))
        return torch.diag(scale), torch.diag(1 / scale)
    if gram is None:
        raise ValueError("QERA needs the Gram matrix of the inputs; pass `gram`")
    values, vectors = torch.linalg.eigh(gram.double())
    roots = values.clamp(min=_FLOOR * max(float(values.max()), _FLOOR)).sqrt()
    return vectors * roots @ vectors.T, vectors / roots @ vectors.T

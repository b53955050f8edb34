"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, later columns make up for the error.

For H = X Xᵀ + damping, U the upper Cholesky factor of H⁻¹ (H⁻¹ = Uᵀ U), for each column j in order:

    q_j = nearest level of w_j,   e_j = (w_j - q_j) / U_jj,   w_k -= e_j U_jk  for k > j      (their algorithm 1)

A group's grid is fitted when its first column is reached, on the weights as compensated by then. Differences from
the released program: the column order may be group-aware (`order.py`); U comes from one Cholesky factorization of
the flipped matrix and one triangular inversion; a factorization that fails raises the damping tenfold, is counted,
and past the limit is `NumericalFailure`; blocks end where groups end, so any group size gives the unblocked result.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from subnibble.errors import BadRecipe, NumericalFailure
from subnibble.rounding import grid
from subnibble.rounding.levels import Levels
from subnibble.rounding.order import ORDERS, ColumnPlan, plan_columns
from subnibble.rounding.rounder import Rounding
from subnibble.scheme import Scheme
from subnibble.tensor import CodedMatrix

WEIGHTINGS = ("none", "hessian")
_LARGEST_DAMPING = 1.0


@dataclass(frozen=True)
class Factor:
    """Upper factor u (k, k) with inv(H) = uᵀ u, in visiting order.

    dead: (k,) bool, columns that are never fed. weights: (k,) of the columns in the fit of grids, or None for 1.
    """

    u: Tensor
    dead: Tensor
    damping: float
    retries: int
    weights: Tensor | None = None


@dataclass(frozen=True)
class GPTQ:
    """Rounder with error compensation.

    damping: added to the Gram diagonal, as a fraction of its mean. order: see `order.py`. block: columns whose
    updates to the columns behind them are applied together, as one matrix product. weighting: "none" fits grids to
    the weights as they are, "hessian" weights each column's error by its diagonal Gram entry.
    """

    clip: grid.Clip = field(default_factory=grid.Clip)
    damping: float = 0.01
    order: str = "gar"
    block: int = 128
    weighting: str = "none"
    needs_gram = True

    def __post_init__(self) -> None:
        if not 0 < self.damping <= _LARGEST_DAMPING:
            raise BadRecipe(f"damping is {self.damping!r}; give a number above 0 and at most {_LARGEST_DAMPING}")
        if self.order not in ORDERS:
            raise BadRecipe(f"order is {self.order!r}; choose one of {', '.join(ORDERS)}")
        if self.weighting not in WEIGHTINGS:
            raise BadRecipe(f"weighting is {self.weighting!r}; choose one of {', '.join(WEIGHTINGS)}")
        if self.block < 1:
            raise BadRecipe(f"block is {self.block}; give a positive number of columns")

    def __call__(self, weight: Tensor, gram: Tensor | None, scheme: Scheme, where: str) -> Rounding:
        """See `Rounder`."""
        if gram is None:
            raise ValueError(f"GPTQ needs the Gram matrix of {where}'s inputs")
        plan = plan_columns(self.order, gram.diagonal(), scheme)
        factor = factorize(gram, plan.columns, self.damping, where)
        if self.weighting == "hessian":
            factor = replace(factor, weights=gram.diagonal()[plan.columns].float())
        coded = round_columns(weight, factor, plan, scheme, self.clip, self.block)
        return Rounding(coded, {"damping": factor.damping, "damping_retries": factor.retries})


def factorize(gram: Tensor, order: Tensor, damping: float, where: str) -> Factor:
    """Damp and factorize. gram: (k, k), sum of x xᵀ. order: (k,) visiting order of the columns."""
    h = gram[order][:, order]
    dead = h.diagonal() == 0
    mean = 1.0 if bool(dead.all()) else float(h.diagonal()[~dead].mean())
    h.diagonal()[dead] = mean
    retries = 0
    while damping <= _LARGEST_DAMPING:
        damped = h.clone()
        damped.diagonal().add_(damping * mean)
        # H = R Rᵀ with R upper is the flipped Cholesky factorization of the flipped H; then U = R⁻¹.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(failed) == 0:
            eye = torch.eye(h.shape[0], dtype=h.dtype, device=h.device)
            u = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1)
            if bool(torch.isfinite(u).all()) and bool((u.diagonal() > 0).all()):
                return Factor(u, dead, damping, retries)
        damping *= 10
        retries += 1
    raise NumericalFailure(
        f"{where}: the Gram matrix of its inputs has no Cholesky factor even with damping {damping / 10:g} of its "
        "mean diagonal; check the calibration text for empty or repeated windows, use more windows, or leave this "
        "linear out with an override (skip = true)"
    )


def round_columns(
    weight: Tensor, factor: Factor, plan: ColumnPlan, scheme: Scheme, clip: grid.Clip, block: int
) -> CodedMatrix:
    """The column loop. weight: (m, k) float32, in natural column order; so is the result."""
    order = plan.columns
    # Columns are rows of the transposed copy, so that each is contiguous.
    w = weight.T[order].to(factor.u.dtype)
    w[factor.dead] = 0
    u = factor.u
    codes = torch.empty_like(w)
    starts = _group_starts(plan)
    fitted: dict[int, Levels] = {}
    for i1, i2 in block_bounds(plan, block):
        error = torch.empty(i2 - i1, w.shape[1], dtype=w.dtype, device=w.device)
        for j in range(i1, i2):
            if j in starts:
                index, width = starts[j]
                weights = None if factor.weights is None else factor.weights[j : j + width]
                levels = fitted[index] = grid.fit_levels(w[j : j + width].T.float(), scheme, clip, weights)
            column = levels.encode(w[j].unsqueeze(1))
            codes[j] = column[:, 0]
            torch.sub(w[j], levels.decode(column)[:, 0], out=error[j - i1])
            error[j - i1] /= u[j, j]
            w[j:i2].addr_(u[j, j:i2], error[j - i1], alpha=-1)
        w[i2:].addmm_(u[i1:i2, i2:].T, error, alpha=-1)
    natural = torch.empty_like(codes)
    natural[order] = codes
    levels_by_group = [fitted[index] for index in sorted(fitted)]
    return CodedMatrix(natural.T.to(torch.uint8).contiguous(), *grid.join_levels(levels_by_group))


def block_bounds(plan: ColumnPlan, block: int) -> list[tuple[int, int]]:
    """Blocks of about `block` columns; one that starts inside a group ends no later than that group."""
    bounds: list[tuple[int, int]] = []
    start = end = 0
    for _, columns in plan.groups:
        width = len(columns)
        if end > start and end - start + width > block:
            bounds.append((start, end))
            start = end
        end += width
        while end - start > block:
            bounds.append((start, start + block))
            start += block
    if end > start:
        bounds.append((start, end))
    return bounds


def _group_starts(plan: ColumnPlan) -> dict[int, tuple[int, int]]:
    """Visiting position of each group's first column -> (index of the group, its width)."""
    starts, position = {}, 0
    for index, columns in plan.groups:
        starts[position] = (index, len(columns))
        position += len(columns)
    return starts

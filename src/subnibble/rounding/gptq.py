"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, later columns make up for the error.

For H = X Xᵀ + damping, U the upper Cholesky factor of H⁻¹ (H⁻¹ = Uᵀ U), for each column j in order:

    q_j = nearest level of w_j,   e_j = (w_j - q_j) / U_jj,   w_k -= e_j U_jk  for k > j      (their algorithm 1)

A group's grid is fitted when its first column is reached, on the weights as compensated by then. Differences from
the released program: the column order may be group-aware (`order.py`); U comes from one Cholesky factorization of
the flipped matrix and one triangular inversion; a factorization that fails raises the damping tenfold, is counted,
and past the limit is `NumericalFailure`; blocks end where groups end, so any group size gives the unblocked result
(but for GPTAQ's `released` form, whose quirk is the block).
The loop also carries GPTAQ's correction for inputs that differ from the full-precision model's (`gptaq.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from subnibble.errors import BadRecipe, NumericalFailure
from subnibble.rounding import grid
from subnibble.rounding.descent import Home, sweep_
from subnibble.rounding.gptaq import Asymmetry, Push, Spread
from subnibble.rounding.levels import WEIGHTINGS
from subnibble.rounding.order import ORDERS, ColumnPlan, plan_columns
from subnibble.rounding.rounder import OnGrids, Rounding
from subnibble.tensor.packed import QuantizedMatrix
from subnibble.tensor.scheme import Scheme

_LARGEST_DAMPING = 1.0


@dataclass(frozen=True)
class Factor:
    """Upper factor u (k, k) with inv(H) = uᵀ u, in visiting order.

    dead: (k,) bool, columns that are never fed where others are. weights: (k,) of the columns in the fit of grids, or
    None for 1.
    """

    u: Tensor
    h: Tensor
    dead: Tensor
    damping: float
    retries: int
    weights: Tensor | None = None


@dataclass(frozen=True)
class GPTQ(OnGrids):
    """Rounder with error compensation.

    damping: added to the Gram diagonal, as a fraction of its mean. order: see
    `order.py`. block: columns whose updates to the columns behind them are applied together, as one matrix product.
    weighting: "none" fits grids to the weights as they are, "hessian" weights each column's error by its diagonal Gram
    entry. asymmetry: see `gptaq.py`. sweeps: of coordinate descent afterwards, see `descent.py`.
    """

    damping: float = 0.01
    order: str = "gar"
    block: int = 128
    weighting: str = "none"
    asymmetry: Asymmetry = field(default_factory=Asymmetry)
    sweeps: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.damping <= _LARGEST_DAMPING:
            raise BadRecipe(f"damping is {self.damping!r}; give a number above 0 and at most {_LARGEST_DAMPING}")
        if self.order not in ORDERS:
            raise BadRecipe(f"order is {self.order!r}; choose one of {', '.join(ORDERS)}")
        if self.weighting not in WEIGHTINGS:
            raise BadRecipe(f"weighting is {self.weighting!r}; choose one of {', '.join(WEIGHTINGS)}")
        if self.sweeps < 0:
            raise BadRecipe(f"sweeps is {self.sweeps}; give 0 or more")
        if self.sweeps > 0 and self.asymmetry.form not in ("none", "shifted"):
            raise BadRecipe(
                f"sweeps is {self.sweeps} with asymmetry {self.asymmetry.form!r}; sweeps need a known target: use "
                'asymmetry "none" or "shifted", or sweeps = 0'
            )
        if self.block < 1:
            raise BadRecipe(f"block is {self.block}; give a positive number of columns")

    @property
    def needs_gram(self) -> bool:
        """See `Rounder`."""
        return True

    @property
    def needs_drift(self) -> bool:
        """See `Rounder`."""
        return self.asymmetry.form != "none"

    def __call__(
        self, weight: Tensor, gram: Tensor | None, scheme: Scheme, where: str, drift: Tensor | None = None
    ) -> Rounding:
        """See `Rounder`."""
        if gram is None:
            raise ValueError(f"GPTQ needs the Gram matrix of {where}'s inputs")
        if self.needs_drift and drift is None:
            raise ValueError(f"GPTAQ needs the drift of {where}'s inputs")
        plan = plan_columns(self.order, gram.diagonal(), scheme)
        factor = factorize(gram, plan.columns, self.damping, where)
        if self.weighting == "hessian":
            factor = replace(factor, weights=grid.diagonal_weights(gram)[plan.columns])
        push = None
        if self.needs_drift and drift is not None:
            ordered = drift[plan.columns][:, plan.columns].to(factor.u.dtype)
            push = Push(ordered, self.asymmetry)
        quantized = round_columns(weight, factor, plan, scheme, self, push)
        return Rounding(quantized, {"damping": factor.damping, "damping_retries": factor.retries})


def factorize(gram: Tensor, order: Tensor, damping: float, where: str) -> Factor:
    """Damp and factorize. gram: (k, k), sum of x xᵀ. order: (k,) visiting order of the columns."""
    if not bool(torch.isfinite(gram).all()):
        raise NumericalFailure(f'{where}: the Gram matrix of its inputs is not finite; use dtype = "float32"')
    h = gram[order][:, order]
    unfed = h.diagonal() == 0
    # Of inputs that are idle on this text nothing is known: their weights are rounded to nearest.
    idle = bool(unfed.all())
    dead = torch.zeros_like(unfed) if idle else unfed
    mean = 1.0 if idle else float(h.diagonal()[~dead].mean())
    h.diagonal()[unfed] = mean
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
                return Factor(u, damped, dead, damping, retries)
        damping *= 10
        retries += 1
    raise NumericalFailure(
        f"{where}: the Gram matrix of its inputs has no Cholesky factor even with damping {damping / 10:g} of its "
        "mean diagonal; check the calibration text for empty or repeated windows, use more windows, or leave this "
        "linear out with an override (skip = true)"
    )


def round_columns(
    weight: Tensor, factor: Factor, plan: ColumnPlan, scheme: Scheme, how: GPTQ, push: Push | None = None
) -> QuantizedMatrix:
    """The column loop. weight: (m, k) float32, in natural column order; so is the result."""
    u, order = factor.u, plan.columns
    # Columns are rows of the transposed copy, so that each is contiguous.
    w = weight.T[order].to(u.dtype)
    spread = None
    if push is not None and push.asymmetry.form == "shifted":
        w = push.shifted(w, u)
    elif push is not None:
        source = w.clone()
        if push.asymmetry.form == "released":
            source[factor.dead] = 0
        spread = Spread(source, push.propagation(u), factor.dead, push.asymmetry.form)
    unfed, is_dead = _unfed(w, scheme), factor.dead.tolist()
    w[factor.dead] = 0
    target = w.clone() if how.sweeps else w
    if how.sweeps:
        target[factor.dead] = unfed[factor.dead]
    codes = torch.empty_like(w)
    bounds = block_bounds(plan, how.block)
    homes: list[Home] = []
    for i1, i2 in bounds:
        error = torch.empty(i2 - i1, w.shape[1], dtype=w.dtype, device=w.device)
        for j in range(i1, i2):
            if len(homes) == j:
                homes += _fit_group(w, j, factor, plan, scheme, how)
            value = unfed[j] if is_dead[j] else w[j]
            column = homes[j].fitted.encode(value.unsqueeze(1), homes[j].place)
            codes[j] = column[:, 0]
            if spread is not None:
                spread.take_(w, j)
            torch.sub(w[j], homes[j].fitted.decode(column, homes[j].place)[:, 0], out=error[j - i1])
            error[j - i1] /= u[j, j]
            w[j:i2].addr_(u[j, j:i2], error[j - i1], alpha=-1)
            if spread is not None:
                spread.inside_(w, j, i2)
        w[i2:].addmm_(u[i1:i2, i2:].T, error, alpha=-1)
        if spread is not None:
            spread.behind_(w, i1, i2)
    if how.sweeps:
        # By now w holds the rounded weights.
        error = target - w
        for _ in range(how.sweeps):
            sweep_(error, codes, factor.h, homes, bounds)
    return _in_natural_order(codes, homes, plan)


def _unfed(w: Tensor, scheme: Scheme) -> Tensor:
    """What columns are to become if they are never fed, as rows like w: 0, or on a grid without 0 what they are."""
    return torch.zeros_like(w) if scheme.has_zero else w.clone()


def _fit_group(w: Tensor, start: int, factor: Factor, plan: ColumnPlan, scheme: Scheme, how: GPTQ) -> list[Home]:
    """Fit the grid of the group whose first column in the visit is `start`; the homes of its columns."""
    index, width = _group_starts(plan)[start]
    weights = None if factor.weights is None else factor.weights[start : start + width]
    fitted = how.fitter.fit(w[start : start + width].T.float(), scheme, weights, index)
    return [Home(index, fitted, place) for place in range(width)]


def _in_natural_order(codes: Tensor, homes: list[Home], plan: ColumnPlan) -> QuantizedMatrix:
    """Codes (k, m) and grids, in the order of the visit, as a matrix in natural order."""
    natural = torch.empty_like(codes)
    natural[plan.columns] = codes
    fitted = {home.index: home.fitted for home in homes}
    scales, zeros, columns = grid.join([fitted[index] for index in sorted(fitted)])
    if columns is not None:
        # They come in the order of the visit inside their groups.
        visited = torch.cat([group for _, group in sorted(plan.groups, key=lambda item: item[0])])
        columns = torch.empty_like(columns).index_copy_(0, visited, columns)
    return QuantizedMatrix(natural.T.to(torch.uint8).contiguous(), scales, zeros, columns)


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

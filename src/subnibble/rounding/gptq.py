"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column; later columns compensate for the error.

For H = X Xᵀ + damping, U the upper Cholesky factor of H⁻¹ (H⁻¹ = Uᵀ U), for each column j in order:

    q_j = nearest level of w_j,   e_j = (w_j - q_j) / U_jj,   w_k -= e_j U_jk  for k > j      (their algorithm 1)

A group's grid is fitted when the loop reaches the group's first column, to the weights compensated so far.
Differences from the released program:

- The column order may be group-aware (`order.py`).
- U comes from one Cholesky factorization of the flipped matrix and one triangular inversion.
- If the factorization fails, the damping is raised tenfold and the retry counted; past the limit, `NumericalFailure`.
- A group that starts after a block's first column also ends in that block, so the result does not depend on the block
  size, whatever the group size. Exception: GPTAQ's `released` form depends on it.

The loop also applies GPTAQ's correction for inputs that differ from the full-precision model's (`gptaq.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from subnibble.errors import BadRecipe, NumericalFailure
from subnibble.rounding import grid
from subnibble.rounding.descent import ColumnGrid, sweep_
from subnibble.rounding.gptaq import Asymmetry, Push, Spread
from subnibble.rounding.levels import WEIGHTINGS
from subnibble.rounding.order import ORDERS, ColumnPlan, plan_columns
from subnibble.rounding.rounder import OnGrids, Rounding
from subnibble.tensor.packed import QuantizedMatrix
from subnibble.tensor.scheme import Scheme

_LARGEST_DAMPING = 1.0


@dataclass(frozen=True)
class Factor:
    """The factorized Gram matrix; all tensors in visiting order.

    u: (k, k), upper triangular, with inv(H) = uᵀ u.
    h: (k, k), H, damped.
    dead: (k,) bool, columns whose input is always 0; all False if that holds for every column.
    damping: the damping applied, as a fraction of H's mean diagonal.
    retries: failed factorizations before this one.
    weights: (k,), weight of each column's error in the grid fits, or None for 1.
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

    damping: added to the diagonal of the Gram matrix, as a fraction of its mean.
    order: order in which columns are visited, see `order.py`.
    block: number of columns whose updates to later columns are applied together, as one matrix product.
    weighting: weight of each column's error in the grid fits: "none" for 1, "hessian" for its diagonal Gram entry.
    asymmetry: form of GPTAQ's correction, see `gptaq.py`.
    sweeps: number of sweeps of coordinate descent after GPTQ, see `descent.py`.
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
                f"sweeps is {self.sweeps} with asymmetry {self.asymmetry.form!r}, but sweeps need a known target; use "
                'asymmetry "none" or "shifted", or sweeps = 0'
            )
        if self.block < 1:
            raise BadRecipe(f"block is {self.block}; give a positive number of columns")

    @property
    def needs_gram(self) -> bool:
        """Always True."""
        return True

    @property
    def needs_drift(self) -> bool:
        """True if GPTAQ's correction is on."""
        return self.asymmetry.form != "none"

    def __call__(
        self, weight: Tensor, gram: Tensor | None, scheme: Scheme, where: str, drift: Tensor | None = None
    ) -> Rounding:
        """Round `weight` (m, k) with its inputs' Gram matrix, and with their drift if GPTAQ is on; see `Rounder`.

        Notes for the report: the damping applied and the number of retries.
        """
        if gram is None:
            raise ValueError(f"GPTQ needs the Gram matrix of {where}'s inputs; pass `gram`")
        if self.needs_drift and drift is None:
            raise ValueError(f"GPTAQ needs the drift of {where}'s inputs; pass `drift`")
        plan = plan_columns(self.order, gram.diagonal(), scheme)
        factor = factorize(gram, plan.order, self.damping, where)
        if self.weighting == "hessian":
            factor = replace(factor, weights=grid.diagonal_weights(gram)[plan.order])
        push = None
        if self.needs_drift and drift is not None:
            ordered = drift[plan.order][:, plan.order].to(factor.u.dtype)
            push = Push(ordered, self.asymmetry)
        quantized = round_columns(weight, factor, plan, scheme, self, push)
        return Rounding(quantized, {"damping": factor.damping, "damping_retries": factor.retries})


def factorize(gram: Tensor, order: Tensor, damping: float, where: str) -> Factor:
    """Damp the Gram matrix and factorize it.

    gram: (k, k), sum of x xᵀ, in natural order (the weight's own column order).
    order: (k,), columns in visiting order.
    damping: first damping to try, as a fraction of the mean diagonal; ten times as much after each failure.
    where: the linears, for error messages.
    Raises `NumericalFailure` if `gram` is not finite or no damping up to 1 suffices.
    """
    if not bool(torch.isfinite(gram).all()):
        raise NumericalFailure(f'{where}: the Gram matrix of its inputs is not finite; use dtype = "float32"')
    h = gram[order][:, order]
    silent = h.diagonal() == 0
    # If all inputs are 0 on this text, nothing says which weights matter: all are rounded to nearest, none set to 0.
    idle = bool(silent.all())
    dead = torch.zeros_like(silent) if idle else silent
    mean = 1.0 if idle else float(h.diagonal()[~dead].mean())
    h.diagonal()[silent] = mean
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
        "linear unquantized with an override (skip = true)"
    )


def round_columns(
    weight: Tensor, factor: Factor, plan: ColumnPlan, scheme: Scheme, options: GPTQ, push: Push | None = None
) -> QuantizedMatrix:
    """Run the column loop.

    weight: (m, k) float32, columns in natural order; the result has the same order.
    factor, plan: the factorized Gram matrix and the visiting order.
    options: block size, fitter and sweeps.
    push: GPTAQ's correction, or None.
    """
    u, order = factor.u, plan.order
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
    dead_targets, is_dead = _dead_targets(w, scheme), factor.dead.tolist()
    w[factor.dead] = 0
    target = w.clone() if options.sweeps else w
    if options.sweeps:
        target[factor.dead] = dead_targets[factor.dead]
    codes = torch.empty_like(w)
    bounds = block_bounds(plan, options.block)
    grids: list[ColumnGrid] = []
    for i1, i2 in bounds:
        error = torch.empty(i2 - i1, w.shape[1], dtype=w.dtype, device=w.device)
        for j in range(i1, i2):
            if len(grids) == j:
                grids += _fit_group(w, j, factor, plan, scheme, options)
            fitted, position = grids[j].fitted, grids[j].position
            value = dead_targets[j] if is_dead[j] else w[j]
            column = fitted.encode(value.unsqueeze(1), position)
            codes[j] = column[:, 0]
            if spread is not None:
                spread.take_(w, j)
            torch.sub(w[j], fitted.decode(column, position)[:, 0], out=error[j - i1])
            error[j - i1] /= u[j, j]
            w[j:i2].addr_(u[j, j:i2], error[j - i1], alpha=-1)
            if spread is not None:
                spread.inside_(w, j, i2)
        w[i2:].addmm_(u[i1:i2, i2:].T, error, alpha=-1)
        if spread is not None:
            spread.behind_(w, i1, i2)
    if options.sweeps:
        # By now w holds the rounded weights.
        error = target - w
        for _ in range(options.sweeps):
            sweep_(error, codes, factor.h, grids, bounds)
    return _in_natural_order(codes, grids, plan)


def _dead_targets(w: Tensor, scheme: Scheme) -> Tensor:
    """Targets (k, m) of dead columns: 0, or the weight itself on a grid without a zero level."""
    return torch.zeros_like(w) if scheme.has_zero else w.clone()


def _fit_group(
    w: Tensor, start: int, factor: Factor, plan: ColumnPlan, scheme: Scheme, options: GPTQ
) -> list[ColumnGrid]:
    """Fit the grid of the group that starts at position `start` of the visiting order; return one entry per column."""
    index, width = _group_starts(plan)[start]
    weights = None if factor.weights is None else factor.weights[start : start + width]
    fitted = options.fitter.fit(w[start : start + width].T.float(), scheme, weights, index)
    return [ColumnGrid(index, fitted, position) for position in range(width)]


def _in_natural_order(codes: Tensor, grids: list[ColumnGrid], plan: ColumnPlan) -> QuantizedMatrix:
    """Bring codes (k, m) and grids from visiting order to a matrix in natural order."""
    natural = torch.empty_like(codes)
    natural[plan.order] = codes
    fitted = {column.group: column.fitted for column in grids}
    scales, zeros, column_scales = grid.join([fitted[index] for index in sorted(fitted)])
    if column_scales is not None:
        # Groups are in natural order by now; column scales inside a group are still in visiting order.
        visited = torch.cat([group for _, group in sorted(plan.groups, key=lambda item: item[0])])
        column_scales = torch.empty_like(column_scales).index_copy_(0, visited, column_scales)
    return QuantizedMatrix(natural.T.to(torch.uint8).contiguous(), scales, zeros, column_scales)


def block_bounds(plan: ColumnPlan, block: int) -> list[tuple[int, int]]:
    """(start, stop) of blocks of at most `block` columns, in visiting order.

    A group that starts after a block's first column ends in that block, so that its grid is fitted to weights that all
    earlier columns have compensated.
    """
    bounds: list[tuple[int, int]] = []
    start = end = 0
    for _, group in plan.groups:
        width = len(group)
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
    """Map the visiting position of each group's first column to (index of the group, its width)."""
    starts, position = {}, 0
    for index, group in plan.groups:
        starts[position] = (index, len(group))
        position += len(group)
    return starts

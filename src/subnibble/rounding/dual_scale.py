"""D2Quant's dual-scale quantizer (arXiv 2602.02546): a grid per row and group, times a scale per column.

    w_ij = c_j * level_ij        c_j > 0, shared by all rows; the layer before the linear can absorb it

The paper and the released program use different inner grids. Both are here, each fitted by alternating least squares.

Version R (released program; sign-basis grids). B_kj = +-1 is bit k of the code in column j, for one row, and r_k its
scale. Start: c_j = mean_i |w_ij| and greedy row scales. Then alternate:

    row scales   r = G⁻¹ p,  G_kl = sum_j h_j c_j² B_kj B_lj,  p_k = sum_j h_j c_j B_kj w_j
    column scale c_j = sum_i w_ij S_ij / sum_i S_ij²,  S = sum_k r_k B_k
    signs        of the nearest level of c_j * sum_k (+-r_k)

Version P (paper; uniform grids), made monotone. Start: c = 1 and the clip search. Then alternate:

    codes        nearest to w / c
    scale, zero  weighted least squares for w / c with weights h_j c_j²; an integer zero does not change
    column scale as above, with S = scale * (code - zero)

h_j is 1 as published, or the diagonal of the Gram matrix; it cancels from c. No half-step raises the loss sum_j h_j
sum_i (w_ij - c_j level_ij)². c is normalised to a geometric mean of 1 in its group, so that the layer that absorbs it
keeps its range. If nearly all columns are close to 0, c is normalised to a maximum of 256 instead.

Deviations:

- A column of zeros keeps its scale; a plain update would make it 0.
- After each update, c is raised to at least 1/64 of its normaliser, so that all of c are normal float16 numbers.
- Stored scales are rounded to their type after the fit.
- Version P repeats the clip search at three steps with every fourth candidate, not at every step with all candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from subnibble.errors import BadRecipe
from subnibble.rounding import grid, sign_basis
from subnibble.rounding.levels import Fitted, Fitter
from subnibble.rounding.sign_basis import SignLevels
from subnibble.tensor.packed import scale_dtype
from subnibble.tensor.scheme import Scheme

# Steps at which version P repeats the clip search, with the column scales fitted so far.
_SEARCHES = (2, 5, 8)
# Every fourth candidate of the clip search suffices: least squares refines it.
_STRIDE = 4
# Bounds of normalised column scales. A larger maximum would make row scales too small for their type.
_SMALLEST = 2.0**-6
_LARGEST = 2.0**8
_EPS = 1e-12


@dataclass(frozen=True)
class _Alternating(Fitter):
    """The fields and the check that both fitters share.

    clip: the clip search of version P; a candidate is accepted only if it lowers the weighted squared error.
    iterations: number of alternations; 15 in the released program.
    """

    clip: grid.Clip = field(default_factory=grid.Clip)
    iterations: int = 15

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise BadRecipe(f"iterations is {self.iterations}; give a positive number")

    def check(self, scheme: Scheme, where: str) -> None:
        """Raise `BadRecipe` for an mxfp4 grid. where: the linear, for the message."""
        if scheme.grid == "mxfp4":
            raise BadRecipe(
                f'{where}: column scales and refitted rows need a uniform or sign grid; set grid = "uniform"'
            )


@dataclass(frozen=True)
class DualScale(_Alternating):
    """Fitter of row and column scales: version R on sign grids, version P on uniform grids.

    clip: the clip search of version P.
    iterations: number of alternations.
    """

    has_column_scales: ClassVar[bool] = True

    def fit(self, group: Tensor, scheme: Scheme, weights: Tensor | None, index: int = 0) -> Fitted:
        """Fit the grid and the column scales of `group` (m, g); see `Fitter`."""
        self.check(scheme, "a group")
        sign_basis.check_finite(group)
        h = sign_basis.column_weights(group, grid.usable(weights))
        if scheme.grid == "sign":
            return _fit_sign(group, scheme, h, self.iterations)
        levels, c = _fit_uniform(group, scheme, self.clip, h, self.iterations)
        return Fitted(levels, c)


@dataclass(frozen=True)
class RowScale(_Alternating):
    """Fitter with the same alternation and all column scales at 1: a baseline that shows what column scales add.

    clip, iterations: as in `DualScale`.
    """

    def fit(self, group: Tensor, scheme: Scheme, weights: Tensor | None, index: int = 0) -> Fitted:
        """Fit the grid of `group` (m, g), without column scales; see `Fitter`."""
        self.check(scheme, "a group")
        if scheme.grid == "sign":
            return Fitted(sign_basis.fit(group, scheme, grid.usable(weights), self.iterations))
        sign_basis.check_finite(group)
        h = sign_basis.column_weights(group, grid.usable(weights))
        return Fitted(_fit_rows(group, scheme, self.clip, h, self.iterations))


def _fit_sign(group: Tensor, scheme: Scheme, h: Tensor, iterations: int) -> Fitted:
    """Fit by version R; h: (g,), column weights."""
    # Divide by a power of two, which is exact: squares of column scales must not underflow.
    power_of_two = torch.exp2(group.abs().max().clamp(min=torch.finfo(group.dtype).tiny).log2().floor())
    group = group / power_of_two
    absolute = group.abs()
    c = absolute.mean(0)
    c = _floored(torch.where(c > 0, c, c.mean() if bool((c > 0).any()) else 1.0))
    levels = SignLevels(sign_basis.greedy(group, c, h, scheme.bits))
    for _ in range(iterations):
        row_bins = sign_basis.bins(absolute, c, h, levels)
        patterns = levels.patterns
        scales = sign_basis.solve(row_bins, patterns)
        # Value of each bin under the old signs; it may be negative if least squares made a scale negative.
        values = torch.einsum("mkb,mb->mk", patterns, scales)
        nearest = values[:, :1].expand_as(absolute)
        for k, above in enumerate(row_bins.above):
            nearest = torch.where(above, values[:, k + 1 : k + 2], nearest)
        c = _column_scales(absolute, nearest, c)
        levels = SignLevels(scales.abs())
    c, normaliser = _normalised(c)
    return Fitted(SignLevels(sign_basis.storable(levels.scales * (normaliser * power_of_two), scale_dtype(scheme))), c)


def _fit_uniform(
    group: Tensor, scheme: Scheme, clip: grid.Clip, h: Tensor, iterations: int
) -> tuple[grid.UniformLevels, Tensor]:
    """Fit by version P: levels, and column scales (g,). h: (g,), column weights."""
    c = torch.ones_like(h)
    pair = grid.fit(group, scheme, clip, h, _STRIDE)
    for step in range(iterations):
        x, weights = group / c, h * c.square()
        if step in _SEARCHES:
            pair = _better(x, weights, scheme, grid.fit(x, scheme, clip, weights, _STRIDE), pair)
        pair = _refitted(x, weights, scheme, pair)
        c = _column_scales(group, grid.decode(grid.encode(x, *pair, scheme), *pair), c)
    c, normaliser = _normalised(c)
    return _stored(pair[0] * normaliser, pair[1], scheme), c


def _fit_rows(group: Tensor, scheme: Scheme, clip: grid.Clip, h: Tensor, iterations: int) -> grid.UniformLevels:
    """Fit by version P with all column scales at 1: the weights do not change, so one clip search suffices."""
    pair = grid.fit(group, scheme, clip, h, _STRIDE)
    for _ in range(iterations):
        pair = _refitted(group, h, scheme, pair)
    return _stored(*pair, scheme)


def _refitted(x: Tensor, weights: Tensor, scheme: Scheme, old: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Scale and zero-point refitted to the codes that `old` gives; a row keeps `old` if the refit is not better."""
    return _better(x, weights, scheme, _refit(x, grid.encode(x, *old, scheme), weights, scheme, old), old)


def _stored(scale: Tensor, zero: Tensor, scheme: Scheme) -> grid.UniformLevels:
    """The grid with scale and zero-point rounded to their stored type."""
    stored = scale_dtype(scheme)
    scale = scale.clamp(min=grid.smallest_scale(scheme))
    if bool((scale > torch.finfo(stored).max).any()):
        raise grid.too_wide(float(scale.max()) * (scheme.levels - 1), scheme)
    scale = scale.to(stored).float()
    return grid.UniformLevels(scale, zero.to(stored).float(), scheme)


def _column_scales(group: Tensor, values: Tensor, old: Tensor) -> Tensor:
    """Least-squares column scales c (g,) of `group` ~ c * `values`, both (m, g); `old` for a column of zeros."""
    denominator = values.square().sum(0)
    quotient = (group * values).sum(0) / denominator.clamp(min=_EPS)
    return _floored(torch.where((denominator > _EPS) & (quotient != 0), quotient.abs(), old))


def _floored(c: Tensor) -> Tensor:
    """Column scales raised to at least 1/64 of their normaliser."""
    return torch.maximum(c, _SMALLEST * _normaliser(c))


def _normalised(c: Tensor) -> tuple[Tensor, Tensor]:
    """Column scales divided by their normaliser, and the normaliser."""
    normaliser = _normaliser(c)
    return c / normaliser, normaliser


def _normaliser(c: Tensor) -> Tensor:
    """The normaliser of column scales: their geometric mean, or a 256th of their maximum if that is larger."""
    return torch.maximum(c.log().mean().exp(), c.max() / _LARGEST)


def _refit(
    x: Tensor, codes: Tensor, weights: Tensor, scheme: Scheme, old: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Scale and zero-point (m, 1) by weighted least squares for given codes; `old` for a row with a single code."""
    scale, zero = old
    if scheme.zero_point != "real":
        level = codes - zero
        denominator = level.square() @ weights
        fitted = (level * x) @ weights / denominator.clamp(min=_EPS)
        fitted = fitted.unsqueeze(1)
        return torch.where((denominator.unsqueeze(1) > _EPS) & (fitted > 0), fitted, scale), zero
    total = weights.sum()
    sum_q, sum_x = codes @ weights, x @ weights
    denominator = total * (codes.square() @ weights) - sum_q.square()
    slope = (total * ((codes * x) @ weights) - sum_q * sum_x) / denominator.clamp(min=_EPS)
    offset = (sum_x - slope * sum_q) / total
    solvable = (denominator > 1e-6 * total.square()) & (slope > 0)
    s = torch.where(solvable.unsqueeze(1), slope.unsqueeze(1), scale)
    z = torch.where(solvable.unsqueeze(1), -offset.unsqueeze(1) / s, zero)
    in_range = z.abs() <= grid.LARGEST_REAL_ZERO
    return torch.where(in_range, s, scale), torch.where(in_range, z, zero)


def _better(
    x: Tensor, weights: Tensor, scheme: Scheme, new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """For each row, the (scale, zero-point) of `new` or `old` with the lower weighted squared error."""
    losses = []
    for scale, zero in (new, old):
        error = grid.decode(grid.encode(x, scale, zero, scheme), scale, zero) - x
        losses.append(error.square_() @ weights)
    improved = (losses[0] < losses[1]).unsqueeze(1)
    return torch.where(improved, new[0], old[0]), torch.where(improved, new[1], old[1])

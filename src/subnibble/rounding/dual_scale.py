"""D2Quant's dual-scale quantizer (arXiv 2602.02546): a grid per row and group, times a scale per column.

    w_ij = c_j * level_ij        c_j > 0, shared by all rows; whoever writes the linear's inputs can absorb it

The paper's text and the authors' program differ in the inner grid; both are here, each by alternating least squares.

Version R (the program; sign-basis grids). Start: c_j = mean_i |w_ij| and greedy row scales. Then, in turn,

    row scales   r = G⁻¹ p,  G_kl = sum_j h_j c_j² B_kj B_lj,  p_k = sum_j h_j c_j B_kj w_j
    column scale c_j = sum_i w_ij S_ij / sum_i S_ij²,  S = sum_k r_k B_k
    signs        of the nearest level of c_j * sum_k (+-r_k)

Version P (the paper; uniform grids), made monotone. Start: c = 1 and the clip search. Then, in turn,

    codes        nearest to w / c
    scale, zero  weighted least squares for w / c with weights h_j c_j²; an integer zero stays where it is
    column scale as above, S = scale * (code - zero)

h_j is 1 as published, or the diagonal of the Gram matrix; it cancels from c. No half-step raises the loss sum_j h_j
sum_i (w_ij - c_j level_ij)². c is normalised to a geometric mean of 1 in its group, so that whatever absorbs it keeps
its range; where nearly all columns are next to nothing, to a largest of 256. Deviations: a column of zeros keeps its
scale (a plain update would make it 0); after each update, scales below 1/64 of what becomes 1 are raised to that, so
that all are normal float16 numbers; stored scales are rounded to their type after the fit; version P repeats the clip
search at three of its steps, with every fourth candidate, not at all with all of them.
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

# Steps of version P at which the clip search is done again, for the column scales found by then.
_SEARCHES = (2, 5, 8)
# Of the search's candidates: least squares takes the rest of the way.
_STRIDE = 4
_SMALLEST = 2.0**-6
# Of column scales as normalised, lest those of rows leave their type.
_LARGEST = 2.0**8
_EPS = 1e-12


@dataclass(frozen=True)
class _Alternating(Fitter):
    """clip: of version P's searches, whose finds the squared error then judges. iterations: 15 as released."""

    clip: grid.Clip = field(default_factory=grid.Clip)
    iterations: int = 15

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise BadRecipe(f"iterations is {self.iterations}; give a positive number")

    def check(self, scheme: Scheme, where: str) -> None:
        """See `Fitter`."""
        if scheme.grid == "mxfp4":
            raise BadRecipe(
                f'{where}: column scales and refitted rows need a uniform or sign grid; set grid = "uniform"'
            )


@dataclass(frozen=True)
class DualScale(_Alternating):
    """Fitter of row and column scales; see the module."""

    scales_columns: ClassVar[bool] = True

    def fit(self, group: Tensor, scheme: Scheme, weights: Tensor | None, index: int = 0) -> Fitted:
        """See `Fitter`."""
        self.check(scheme, "a group")
        sign_basis.check_finite(group)
        h = sign_basis.column_weights(group, grid.usable(weights))
        if scheme.grid == "sign":
            return _fit_sign(group, scheme, h, self.iterations)
        levels, c = _fit_uniform(group, scheme, self.clip, h, self.iterations)
        return Fitted(levels, c)


@dataclass(frozen=True)
class RowScale(_Alternating):
    """Fitter: the same alternation with all column scales at 1, which shows what column scales add."""

    def fit(self, group: Tensor, scheme: Scheme, weights: Tensor | None, index: int = 0) -> Fitted:
        """See `Fitter`."""
        self.check(scheme, "a group")
        if scheme.grid == "sign":
            return Fitted(sign_basis.fit(group, scheme, grid.usable(weights), self.iterations))
        sign_basis.check_finite(group)
        h = sign_basis.column_weights(group, grid.usable(weights))
        return Fitted(_fit_rows(group, scheme, self.clip, h, self.iterations))


def _fit_sign(group: Tensor, scheme: Scheme, h: Tensor, iterations: int) -> Fitted:
    """Version R."""
    # A power of two, exact: squares of column scales must not underflow.
    whole = torch.exp2(group.abs().max().clamp(min=torch.finfo(group.dtype).tiny).log2().floor())
    group = group / whole
    sizes = group.abs()
    c = sizes.mean(0)
    c = _floored(torch.where(c > 0, c, c.mean() if bool((c > 0).any()) else 1.0))
    levels = SignLevels(sign_basis.greedy(group, c, h, scheme.bits))
    for _ in range(iterations):
        found = sign_basis.bins(sizes, c, h, levels)
        patterns = levels.patterns
        scales = sign_basis.solve(found, patterns)
        # Of the elements' magnitudes under the old signs: below zero where a scale turned.
        values = torch.einsum("mkb,mb->mk", patterns, scales)
        nearest = values[:, :1].expand_as(sizes)
        for k, above in enumerate(found.above):
            nearest = torch.where(above, values[:, k + 1 : k + 2], nearest)
        c = _column_scales(sizes, nearest, c)
        levels = SignLevels(scales.abs())
    c, mean = _normalised(c)
    return Fitted(SignLevels(sign_basis.storable(levels.scales * (mean * whole), scale_dtype(scheme))), c)


def _fit_uniform(
    group: Tensor, scheme: Scheme, clip: grid.Clip, h: Tensor, iterations: int
) -> tuple[grid.UniformLevels, Tensor]:
    """Version P: levels and column scales."""
    c = torch.ones_like(h)
    pair = grid.fit(group, scheme, clip, h, _STRIDE)
    for step in range(iterations):
        x, weights = group / c, h * c.square()
        if step in _SEARCHES:
            pair = _better(x, weights, scheme, grid.fit(x, scheme, clip, weights, _STRIDE), pair)
        pair = _refitted(x, weights, scheme, pair)
        c = _column_scales(group, grid.decode(grid.encode(x, *pair, scheme), *pair), c)
    c, mean = _normalised(c)
    return _stored(pair[0] * mean, pair[1], scheme), c


def _fit_rows(group: Tensor, scheme: Scheme, clip: grid.Clip, h: Tensor, iterations: int) -> grid.UniformLevels:
    """Version P with all column scales at 1, where one clip search is all there is to find by searching."""
    pair = grid.fit(group, scheme, clip, h, _STRIDE)
    for _ in range(iterations):
        pair = _refitted(group, h, scheme, pair)
    return _stored(*pair, scheme)


def _refitted(x: Tensor, weights: Tensor, scheme: Scheme, old: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Scales and zero-points of x by least squares for the codes of the old ones, in the rows where that is better."""
    return _better(x, weights, scheme, _refit(x, grid.encode(x, *old, scheme), weights, scheme, old), old)


def _stored(scale: Tensor, zero: Tensor, scheme: Scheme) -> grid.UniformLevels:
    """Levels with scales and zero-points rounded to their type."""
    stored = scale_dtype(scheme)
    scale = scale.clamp(min=grid.smallest_scale(scheme))
    if bool((scale > torch.finfo(stored).max).any()):
        raise grid.too_wide(float(scale.max()) * (scheme.levels - 1), scheme)
    scale = scale.to(stored).float()
    return grid.UniformLevels(scale, zero.to(stored).float(), scheme)


def _column_scales(group: Tensor, values: Tensor, old: Tensor) -> Tensor:
    """Least-squares column scales (g,) of `group` over `values`, both (m, g); the old one where there is none."""
    below = values.square().sum(0)
    quotient = (group * values).sum(0) / below.clamp(min=_EPS)
    return _floored(torch.where((below > _EPS) & (quotient != 0), quotient.abs(), old))


def _floored(c: Tensor) -> Tensor:
    return torch.maximum(c, _SMALLEST * _unit(c))


def _normalised(c: Tensor) -> tuple[Tensor, Tensor]:
    """Scales over their unit, and the unit."""
    unit = _unit(c)
    return c / unit, unit


def _unit(c: Tensor) -> Tensor:
    """What is to become 1: the geometric mean, or, where that is less, the least that keeps the largest in range."""
    return torch.maximum(c.log().mean().exp(), c.max() / _LARGEST)


def _refit(
    x: Tensor, codes: Tensor, weights: Tensor, scheme: Scheme, old: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Scale and zero-point (m, 1) by weighted least squares for codes; the old ones where a row has one code only."""
    scale, zero = old
    if scheme.zero_point != "real":
        level = codes - zero
        below = level.square() @ weights
        fitted = (level * x) @ weights / below.clamp(min=_EPS)
        fitted = fitted.unsqueeze(1)
        return torch.where((below.unsqueeze(1) > _EPS) & (fitted > 0), fitted, scale), zero
    total = weights.sum()
    sum_q, sum_x = codes @ weights, x @ weights
    below = total * (codes.square() @ weights) - sum_q.square()
    slope = (total * ((codes * x) @ weights) - sum_q * sum_x) / below.clamp(min=_EPS)
    offset = (sum_x - slope * sum_q) / total
    fine = (below > 1e-6 * total.square()) & (slope > 0)
    s = torch.where(fine.unsqueeze(1), slope.unsqueeze(1), scale)
    z = torch.where(fine.unsqueeze(1), -offset.unsqueeze(1) / s, zero)
    fits = z.abs() <= grid.LARGEST_REAL_ZERO
    return torch.where(fits, s, scale), torch.where(fits, z, zero)


def _better(
    x: Tensor, weights: Tensor, scheme: Scheme, new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """For each row, the pair of scale and zero-point with the lower weighted squared error."""
    losses = []
    for scale, zero in (new, old):
        error = grid.decode(grid.encode(x, scale, zero, scheme), scale, zero) - x
        losses.append(error.square_() @ weights)
    keep = (losses[0] < losses[1]).unsqueeze(1)
    return torch.where(keep, new[0], old[0]), torch.where(keep, new[1], old[1])

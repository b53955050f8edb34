"""Sign-basis grids: levels `sum_k (+-r_k)` with one scale r_k per bit, fitted by alternating least squares.

This is the row-scale part of D2Quant's dual-scale quantizer (arXiv 2602.02546) as in the released program, and the
multi-bit form of ARB-LLM's row scales. At 2 bits the levels are -r0-r1, -r0+r1, r0-r1, r0+r1: none is zero, and they
come close to the Lloyd-Max grid of normally distributed weights. With h_j the weight of column j, alternate:

    r = G^-1 p,   G_kl = sum_j h_j B_kj B_lj,   p_k = sum_j h_j B_kj w_j      (row scales, jointly)
    B = signs of the level nearest to w                                        (codes)

D2Quant publishes h = 1. With h the diagonal of the Gram matrix, the fit minimises a diagonal model of the output error.
No half-step raises the loss. The scales are rounded to their stored type in each iteration, and the best are returned.

The grid is symmetric. So the fit needs only two sums per row and magnitude (of 2**(b-1)), over the elements nearest to
that magnitude: the weight `n = sum h` and the moment `m = sum h |w|`; see `Bins`, which `dual_scale.py` uses, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from subnibble.errors import NumericalFailure
from subnibble.tensor.packed import scale_dtype
from subnibble.tensor.scheme import Scheme

ITERATIONS = 15
# Ridge on G relative to its diagonal: G is singular if two bits have the same signs throughout a row.
_RIDGE = 1e-6


@dataclass(frozen=True)
class SignLevels:
    """The sign-basis grid of one group of m rows; see `Levels`.

    scales: (m, b), from bit 0 to bit b - 1.
    """

    scales: Tensor
    zeros: None = None

    @cached_property
    def table(self) -> Tensor:
        """The level of each code: (m, 2**b), summed from bit 0 on as in `PackedRange`."""
        bits = self.scales.shape[1]
        codes = torch.arange(2**bits, device=self.scales.device)
        table = torch.zeros(self.scales.shape[0], 2**bits, dtype=self.scales.dtype, device=self.scales.device)
        for bit in range(bits):
            table = table + self.scales[:, bit : bit + 1] * (((codes >> bit) & 1) * 2 - 1)
        return table

    @cached_property
    def _rising(self) -> tuple[Tensor, Tensor]:
        """Codes (m, 2**b) by ascending level, and the midpoints between neighbouring levels (m, 2**b - 1)."""
        levels, codes = self.table.sort(1)
        return codes, ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()

    @property
    def magnitudes(self) -> Tensor:
        """The upper half of the levels, ascending: (m, 2**(b-1))."""
        codes, _ = self._rising
        return self.table.gather(1, codes[:, codes.shape[1] // 2 :])

    @property
    def patterns(self) -> Tensor:
        """The signs of the scales in each of `magnitudes`: (m, 2**(b-1), b) of +-1."""
        codes, _ = self._rising
        upper = codes[:, codes.shape[1] // 2 :]
        shifts = torch.arange(self.scales.shape[1], device=codes.device)
        return ((upper.unsqueeze(-1) >> shifts) & 1).to(self.scales.dtype) * 2 - 1

    def encode(self, weight: Tensor) -> Tensor:
        """Nearest codes (m, n) of `weight` (m, n)."""
        codes, middles = self._rising
        return codes.gather(1, torch.searchsorted(middles, weight.contiguous())).to(weight.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """Weights (m, n) of `codes` (m, n)."""
        return self.table.gather(1, codes.long())


@dataclass(frozen=True)
class Bins:
    """Sums over the elements of each row that are nearest to each of the K magnitudes.

    count: (m, K), sum of h c².
    moment: (m, K), sum of h c |w|.
    above: for each of the K - 1 midpoints, (m, g) bool: which elements are larger.
    """

    count: Tensor
    moment: Tensor
    above: list[Tensor]


def bins(absolute: Tensor, c: Tensor, h: Tensor, levels: SignLevels) -> Bins:
    """Assign each element to the nearest magnitude of `c * levels`, and sum.

    absolute: (m, g), |w|.
    c: (g,), positive column scales.
    h: (g,), column weights.
    """
    magnitudes = levels.magnitudes
    middles = (magnitudes[:, 1:] + magnitudes[:, :-1]) / 2
    square, moments = h * c.square(), absolute * (h * c)
    count_above = square.sum().expand(absolute.shape[0])
    moment_above = moments.sum(1)
    counts, sums, above = [], [], []
    for k in range(middles.shape[1]):
        higher = absolute > middles[:, k : k + 1] * c
        mask = higher.to(absolute.dtype)
        count, moment = mask @ square, torch.linalg.vecdot(mask, moments)
        # Summation order may change the last digit; an empty bin must not get a negative weight.
        counts.append((count_above - count).clamp(min=0))
        sums.append(moment_above - moment)
        count_above, moment_above = count, moment
        above.append(higher)
    return Bins(torch.stack([*counts, count_above], 1), torch.stack([*sums, moment_above], 1), above)


def solve(row_bins: Bins, patterns: Tensor) -> Tensor:
    """Row scales (m, b), of any sign, by weighted least squares.

    patterns: (m, K, b), the signs of the scales in each bin.
    """
    weighted = patterns * row_bins.count.unsqueeze(-1)
    gram = weighted.transpose(1, 2) @ patterns
    ridge = _RIDGE * row_bins.count.sum(1).clamp(min=torch.finfo(gram.dtype).tiny)
    gram.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
    right = patterns.transpose(1, 2) @ row_bins.moment.unsqueeze(-1)
    scales: Tensor = torch.linalg.solve(gram, right)
    return scales.squeeze(-1)


def excess(row_bins: Bins, magnitudes: Tensor) -> Tensor:
    """Weighted squared error (m,) of each quantized row, minus a constant (sum h w²) that the scales cannot change.

    magnitudes: (m, K), the magnitude of each bin.
    """
    return (magnitudes * (magnitudes * row_bins.count - 2 * row_bins.moment)).sum(1)


def fit(group: Tensor, scheme: Scheme, weights: Tensor | None, iterations: int = ITERATIONS) -> SignLevels:
    """Fit the scales of each row.

    group: (m, g) float32.
    weights: (g,), positive column weights, or None for 1.
    iterations: number of alternations.
    """
    check_finite(group)
    h = column_weights(group, weights)
    absolute, c, stored = group.abs(), torch.ones_like(group[0]), scale_dtype(scheme)
    levels = SignLevels(storable(greedy(group, c, h, scheme.bits), stored))
    best, least = levels, torch.full_like(absolute[:, :1], torch.inf)
    for step in range(iterations + 1):
        row_bins = bins(absolute, c, h, levels)
        loss = excess(row_bins, levels.magnitudes).unsqueeze(1)
        better = loss < least
        best = SignLevels(torch.where(better, levels.scales, best.scales))
        least = torch.where(better, loss, least)
        if step < iterations:
            levels = SignLevels(storable(solve(row_bins, levels.patterns).abs(), stored))
    return best


def column_weights(group: Tensor, weights: Tensor | None) -> Tensor:
    """Column weights (g,) scaled to mean 1, in the dtype of `group` (m, g); all 1 if `weights` is None."""
    return torch.ones_like(group[0]) if weights is None else weights.to(group.dtype) / weights.mean()


def greedy(group: Tensor, c: Tensor, h: Tensor, bits: int) -> Tensor:
    """Scales (m, bits), fitted one sign matrix at a time to the residual of the earlier ones.

    group: (m, g). c: (g,), column scales. h: (g,), column weights.
    """
    residual, scales = group, []
    square, weight = (h * c.square()).sum(), h * c
    for _ in range(bits):
        sign = torch.where(residual >= 0, 1.0, -1.0)
        scale = (residual.abs() @ weight).unsqueeze(1) / square
        residual = residual - scale * sign * c
        scales.append(scale)
    return torch.cat(scales, dim=1)


def check_finite(group: Tensor) -> None:
    """Raise `NumericalFailure` if a weight is not finite."""
    if not bool(torch.isfinite(group).all()):
        raise NumericalFailure("the weights to round are not finite; raise the damping or use more calibration text")


def storable(scales: Tensor, stored: torch.dtype) -> Tensor:
    """Scales rounded to the dtype `stored` and capped at its maximum, as float32."""
    return scales.clamp(max=torch.finfo(stored).max).to(stored).float()

"""Sign-basis grids: levels `sum_k (+-r_k)` with one r a bit, fitted by alternating least squares.

The rows-only part of D2Quant's dual-scale quantizer (arXiv 2602.02546, as its released program has it; the multi-bit
form of ARB-LLM's row scales). At 2 bits the levels are -r0-r1, -r0+r1, r0-r1, r0+r1: no level at zero, and near to the
Lloyd-Max grid of normally distributed weights. With h the weight of a column, in turn:

    r = G^-1 p,   G_kl = sum_j h_j B_kj B_lj,   p_k = sum_j h_j B_kj w_j      (row scales, jointly)
    B = signs of the level nearest to w                                        (codes)

Published: h = 1. With h the diagonal of the Gram matrix the fit minimises a diagonal model of the output error.
Each half-step lowers the loss or leaves it; the best scales seen are kept, rounded to their stored type.

The grid is symmetric, so everything the fit needs of a row is, for each of its 2**(b-1) magnitudes, the weight
`n = sum h` and the moment `m = sum h |w|` of the elements nearest to it: `Bins`. `dual_scale.py` shares them.
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
# Ridge on G relative to its diagonal: two signs that coincide in a row make it singular.
_RIDGE = 1e-6


@dataclass(frozen=True)
class SignLevels:
    """See `Levels`. scales: (m, b), of bit 0 to bit b - 1."""

    scales: Tensor
    zeros: None = None

    @cached_property
    def table(self) -> Tensor:
        """All levels (m, 2**b) by code, summed from bit 0 on as `PackedRange` does."""
        bits = self.scales.shape[1]
        codes = torch.arange(2**bits, device=self.scales.device)
        table = torch.zeros(self.scales.shape[0], 2**bits, dtype=self.scales.dtype, device=self.scales.device)
        for bit in range(bits):
            table = table + self.scales[:, bit : bit + 1] * (((codes >> bit) & 1) * 2 - 1)
        return table

    @cached_property
    def _rising(self) -> tuple[Tensor, Tensor]:
        """Codes by rising level (m, 2**b), and the midpoints between neighbours (m, 2**b - 1)."""
        levels, codes = self.table.sort(1)
        return codes, ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()

    @property
    def magnitudes(self) -> Tensor:
        """The upper half of the levels, rising: (m, 2**(b-1))."""
        codes, _ = self._rising
        return self.table.gather(1, codes[:, codes.shape[1] // 2 :])

    @property
    def patterns(self) -> Tensor:
        """Signs of the scales in each of `magnitudes`: (m, 2**(b-1), b) of +-1."""
        codes, _ = self._rising
        upper = codes[:, codes.shape[1] // 2 :]
        shifts = torch.arange(self.scales.shape[1], device=codes.device)
        return ((upper.unsqueeze(-1) >> shifts) & 1).to(self.scales.dtype) * 2 - 1

    def encode(self, weight: Tensor) -> Tensor:
        """See `Levels`."""
        codes, middles = self._rising
        return codes.gather(1, torch.searchsorted(middles, weight.contiguous())).to(weight.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """See `Levels`."""
        return self.table.gather(1, codes.long())


@dataclass(frozen=True)
class Bins:
    """What of each row falls to each magnitude: count (m, K), the sum of h c²; moment (m, K), the sum of h c |w|.

    above: for each of the K - 1 midpoints, which elements lie above it, (m, g) bool.
    """

    count: Tensor
    moment: Tensor
    above: list[Tensor]


def bins(sizes: Tensor, columns: Tensor, h: Tensor, levels: SignLevels) -> Bins:
    """Sort elements into the nearest magnitudes of `columns * levels`.

    sizes: (m, g), |w|. columns: (g,) positive column scales. h: (g,) column weights.
    """
    magnitudes = levels.magnitudes
    middles = (magnitudes[:, 1:] + magnitudes[:, :-1]) / 2
    square, moments = h * columns.square(), sizes * (h * columns)
    rest_count = square.sum().expand(sizes.shape[0])
    rest_moment = moments.sum(1)
    counts, sums, above = [], [], []
    for k in range(middles.shape[1]):
        higher = sizes > middles[:, k : k + 1] * columns
        mask = higher.to(sizes.dtype)
        count, moment = mask @ square, torch.linalg.vecdot(mask, moments)
        # Sums taken in another order may differ in the last place; an empty bin must not weigh less than nothing.
        counts.append((rest_count - count).clamp(min=0))
        sums.append(rest_moment - moment)
        rest_count, rest_moment = count, moment
        above.append(higher)
    return Bins(torch.stack([*counts, rest_count], 1), torch.stack([*sums, rest_moment], 1), above)


def solve(found: Bins, patterns: Tensor) -> Tensor:
    """Row scales (m, b) by weighted least squares, of any sign, for the signs (m, K, b) of each bin."""
    weighted = patterns * found.count.unsqueeze(-1)
    gram = weighted.transpose(1, 2) @ patterns
    ridge = _RIDGE * found.count.sum(1).clamp(min=torch.finfo(gram.dtype).tiny)
    gram.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
    right = patterns.transpose(1, 2) @ found.moment.unsqueeze(-1)
    scales: Tensor = torch.linalg.solve(gram, right)
    return scales.squeeze(-1)


def excess(found: Bins, magnitudes: Tensor) -> Tensor:
    """(m,) weighted squared error of the coded row, less the part that no choice of scales changes."""
    return (magnitudes * (magnitudes * found.count - 2 * found.moment)).sum(1)


def fit(group: Tensor, scheme: Scheme, weights: Tensor | None, iterations: int = ITERATIONS) -> SignLevels:
    """Fit the scales of every row of `group` (m, g) float32. weights: (g,) positive column weights, or None for 1."""
    check_finite(group)
    h = column_weights(group, weights)
    sizes, columns, stored = group.abs(), torch.ones_like(group[0]), scale_dtype(scheme)
    levels = SignLevels(storable(greedy(group, columns, h, scheme.bits), stored))
    best, least = levels, torch.full_like(sizes[:, :1], torch.inf)
    for step in range(iterations + 1):
        found = bins(sizes, columns, h, levels)
        loss = excess(found, levels.magnitudes).unsqueeze(1)
        better = loss < least
        best = SignLevels(torch.where(better, levels.scales, best.scales))
        least = torch.where(better, loss, least)
        if step < iterations:
            levels = SignLevels(storable(solve(found, levels.patterns).abs(), stored))
    return best


def column_weights(group: Tensor, weights: Tensor | None) -> Tensor:
    """Column weights (g,) with mean 1, in the type of `group` (m, g)."""
    return torch.ones_like(group[0]) if weights is None else weights.to(group.dtype) / weights.mean()


def greedy(group: Tensor, columns: Tensor, h: Tensor, bits: int) -> Tensor:
    """Scales (m, bits) of one sign matrix after the other, each fitted to what the earlier ones leave."""
    rest, scales = group, []
    square, weight = (h * columns.square()).sum(), h * columns
    for _ in range(bits):
        sign = torch.where(rest >= 0, 1.0, -1.0)
        scale = (rest.abs() @ weight).unsqueeze(1) / square
        rest = rest - scale * sign * columns
        scales.append(scale)
    return torch.cat(scales, dim=1)


def check_finite(group: Tensor) -> None:
    """Raise `NumericalFailure` if a weight is not finite."""
    if not bool(torch.isfinite(group).all()):
        raise NumericalFailure("the weights to round are not finite; raise the damping or use more calibration text")


def storable(scales: Tensor, stored: torch.dtype) -> Tensor:
    """Rounded to the stored type, in float32."""
    return scales.clamp(max=torch.finfo(stored).max).to(stored).float()

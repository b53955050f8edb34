"""Sign-basis grids: levels `sum_k (+-r_k)` with one r a bit, fitted by alternating least squares.

The rows-only part of D2Quant's dual-scale quantizer (arXiv 2602.02546, as its released program has it; the multi-bit
form of ARB-LLM's row scales). At 2 bits the levels are -r0-r1, -r0+r1, r0-r1, r0+r1: no level at zero, and near to the
Lloyd-Max grid of normally distributed weights. With h the weight of a column, in turn:

    r = G^-1 p,   G_kl = sum_j h_j B_kj B_lj,   p_k = sum_j h_j B_kj w_j      (row scales, jointly)
    B = signs of the level nearest to w                                        (codes)

Published: h = 1. With h the diagonal of the Gram matrix the fit minimises a diagonal model of the output error.
Each half-step lowers the loss or leaves it; the best scales seen are kept, rounded to their stored type.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from subnibble.errors import NumericalFailure
from subnibble.scheme import Scheme
from subnibble.tensor import scale_dtype

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

    def encode(self, weight: Tensor) -> Tensor:
        """See `Levels`."""
        codes, middles = self._rising
        return codes.gather(1, torch.searchsorted(middles, weight.contiguous())).to(weight.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """See `Levels`."""
        return self.table.gather(1, codes.long())


def fit(group: Tensor, scheme: Scheme, weights: Tensor | None) -> SignLevels:
    """Fit the scales of every row of `group` (m, g) float32. weights: (g,) positive column weights, or None for 1."""
    if not bool(torch.isfinite(group).all()):
        raise NumericalFailure("the weights to round are not finite; raise the damping or use more calibration text")
    h = torch.ones_like(group[0]) if weights is None else weights.to(group.dtype) / weights.mean()
    stored = scale_dtype(scheme)
    levels = SignLevels(_storable(_greedy(group, h, scheme.bits), stored))
    best, least = levels, _loss(group, levels, h)
    for _ in range(ITERATIONS):
        signs = _signs(levels.encode(group), scheme.bits)
        levels = SignLevels(_storable(_solve(group, signs, h), stored))
        loss = _loss(group, levels, h)
        better = loss < least
        best = SignLevels(torch.where(better, levels.scales, best.scales))
        least = torch.where(better, loss, least)
    return best


def _greedy(group: Tensor, h: Tensor, bits: int) -> Tensor:
    """Scales (m, bits) of one sign matrix after the other, each fitted to what the earlier ones leave."""
    rest, scales = group, []
    for _ in range(bits):
        sign = torch.where(rest >= 0, 1.0, -1.0)
        scale = (h * rest.abs()).sum(1, keepdim=True) / h.sum()
        rest = rest - scale * sign
        scales.append(scale)
    return torch.cat(scales, dim=1)


def _solve(group: Tensor, signs: Tensor, h: Tensor) -> Tensor:
    """Weighted least squares for the scales, given signs (m, bits, g); negative ones are turned with their signs."""
    weighted = signs * h
    gram = weighted @ signs.transpose(1, 2)
    gram.diagonal(dim1=1, dim2=2).add_(_RIDGE * h.sum())
    right = weighted @ group.unsqueeze(-1)
    scales: Tensor = torch.linalg.solve(gram, right)
    return scales.squeeze(-1).abs()


def _signs(codes: Tensor, bits: int) -> Tensor:
    """(m, bits, g) of +-1 from codes (m, g)."""
    shifts = torch.arange(bits, device=codes.device).view(1, bits, 1)
    return ((codes.long().unsqueeze(1) >> shifts) & 1).to(codes.dtype) * 2 - 1


def _loss(group: Tensor, levels: SignLevels, h: Tensor) -> Tensor:
    """(m, 1) weighted squared error."""
    error = levels.decode(levels.encode(group)) - group
    return (h * error.square()).sum(1, keepdim=True)


def _storable(scales: Tensor, stored: torch.dtype) -> Tensor:
    """Rounded to the stored type, in float32."""
    return scales.clamp(max=torch.finfo(stored).max).to(stored).float()

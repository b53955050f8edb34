"""Learned weight clipping: for each row and group, the learned share of the weight range that its grid covers.

    high = σ(γ) max(W, 0),   low = σ(β) min(W, 0);   symmetric: high = -low = σ(γ) max |W|

This is OmniQuant's learned weight clipping (arXiv 2308.13137, section 3.2), applied per group. γ and β start at the
ranges that the base method's clip search finds, so that training starts from its result. Scales are rounded to their
stored dtype, as in the checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from subnibble.errors import BadRecipe
from subnibble.rounding import grid
from subnibble.rounding.levels import Fitted
from subnibble.tensor.packed import scale_dtype
from subnibble.tensor.scheme import Scheme
from subnibble.tuning.fake_quant import fake_quantize, rounded

# Initial shares stay below 1, where the sigmoid has no finite inverse.
_LARGEST_SHARE = 0.995


class Clipping(nn.Module):
    """Learned grids of one weight.

    weight: (m, k), in its input basis.
    scheme: bits, group size and zero-point of the grids.
    start: how the initial ranges are chosen.
    """

    _unit: Tensor

    def __init__(self, weight: Tensor, scheme: Scheme, start: grid.Clip) -> None:
        super().__init__()
        self._scheme, self._width = scheme, _width(scheme, weight.shape[1])
        bounds = scheme.group_bounds(weight.shape[1])
        scales = torch.cat([grid.fit(weight[:, first:stop], scheme, start)[0] for first, stop in bounds], 1).unsqueeze(
            -1
        )
        low, high = self._extremes(self._groups(weight))
        share = torch.where(high > low, scales * (scheme.levels - 1) / (high - low), 1.0)
        logits = share.clamp(max=_LARGEST_SHARE).logit()
        # This factor makes the initial ranges bit-exact despite the clamped share.
        self.register_buffer("_unit", share / logits.sigmoid())
        self.upper = nn.Parameter(logits)
        self.lower = nn.Parameter(logits.clone()) if scheme.zero_point == "integer" else None

    def forward(self, weight: Tensor) -> Tensor:
        """Round a weight (m, k) to nearest on the learned grids; returns the dequantized weight (m, k)."""
        groups = self._groups(weight)
        dequantized = fake_quantize(groups, *self._grids(groups), self._scheme.levels).flatten(1)
        return dequantized[:, : weight.shape[1]]

    def fitted(self, weight: Tensor) -> list[Fitted]:
        """The learned grid of each group of a weight (m, k)."""
        with torch.no_grad():
            scale, zero = self._grids(self._groups(weight))
            zero = zero.expand_as(scale)
            return [
                Fitted(grid.UniformLevels(scale[:, g].clone(), zero[:, g].clone(), self._scheme))
                for g in range(scale.shape[1])
            ]

    def _groups(self, weight: Tensor) -> Tensor:
        """(m, groups, width), the last group padded with zeros, which every range contains."""
        padding = -weight.shape[1] % self._width
        padded = nn.functional.pad(weight, (0, padding)) if padding else weight
        groups: Tensor = padded.unflatten(1, (-1, self._width))
        return groups

    def _extremes(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of the unclipped range, (m, groups, 1) each."""
        if self._scheme.zero_point == "none":
            high = groups.abs().amax(-1, keepdim=True)
            return -high, high
        return groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)

    def _grids(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Scales (m, groups, 1), rounded to their stored dtype, and zero-points, broadcastable to them."""
        scheme = self._scheme
        last = scheme.levels - 1
        low, high = self._extremes(groups)
        high = self._unit * self.upper.sigmoid() * high
        if self.lower is None:
            return self._stored(2 * high / last), torch.full_like(high[:1, :1], scheme.levels // 2)
        low = self._unit * self.lower.sigmoid() * low
        scale = self._stored((high - low) / last)
        zero = -low / scale
        return scale, zero + (zero.round().clamp(0, last) - zero).detach()

    def _stored(self, scale: Tensor) -> Tensor:
        kind = scale_dtype(self._scheme)
        return rounded(scale.clamp(grid.smallest_scale(self._scheme), torch.finfo(kind).max), kind)


def check_scheme(scheme: Scheme, path: str) -> None:
    """Raise `BadRecipe` if the linear at `path` has a grid whose ranges cannot be learned."""
    if scheme.grid != "uniform" or scheme.zero_point == "real":
        raise BadRecipe(
            f'{path} has the scheme {scheme.name}, but tuning needs grid = "uniform" and zero_point "none" or '
            '"integer"; set these, or choose a method without tuning'
        )


def _width(scheme: Scheme, columns: int) -> int:
    first, stop = scheme.group_bounds(columns)[0]
    return stop - first

"""Fit grids to groups of weights, and code weights on them. `sign_basis.py` and `mx_grid.py` fit theirs.

A grid row is `w = s * (q - z)` with codes `q` in `0 .. 2**b - 1`. Three zero-points (see `Scheme`), two clips:

- `minmax` spans the extremes of the group.
- `mse` shrinks that range in steps of 1 % down to 21 % and keeps, per row, the one with the least sum of
  `|error| ** power`; 80 candidates and power 2.4 are the search of GPTQ's and QuaRot's released quantizers, 2 is
  the plain squared error.

With no or an integer zero-point the range always contains 0 and shrinks towards 0; with a real one it is the
group's own and shrinks towards its middle. Scales and real zero-points are rounded to their stored type before
any weight is coded, so what is stored is what was fitted. Columns may carry weights, which multiply their errors in
the search.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.errors import BadRecipe, NumericalFailure
from subnibble.rounding import mx_grid, sign_basis
from subnibble.rounding.levels import Fitted, Fitter, Levels
from subnibble.tensor.packed import PackedRange, QuantizedMatrix, scale_dtype
from subnibble.tensor.scheme import E8M0, Scheme

CLIPS = ("minmax", "mse")
_SHRINK_STEPS = 80
# A real zero-point is min / scale: this bound keeps it well inside float16 where a group is nearly constant.
LARGEST_REAL_ZERO = 2.0**12
# Weights below this count as zeros.
_NOTHING = 1e-30


@dataclass(frozen=True)
class Clip(Fitter):
    """How the range of a grid is chosen: `minmax`, or `mse` with its error power."""

    name: str = "mse"
    power: float = 2.0

    def __post_init__(self) -> None:
        if self.name not in CLIPS:
            raise BadRecipe(f"clip is {self.name!r}; choose one of {', '.join(CLIPS)}")
        if not 1.0 <= self.power <= 4.0:
            raise BadRecipe(f"clip_power is {self.power!r}; give a number from 1 to 4 (2 is the squared error)")

    def fit(self, group: Tensor, scheme: Scheme, weights: Tensor | None, index: int = 0) -> Fitted:
        """See `Fitter`: a grid without column scales."""
        return Fitted(fit_levels(group, scheme, self, weights))


def encode(weight: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """Codes of `weight`, float32 integers; `scale` and `zero` broadcast against it."""
    return (weight / scale + zero).round_().clamp_(0, scheme.levels - 1)


def decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The weights that codes stand for."""
    return (codes - zero) * scale


@dataclass(frozen=True)
class UniformLevels:
    """See `Levels`. scale, zero: (m, 1)."""

    scale: Tensor
    zero: Tensor
    scheme: Scheme

    @property
    def scales(self) -> Tensor:
        """See `Levels`."""
        return self.scale

    @property
    def zeros(self) -> Tensor | None:
        """See `Levels`."""
        return None if self.scheme.zero_point == "none" else self.zero

    def encode(self, weight: Tensor) -> Tensor:
        """See `Levels`."""
        return encode(weight, self.scale, self.zero, self.scheme)

    def decode(self, codes: Tensor) -> Tensor:
        """See `Levels`."""
        return decode(codes, self.scale, self.zero)


def fit_levels(group: Tensor, scheme: Scheme, clip: Clip, weights: Tensor | None = None) -> Levels:
    """The grid of every row of `group` (m, g) float32, of the scheme's kind. weights: (g,), of the columns, or None."""
    weights = usable(weights)
    if scheme.grid == "sign":
        return sign_basis.fit(group, scheme, weights)
    if scheme.grid == "mxfp4":
        return mx_grid.fit(group, clip.name, clip.power, weights)
    return UniformLevels(*fit(group, scheme, clip, weights), scheme)


def fit(
    group: Tensor, scheme: Scheme, clip: Clip, weights: Tensor | None = None, stride: int = 1
) -> tuple[Tensor, Tensor]:
    """Uniform grid: scale and zero-point (m, 1) of every row of `group` (m, g), exact in the scheme's stored type.

    stride: take only every so many of the clip search's candidates.
    """
    low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
    if scheme.zero_point == "none":
        high = torch.maximum(high, -low)
        low = -high
    elif scheme.zero_point == "integer":
        low, high = low.clamp(max=0), high.clamp(min=0)
    if clip.name == "minmax":
        return _span(low, high, scheme)
    return _least_error(group, (low, high), scheme, clip.power, weights, range(0, _SHRINK_STEPS, stride))


def quantized(weight: Tensor, scheme: Scheme, fitter: Fitter, weights: Tensor | None = None) -> QuantizedMatrix:
    """Round `weight` (m, k) to nearest on a grid fitted to each group: the RTN of every method.

    weights: (k,) not negative, of each column's squared error in the fits, or None for 1.
    """
    bounds = scheme.group_bounds(weight.shape[1])
    groups = [weight[:, start:stop] for start, stop in bounds]
    probs = [None if weights is None else weights[start:stop] for start, stop in bounds]
    pairs = enumerate(zip(groups, probs, strict=True))
    fitted = [fitter.fit(group, scheme, share, index) for index, (group, share) in pairs]
    codes = [fit.encode(group).to(torch.uint8) for fit, group in zip(fitted, groups, strict=True)]
    return QuantizedMatrix(torch.cat(codes, dim=1), *join(fitted))


def nearest(weight: Tensor, scheme: Scheme, fitter: Fitter | None = None) -> Tensor:
    """`weight` (m, k) rounded to nearest, dense float32; grids span each group's extremes unless a fitter is given."""
    return PackedRange.pack(quantized(weight, scheme, fitter or Clip("minmax")), scheme).dequantize()


def join(fitted: Sequence[Fitted]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scales, zeros and column scales of a row's groups side by side, as `CodedMatrix` has them."""
    zeros = [fit.levels.zeros for fit in fitted if fit.levels.zeros is not None]
    columns = [fit.columns for fit in fitted if fit.columns is not None]
    return (
        torch.cat([fit.levels.scales for fit in fitted], dim=1),
        torch.cat(zeros, dim=1) if zeros else None,
        torch.cat(columns) if columns else None,
    )


def usable(weights: Tensor | None) -> Tensor | None:
    """Column weights, or None where they tell no column from another because all are 0."""
    return None if weights is None or not bool((weights > 0).any()) else weights


def diagonal_weights(gram: Tensor) -> Tensor:
    """The diagonal of a Gram matrix (k, k) as column weights (k,) float32; of a float64 one over its largest."""
    diagonal = gram.diagonal()
    if gram.dtype == torch.float64:
        diagonal = diagonal / diagonal.max().clamp(min=torch.finfo(gram.dtype).tiny)
    return diagonal.float()


def check_range(weight: Tensor, scheme: Scheme, where: str) -> None:
    """Raise `NumericalFailure` where scales of the scheme's type hold none of a weight's (m, k) magnitudes.

    A few small groups are no matter: next to the others they count for nothing. where: names the weight.
    """
    if scheme.scale_type == E8M0 or not weight.numel():
        return
    stored, largest = torch.finfo(scale_dtype(scheme)), max(abs(float(end)) for end in weight.aminmax())
    if scheme.grid == "sign" and stored.max < largest < math.inf:
        raise NumericalFailure(f"{where}: {too_wide(largest, scheme)}")
    # Of a smaller scale few bits are left.
    if _NOTHING < largest < scheme.levels * stored.smallest_normal * 2.0**-8:
        raise NumericalFailure(
            f"{where}: its largest weight is {largest:.3g}, too small for scales of type {scheme.scale_type}; "
            'set scale_type = "float32" in the recipe'
        )


def too_wide(span: float, scheme: Scheme) -> NumericalFailure:
    """The error of a group of that span."""
    return NumericalFailure(
        f"a group spans {span:.3g}, too much for scales of type {scheme.scale_type}; "
        'set scale_type = "float32" in the recipe'
    )


def smallest_scale(scheme: Scheme) -> float:
    """The smallest scale that is stored: of groups that are all zero, and what comes near."""
    stored = scale_dtype(scheme)
    return torch.finfo(stored).smallest_normal * 2.0**-10 if stored == torch.float16 else _NOTHING


def _span(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The grid whose first and last level are `low` and `high`, in stored precision."""
    stored = scale_dtype(scheme)
    scale = (high - low) / (scheme.levels - 1)
    if scheme.zero_point == "real":
        scale = torch.maximum(scale, torch.maximum(low.abs(), high.abs()) / LARGEST_REAL_ZERO)
    scale = scale.clamp(min=smallest_scale(scheme)).to(stored).float()
    if not bool(torch.isfinite(scale).all()):
        widest = float((high - low).max())
        if not math.isfinite(widest):
            raise NumericalFailure(
                "the weights to round are not finite; raise the damping or use more calibration text"
            )
        raise too_wide(widest, scheme)
    if scheme.zero_point == "none":
        return scale, torch.full_like(scale, scheme.levels // 2)
    zero = -low / scale
    if scheme.zero_point == "integer":
        return scale, zero.round().clamp(0, scheme.levels - 1)
    return scale, zero.to(stored).float()


def _least_error(
    group: Tensor,
    span: tuple[Tensor, Tensor],
    scheme: Scheme,
    power: float,
    weights: Tensor | None,
    steps: Iterable[int],
) -> tuple[Tensor, Tensor]:
    low, high = span
    middle = (low + high) / 2 if scheme.zero_point == "real" else torch.zeros_like(low)
    best = torch.full_like(low, torch.inf)
    scale, zero = s, z = _span(low, high, scheme)
    for step in steps:
        if step > 0:
            keep = 1 - step / 100
            s, z = _span(middle + keep * (low - middle), middle + keep * (high - middle), scheme)
        error = decode(encode(group, s, z, scheme), s, z).sub_(group).abs_()
        errors = error.square_() if power == 2 else error.pow_(power)
        loss = (errors if weights is None else errors.mul_(weights)).sum(1, keepdim=True)
        better = loss < best
        best = torch.where(better, loss, best)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    return scale, zero

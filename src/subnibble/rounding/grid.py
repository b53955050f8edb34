"""Fit uniform grids to groups of weights, and encode weights. `sign_basis.py` and `mx_grid.py` fit the other grids.

A row of a group has the grid `w = s * (q - z)` with codes `q` in `0 .. 2**b - 1`. There are three kinds of zero-point
(see `Scheme`) and two ways to choose the range:

- `minmax`: the minimum and maximum of the row in the group.
- `mse`: shrink that range in steps of 1 % down to 21 % and keep, per row, the range with the least sum of
  `|error| ** power`. These 80 candidates and power 2.4 are the search of GPTQ's and QuaRot's released quantizers;
  power 2 is the squared error.

With zero-point "none" or "integer" the range always contains 0 and shrinks towards 0. With "real" it is the minimum and
maximum alone and shrinks towards its middle. Scales and real zero-points are rounded to their stored type before any
weight is encoded, so the stored grid is the fitted one. Optional column weights multiply the columns' errors in the
search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
# Candidates of the clip search are tried together while their ranges, and the errors of a small group, are at most this
# many numbers. A larger tensor would leave the processor's cache.
_RANGES_AT_ONCE, _ERRORS_AT_ONCE = 2**16, 2**14
# A real zero-point is -min / scale: this bound keeps it well inside float16 if a group is nearly constant.
LARGEST_REAL_ZERO = 2.0**12
# Smaller weights count as 0.
_NEGLIGIBLE = 1e-30


@dataclass(frozen=True)
class Clip(Fitter):
    """Fitter that chooses each grid's range; see the module.

    name: "minmax" or "mse".
    power: exponent of |error| in the "mse" search, from 1 to 4.
    """

    name: str = "mse"
    power: float = 2.0

    def __post_init__(self) -> None:
        if self.name not in CLIPS:
            raise BadRecipe(f"clip is {self.name!r}; choose one of {', '.join(CLIPS)}")
        if not 1.0 <= self.power <= 4.0:
            raise BadRecipe(f"clip_power is {self.power!r}; give a number from 1 to 4 (2 is the squared error)")

    def fit(self, group: Tensor, scheme: Scheme, weights: Tensor | None, index: int = 0) -> Fitted:
        """Fit the grid of `group` (m, g), without column scales; see `Fitter`."""
        return Fitted(fit_levels(group, scheme, self, weights))


def encode(weight: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """Nearest codes of `weight`, as whole numbers in its dtype; `scale` and `zero` broadcast against it."""
    return (weight / scale + zero).round_().clamp_(0, scheme.levels - 1)


def decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Dequantize: `(codes - zero) * scale`; `scale` and `zero` broadcast against `codes`."""
    return (codes - zero) * scale


@dataclass(frozen=True)
class UniformLevels:
    """The uniform grid of one group of m rows; see `Levels`.

    scale, zero: (m, 1) float32.
    scheme: bit width and kind of zero-point.
    """

    scale: Tensor
    zero: Tensor
    scheme: Scheme

    @property
    def scales(self) -> Tensor:
        """Scales (m, 1)."""
        return self.scale

    @property
    def zeros(self) -> Tensor | None:
        """Zero-points (m, 1), or None if the scheme has none."""
        return None if self.scheme.zero_point == "none" else self.zero

    def encode(self, weight: Tensor) -> Tensor:
        """Nearest codes (m, n) of `weight` (m, n)."""
        return encode(weight, self.scale, self.zero, self.scheme)

    def decode(self, codes: Tensor) -> Tensor:
        """Weights (m, n) of `codes` (m, n)."""
        return decode(codes, self.scale, self.zero)


def fit_levels(group: Tensor, scheme: Scheme, clip: Clip, weights: Tensor | None = None) -> Levels:
    """Fit a grid of the scheme's kind (uniform, sign or mxfp4) to each row of a group.

    group: (m, g) float32.
    clip: how to choose the range; a sign grid ignores it.
    weights: (g,), weight of each column's error, or None for 1.
    """
    weights = usable(weights)
    if scheme.grid == "sign":
        return sign_basis.fit(group, scheme, weights)
    if scheme.grid == "mxfp4":
        return mx_grid.fit(group, clip.name, clip.power, weights)
    return UniformLevels(*fit(group, scheme, clip, weights), scheme)


def fit(
    group: Tensor, scheme: Scheme, clip: Clip, weights: Tensor | None = None, stride: int = 1
) -> tuple[Tensor, Tensor]:
    """Fit a uniform grid to each row of a group.

    group: (m, g).
    weights: (g,), weight of each column's error, or None for 1.
    stride: try only every stride-th candidate of the clip search.
    Returns scale and zero-point, (m, 1) each, exact in the scheme's stored type.
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
    """Round to nearest on a grid fitted to each group. All methods that round to nearest use this function.

    weight: (m, k).
    fitter: fits each group's grid.
    weights: (k,), nonnegative, weight of each column's error in the fits, or None for 1.
    """
    bounds = scheme.group_bounds(weight.shape[1])
    groups = [weight[:, start:stop] for start, stop in bounds]
    group_weights = [None if weights is None else weights[start:stop] for start, stop in bounds]
    pairs = enumerate(zip(groups, group_weights, strict=True))
    grids = [fitter.fit(group, scheme, h, index) for index, (group, h) in pairs]
    codes = [fitted.encode(group).to(torch.uint8) for fitted, group in zip(grids, groups, strict=True)]
    return QuantizedMatrix(torch.cat(codes, dim=1), *join(grids))


def nearest(weight: Tensor, scheme: Scheme, fitter: Fitter | None = None) -> Tensor:
    """Round `weight` (m, k) to nearest and dequantize it: (m, k) float32.

    fitter: fits each group's grid; None for min-max.
    """
    return PackedRange.pack(quantized(weight, scheme, fitter or Clip("minmax")), scheme).dequantize()


def join(grids: Sequence[Fitted]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Concatenate the scales, zero-points and column scales of a row's groups, for a `QuantizedMatrix`."""
    zeros = [fitted.levels.zeros for fitted in grids if fitted.levels.zeros is not None]
    column_scales = [fitted.column_scales for fitted in grids if fitted.column_scales is not None]
    return (
        torch.cat([fitted.levels.scales for fitted in grids], dim=1),
        torch.cat(zeros, dim=1) if zeros else None,
        torch.cat(column_scales) if column_scales else None,
    )


def usable(weights: Tensor | None) -> Tensor | None:
    """The column weights, or None (weight 1 each) if all of them are 0."""
    return None if weights is None or not bool((weights > 0).any()) else weights


def diagonal_weights(gram: Tensor) -> Tensor:
    """Column weights (k,) float32: the diagonal of a Gram matrix (k, k); if float64, divided by its maximum."""
    diagonal = gram.diagonal()
    if gram.dtype == torch.float64:
        diagonal = diagonal / diagonal.max().clamp(min=torch.finfo(gram.dtype).tiny)
    return diagonal.float()


def check_range(weight: Tensor, scheme: Scheme, where: str) -> None:
    """Raise `NumericalFailure` if the largest weight is out of range for scales of the scheme's type.

    weight: (m, k). Groups of small weights are fine beside others of normal size: they hardly matter.
    where: the weight, for the message.
    """
    if scheme.scale_type == E8M0 or not weight.numel():
        return
    stored, max_abs = torch.finfo(scale_dtype(scheme)), max(abs(float(end)) for end in weight.aminmax())
    if scheme.grid == "sign" and stored.max < max_abs < math.inf:
        raise NumericalFailure(f"{where}: {too_wide(max_abs, scheme)}")
    # A smaller scale would be a subnormal number with few bits left.
    if _NEGLIGIBLE < max_abs < scheme.levels * stored.smallest_normal * 2.0**-8:
        raise NumericalFailure(
            f"{where}: its largest weight is {max_abs:.3g}, too small for scales of type {scheme.scale_type}; "
            'set scale_type = "float32" in the recipe'
        )


def too_wide(span: float, scheme: Scheme) -> NumericalFailure:
    """The error to raise for a group whose range is `span` wide."""
    return NumericalFailure(
        f"a group spans {span:.3g}, too much for scales of type {scheme.scale_type}; "
        'set scale_type = "float32" in the recipe'
    )


def smallest_scale(scheme: Scheme) -> float:
    """The smallest scale that is stored: that of groups whose weights are all 0 or nearly 0."""
    stored = scale_dtype(scheme)
    return torch.finfo(stored).smallest_normal * 2.0**-10 if stored == torch.float16 else _NEGLIGIBLE


def _span(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of the grid from `low` to `high`, rounded to their stored type."""
    stored = scale_dtype(scheme)
    scale = (high - low) / (scheme.levels - 1)
    if scheme.zero_point == "real":
        scale = torch.maximum(scale, torch.maximum(low.abs(), high.abs()) / LARGEST_REAL_ZERO)
    scale = scale.clamp(min=smallest_scale(scheme)).to(stored).float()
    if not bool(torch.isfinite(scale).all()):
        span = float((high - low).max())
        if not math.isfinite(span):
            raise NumericalFailure(
                "the weights to round are not finite; raise the damping or use more calibration text"
            )
        raise too_wide(span, scheme)
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
    steps: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Search the range with the least error; see `mse` in the module. steps: percents by which the range shrinks."""
    low, high = span
    middle = (low + high) / 2 if scheme.zero_point == "real" else torch.zeros_like(low)
    best = torch.full_like(low, torch.inf)
    scale, zero = _span(low, high, scheme)
    at_once = max(1, _RANGES_AT_ONCE // max(1, low.numel()))
    for first in range(0, len(steps), at_once):
        fractions = [1 - step / 100 for step in steps[first : first + at_once]]
        s, z = _span(_shrunk(low, middle, fractions), _shrunk(high, middle, fractions), scheme)
        losses = _losses(group, s, z, scheme, power, weights)
        # The first one with the least loss; a loss that is no number counts as infinite.
        index = losses.nan_to_num(torch.inf, torch.inf).argmin(0, keepdim=True)
        loss = losses.gather(0, index)[0]
        better = loss < best
        best = torch.where(better, loss, best)
        scale = torch.where(better, s.gather(0, index)[0], scale)
        zero = torch.where(better, z.gather(0, index)[0], zero)
    return scale, zero


def _shrunk(end: Tensor, middle: Tensor, fractions: Sequence[float]) -> Tensor:
    """Ends of ranges that keep these fractions of their distance from the middle: (fractions, m, 1).

    end, middle: (m, 1).
    """
    fraction = end.new_tensor(fractions).view(-1, 1, 1)
    return torch.where(fraction == 1, end, middle + fraction * (end - middle))


def _losses(group: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme, power: float, weights: Tensor | None) -> Tensor:
    """Sum of `|error| ** power` of each row on each candidate's grid: (candidates, m, 1).

    group: (m, g).
    scale, zero: (candidates, m, 1).
    weights: (g,), of the columns' errors, or None for 1.
    Candidates that are tried together have the same sums, bit for bit, as one by one.
    """
    # A sum depends on the order of axes in memory, and a power on a number's place in the tensor: only squares, in rows
    # of contiguous numbers, are the same in a larger tensor.
    same_together = power == 2 and group.stride(1) == 1 and group.stride(0) >= group.shape[1]
    at_once = _ERRORS_AT_ONCE // max(1, group.numel()) if same_together else 1
    together = min(max(1, at_once), len(scale))
    # Allocated once: a new allocation for each candidate would cost page faults.
    errors = torch.empty_like(group).unsqueeze(0) if together == 1 else group.new_empty(together, *group.shape)
    losses = group.new_empty(scale.shape)
    for first in range(0, len(scale), together):
        s, z = scale[first : first + together], zero[first : first + together]
        # decode(encode(group)) - group
        error = torch.div(group, s, out=errors[: len(s)]).add_(z).round_().clamp_(0, scheme.levels - 1)
        error.sub_(z).mul_(s).sub_(group)
        powers = error.square_() if power == 2 else error.abs_().pow_(power)
        losses[first : first + together] = (powers if weights is None else powers.mul_(weights)).sum(-1, keepdim=True)
    return losses

"""The MXFP4 number format (OCP Microscaling 1.0): E2M1 elements, one E8M0 scale per 32 elements."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

# Values of E2M1 codes 0 .. 15: one sign bit, two exponent bits, one mantissa bit.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# Every E2M1 value is a whole multiple of this.
E2M1_STEP = 0.5
LARGEST_NUMBER = int(max(E2M1) / E2M1_STEP)
_MIDDLES = tuple((low + high) / 2 for low, high in itertools.pairwise(E2M1[:8]))
# The exponent of the largest level, 6 = 1.5 * 2^2.
_LARGEST_EXPONENT = 2
_BIAS = 127
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**127


def encode_e2m1(values: Tensor) -> Tensor:
    """Codes (0 .. 15, int64) of the nearest E2M1 numbers; larger values saturate at 6, ties go to the even code."""
    magnitudes = values.abs()
    codes = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
    for lower, middle in enumerate(_MIDDLES):
        # A tie goes to the code whose mantissa bit is 0.
        codes += magnitudes >= middle if lower % 2 else magnitudes > middle
    return codes + 8 * (values < 0)


def nearest_e2m1(values: Tensor) -> Tensor:
    """Round to the E2M1 numbers that `encode_e2m1` encodes, in the values' dtype; NaN stays NaN."""
    magnitudes = values.abs()
    # Levels are 1/2 apart below 2, 1 apart below 4, and 2 apart from there on; even multiples of the spacing have an
    # even mantissa. In place and without `where`, which is several times slower.
    spacing = magnitudes.clone().ge_(2).mul_(0.5).add_(magnitudes.ge_(4)).add_(0.5)
    return (values / spacing).round_().mul_(spacing).clamp_(-max(E2M1), max(E2M1))


def decode_e2m1(codes: Tensor) -> Tensor:
    """Values (float32) of codes 0 .. 15 of any integer dtype."""
    return torch.tensor(E2M1, dtype=torch.float32, device=codes.device)[codes.long()]


def shared_scale(max_abs: Tensor) -> Tensor:
    """The specification's scale of each group, 2^(floor(log2 max_abs) - 2), float32.

    max_abs: the largest magnitude in each group, any shape.
    """
    exponent = torch.frexp(max_abs.float()).exponent - 1 - _LARGEST_EXPONENT
    scale = torch.ldexp(torch.ones_like(max_abs, dtype=torch.float32), exponent)
    return torch.where(max_abs > 0, scale, SMALLEST_SCALE).clamp(SMALLEST_SCALE, LARGEST_SCALE)


def encode_e8m0(scales: Tensor) -> Tensor:
    """Encode scales, which are powers of two, as biased exponents (uint8)."""
    return (torch.frexp(scales).exponent - 1 + _BIAS).to(torch.uint8)


def decode_e8m0(exponents: Tensor) -> Tensor:
    """Decode biased exponents (uint8) to powers of two, float32."""
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - _BIAS)

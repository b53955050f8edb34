"""Apply rotary positions to keys, and remove them.

k = x cos + rotate_half(x) sin,    rotate_half(x) = (-second half, first half)
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to the first r channels; the others stay unchanged.

    x: (b, heads, t, width).
    cos, sin: (b, t, r).
    """
    channels = cos.shape[-1]
    rotary, plain = x[..., :channels], x[..., channels:]
    rotated = rotary * cos.unsqueeze(1) + _rotate_half(rotary) * sin.unsqueeze(1)
    return torch.cat([rotated, plain], -1) if plain.shape[-1] else rotated


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Remove rotary positions: the inverse of `rotate`, also if cos and sin share a factor (as in YaRN).

    x: (b, heads, t, width).
    cos, sin: (b, t, r).
    """
    channels = cos.shape[-1]
    rotary, plain = x[..., :channels], x[..., channels:]
    norm = (cos.square() + sin.square()).unsqueeze(1)
    unrotated = (rotary * cos.unsqueeze(1) - _rotate_half(rotary) * sin.unsqueeze(1)) / norm
    return torch.cat([unrotated, plain], -1) if plain.shape[-1] else unrotated


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)

"""Rotary positions put on keys, and taken off: `k = x cos + turn(x) sin`, turn(x) = (-second half, first half)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Put positions on. x: (b, heads, t, width). cos, sin: (b, t, turned), of the first `rotated` channels alone."""
    rotated = cos.shape[-1]
    part, rest = x[..., :rotated], x[..., rotated:]
    found = part * cos.unsqueeze(1) + _turn(part) * sin.unsqueeze(1)
    return torch.cat([found, rest], -1) if rest.shape[-1] else found


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Take positions off; inverse of `rotate`, whatever factor (YaRN's) cos and sin have in common."""
    rotated = cos.shape[-1]
    part, rest = x[..., :rotated], x[..., rotated:]
    norm = (cos.square() + sin.square()).unsqueeze(1)
    found = (part * cos.unsqueeze(1) - _turn(part) * sin.unsqueeze(1)) / norm
    return torch.cat([found, rest], -1) if rest.shape[-1] else found


def _turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)

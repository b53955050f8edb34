"""Types in which products and their inputs are computed, under autocast and float16, too."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def narrowed(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 or better in `dtype`; what float16 does not hold becomes its largest number.

    Column scales, transforms and rounded-up scales of inputs may lead beyond it.
    """
    if dtype == torch.float16:
        largest = torch.finfo(dtype).max
        wide = wide.clamp(-largest, largest)
    return wide.to(dtype)


def as_written(device: torch.device) -> AbstractContextManager[object]:
    """Products in the types that are written here, under autocast, too."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()

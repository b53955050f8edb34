"""Dtypes in which products and their inputs are computed, also under autocast and in float16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def narrowed(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor of float32 or better to `dtype`; values beyond float16's range become its largest number.

    Column scales, transforms and rounded-up scales of inputs can exceed that range.
    """
    if dtype == torch.float16:
        limit = torch.finfo(dtype).max
        wide = wide.clamp(-limit, limit)
    return wide.to(dtype)


def as_written(device: torch.device) -> AbstractContextManager[object]:
    """Context without autocast: products are computed in the dtypes that the code writes."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()

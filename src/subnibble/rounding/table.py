"""Embedding and head: tables rounded to nearest, or as matrices of 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from subnibble.rounding import grid
from subnibble.tensor.packed import PackedRange, PackedTensor
from subnibble.tensor.scheme import Scheme

# Rows rounded together, to bound the memory of the clip search.
_ROWS = 8192
# float16 keeps eight bits of it.
_SMALLEST_HALF = 2.0**-17


def pack_table(path: str, weight: Tensor, scheme: Scheme | None) -> tuple[dict[str, Tensor], PackedTensor | None]:
    """The tensors to store of the table (n, d) at `path`, and its packed form. scheme: None for 16 bits."""
    if scheme is None:
        return {f"{path}.weight": as_stored(weight)}, None
    scheme.check_width(weight.shape[1], path)
    grid.check_range(weight, scheme, path)
    clip = grid.Clip("minmax" if scheme.bits == 8 else "mse")
    chunks = [grid.quantized(rows.float(), scheme, clip) for rows in weight.split(_ROWS)]
    parts = [PackedRange.pack(chunk, scheme) for chunk in chunks]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    whole = PackedRange(
        scheme,
        weight.shape[1],
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(zeros) if zeros else None,
    )
    packed = PackedTensor((whole,))
    return {f"{path}.{name}": tensor for name, tensor in packed.state().items()}, packed


def as_stored(tensor: Tensor) -> Tensor:
    """A tensor that is not quantized, as it is stored: matrices at 16 bits, vectors as they are."""
    if tensor.dim() < 2 or tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor
    half = tensor.to(torch.float16)
    # Use bfloat16 where float16 overflows, or keeps fewer bits of the largest number.
    if bool(torch.isfinite(half).all()) and not 0 < float(tensor.abs().amax()) < _SMALLEST_HALF:
        return half
    wide = tensor.to(torch.bfloat16)
    return wide if bool(torch.isfinite(wide).all()) else tensor

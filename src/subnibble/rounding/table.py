"""The embedding and the output head: round to nearest, or store in 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from subnibble.rounding import grid
from subnibble.tensor.packed import PackedRange, PackedTensor
from subnibble.tensor.scheme import Scheme

# Rows rounded together, to bound the memory of the clip search.
_ROWS = 8192
# The smallest number of which float16 keeps eight bits.
_SMALLEST_HALF = 2.0**-17


def pack_table(path: str, weight: Tensor, scheme: Scheme | None) -> tuple[dict[str, Tensor], PackedTensor | None]:
    """Quantize a table, or cast it to 16 bits.

    path: module path of the table.
    weight: (n, d), one row per token.
    scheme: how to quantize it, or None for 16 bits.
    Returns the tensors to store, by name, and the packed table (None for 16 bits).
    """
    if scheme is None:
        return {f"{path}.weight": as_stored(weight)}, None
    scheme.check_width(weight.shape[1], path)
    grid.check_range(weight, scheme, path)
    clip = grid.Clip("minmax" if scheme.bits == 8 else "mse")
    chunks = [grid.quantized(rows.float(), scheme, clip) for rows in weight.split(_ROWS)]
    ranges = [PackedRange.pack(chunk, scheme) for chunk in chunks]
    zeros = [rows.zeros for rows in ranges if rows.zeros is not None]
    table = PackedRange(
        scheme,
        weight.shape[1],
        torch.cat([rows.codes for rows in ranges]),
        torch.cat([rows.scales for rows in ranges]),
        torch.cat(zeros) if zeros else None,
    )
    packed = PackedTensor((table,))
    return {f"{path}.{name}": tensor for name, tensor in packed.state().items()}, packed


def as_stored(tensor: Tensor) -> Tensor:
    """An unquantized tensor as it is stored: a matrix in 16 bits (unless its values do not fit), a vector unchanged."""
    if tensor.dim() < 2 or tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor
    half = tensor.to(torch.float16)
    # Use bfloat16 if float16 overflows or would keep fewer bits of the largest number.
    if bool(torch.isfinite(half).all()) and not 0 < float(tensor.abs().amax()) < _SMALLEST_HALF:
        return half
    wide = tensor.to(torch.bfloat16)
    return wide if bool(torch.isfinite(wide).all()) else tensor

"""The operations of a running packed model, each with one name.

These are the plain torch references that every faster kernel must agree with. They hold no dense copy of a weight
beyond the call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subnibble.runtime import activations, site_input
from subnibble.runtime.integer import multiply_add_
from subnibble.runtime.precision import as_written
from subnibble.runtime.site_input import Entered
from subnibble.tensor import hadamard
from subnibble.tensor.linear import Linear, PackedWeight
from subnibble.tensor.packed import PackedTensor


def linear(x: Tensor, own: Linear) -> Tensor:
    """Apply a linear. x: (..., k). Result (..., m), x's dtype."""
    return product(x, site_input.apply(x, own.input), own)


def product(x: Tensor, made: Entered, own: Linear) -> Tensor:
    """The product with what was made of x (..., k). Result (..., m), x's dtype."""
    weight = own.weight
    if made.quantized is None:
        assert made.tokens is not None
        y = torch.nn.functional.linear(made.tokens, dense(weight).to(x.dtype), weight.bias)
        if weight.low_rank is not None:
            down, up = weight.low_rank
            inner = torch.nn.functional.linear(made.tokens, down.dequantize(x.dtype))
            y = y + torch.nn.functional.linear(inner, up.dequantize(x.dtype))
        return y.view(*x.shape[:-1], y.shape[1])
    with as_written(x.device):
        y = _integer(made.quantized, made.rest, own)
    if weight.bias is not None:
        y += weight.bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])


def embedding(ids: Tensor, weight: PackedTensor, dtype: torch.dtype) -> Tensor:
    """Rows of a packed table; `IndexError` for an id it does not have, negative ones included, as `nn.Embedding`.

    ids: any shape, integer. weight: packed (n, d). Result (*ids.shape, d) in `dtype`.
    """
    return weight.rows(ids.reshape(-1)).dequantize(dtype).view(*ids.shape, weight.shape[1])


def dense(weight: PackedWeight) -> Tensor:
    """The weight (m, k) float32 that inputs meet once they have entered, low-rank branch aside."""
    whole = weight.main.dequantize()
    if weight.salient is not None:
        whole[:, : weight.salient.shape[1]] += weight.salient.dequantize()
    return whole


def dense_from_input(own: Linear) -> Tensor:
    """The weight (m, k) float32 that inputs meet as they come, all terms included."""
    weight, site = dense(own.weight), own.input
    if own.weight.low_rank is not None:
        down, up = own.weight.low_rank
        weight += up.dequantize() @ down.dequantize()
    if site.blocks:
        weight = hadamard.multiply_transposed(weight, site.blocks)
    if site.gather is not None:
        weight = torch.empty_like(weight).index_copy_(1, site.gather.long(), weight)
    return weight if site.column_scale is None else weight * site.column_scale.float()


def _integer(x: activations.Quantized, rest: activations.Quantized | None, own: Linear) -> Tensor:
    """Whole numbers (t, k) to (t, m) float32. rest: of the salient channels, or None."""
    weight, tokens, device = own.weight, x.numbers.shape[0], x.numbers.device
    y = torch.zeros(tokens, weight.main.shape[0], dtype=torch.float32, device=device)
    multiply_add_(y, x, weight.main)
    if weight.salient is not None:
        multiply_add_(y, x, weight.salient)
        if rest is not None:
            multiply_add_(y, rest, weight.salient)
    if weight.low_rank is not None:
        down, up = weight.low_rank
        inner = torch.zeros(tokens, down.shape[0], dtype=torch.float32, device=device)
        multiply_add_(inner, x, down)
        assert own.input.activation is not None
        # Between the factors there are no outlier channels.
        multiply_add_(y, activations.quantize(inner, own.input.activation.without_outliers), up)
    return y

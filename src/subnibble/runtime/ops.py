"""The operations of a running packed model, each under one name.

On the CPU, products and dequantization run on C++ kernels where they were built (`native.py`);
`kernels.native.chosen("torch")` gives the torch references that every faster kernel must agree with. No dense copy of a
weight outlives the call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subnibble.runtime import activations, native, site_input
from subnibble.runtime.integer import multiply_add_
from subnibble.runtime.native import NativeInput
from subnibble.runtime.precision import as_written
from subnibble.runtime.site_input import PreparedInput
from subnibble.tensor import hadamard
from subnibble.tensor.linear import Linear, PackedWeight, SiteInput
from subnibble.tensor.packed import PackedTensor


def linear(x: Tensor, layer: Linear) -> Tensor:
    """Apply a linear. x: (..., k). Returns (..., m) in x's dtype."""
    return product(x, prepare(x, layer.input), layer)


def prepare(x: Tensor, site: SiteInput) -> PreparedInput | NativeInput:
    """Apply a site's steps to x (..., k), by kernels where they run."""
    return native.prepare(x, site) if native.takes(x) else site_input.apply(x, site)


def product(x: Tensor, prepared: PreparedInput | NativeInput, layer: Linear) -> Tensor:
    """Multiply a prepared input with the linear's weight, and add the bias.

    x: (..., k), the input itself, which gives the result's shape and dtype.
    prepared: `prepare` of x.
    Returns (..., m) in x's dtype, or in autocast's if the input is not quantized.
    """
    weight = layer.weight
    if isinstance(prepared, NativeInput):
        y = native.product(prepared, weight)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1])
    if prepared.quantized is None:
        assert prepared.tokens is not None
        y = _float_product(prepared.tokens, weight)
        return y.view(*x.shape[:-1], y.shape[1])
    with as_written(x.device):
        y = _integer(prepared.quantized, prepared.rest, layer)
    if weight.bias is not None:
        y += weight.bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])


def embedding(ids: Tensor, weight: PackedTensor, dtype: torch.dtype) -> Tensor:
    """Look up rows of a packed table.

    ids: any shape, integer.
    weight: packed (n, d).
    Returns (*ids.shape, d) in `dtype`. Raises `IndexError` for an id outside 0 .. n - 1, as `nn.Embedding` does.
    """
    return dequantize(weight.rows(ids.reshape(-1)), dtype).view(*ids.shape, weight.shape[1])


def dequantize(weight: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dense matrix (m, k), computed in float32 and cast once to `dtype`."""
    if not torch.compiler.is_compiling() and native.runs(weight.ranges[0].codes):
        return native.dequantize(weight, dtype)
    return weight.dequantize(dtype)


def dense(weight: PackedWeight) -> Tensor:
    """Dense weight (m, k) float32 for the prepared input, without the low-rank branch."""
    summed = dequantize(weight.main)
    if weight.salient is not None:
        summed[:, : weight.salient.shape[1]] += dequantize(weight.salient)
    return summed


def dense_from_input(layer: Linear) -> Tensor:
    """Dense weight (m, k) float32 for the untransformed input, all terms included."""
    weight, site = dense(layer.weight), layer.input
    if layer.weight.low_rank is not None:
        down, up = layer.weight.low_rank
        weight += dequantize(up) @ dequantize(down)
    if site.blocks:
        weight = hadamard.multiply_transposed(weight, site.blocks)
    if site.gather is not None:
        weight = torch.empty_like(weight).index_copy_(1, site.gather.long(), weight)
    return weight if site.column_scale is None else weight * site.column_scale.float()


def _float_product(tokens: Tensor, weight: PackedWeight) -> Tensor:
    """Multiply tokens (t, k) that are not quantized, and add the bias: (t, m) in their dtype, or in autocast's."""
    y = torch.nn.functional.linear(tokens, dense(weight).to(tokens.dtype), weight.bias)
    if weight.low_rank is not None:
        down, up = weight.low_rank
        inner = torch.nn.functional.linear(tokens, dequantize(down, tokens.dtype))
        y = y + torch.nn.functional.linear(inner, dequantize(up, tokens.dtype))
    return y


def _integer(x: activations.Quantized, residual: activations.Quantized | None, layer: Linear) -> Tensor:
    """Multiply whole numbers (t, k): (t, m) float32.

    residual: the quantization error of the salient channels, itself quantized; or None.
    """
    weight, tokens, device = layer.weight, x.numbers.shape[0], x.numbers.device
    y = torch.zeros(tokens, weight.main.shape[0], dtype=torch.float32, device=device)
    multiply_add_(y, x, weight.main)
    if weight.salient is not None:
        multiply_add_(y, x, weight.salient)
        if residual is not None:
            multiply_add_(y, residual, weight.salient)
    if weight.low_rank is not None:
        down, up = weight.low_rank
        inner = torch.zeros(tokens, down.shape[0], dtype=torch.float32, device=device)
        multiply_add_(inner, x, down)
        assert layer.input.activation is not None
        # There are no outlier channels between the low-rank factors.
        multiply_add_(y, activations.quantize(inner, layer.input.activation.without_outliers), up)
    return y

"""Quantize and dequantize keys and values as the cache would, for forward passes without a cache.

If the scheme has a window, tokens are quantized as the text's last token sees them. Gradients pass straight through.
"""

from __future__ import annotations

from torch import Tensor

from subnibble.runtime.kv_cache import CacheQuantizer, TensorStore
from subnibble.runtime.rotary import rotate, unrotate
from subnibble.runtime.straight_through import straight_through
from subnibble.tensor import hadamard
from subnibble.tensor.cache_scheme import CacheScheme


def quantized_keys(keys: Tensor, cache_quantizer: CacheQuantizer, positions: tuple[Tensor, Tensor]) -> Tensor:
    """Quantize and dequantize keys.

    keys: (b, heads, t, width), with rotary positions, without the Hadamard rotation.
    cache_quantizer: how the layer's cache is quantized.
    positions: cosines and sines of the rotary positions, (1 or b, t, rotary channels) each.
    """
    return straight_through(keys, _quantized(keys.detach(), cache_quantizer, positions))


def quantized_values(values: Tensor, cache_quantizer: CacheQuantizer) -> Tensor:
    """Quantize and dequantize values (b, heads, t, width)."""
    return straight_through(values, TensorStore(cache_quantizer.scheme, of_keys=False).append(values.detach()).late)


def as_quantized(keys: Tensor, scheme: CacheScheme, positions: tuple[Tensor, Tensor]) -> Tensor:
    """Keys (b, heads, t, width) in the basis in which the cache quantizes them.

    They lose their rotary positions if `scheme.rope` is "before", and are rotated by `scheme.key_rotation`.
    keys, positions: as in `quantized_keys`.
    """
    if scheme.rope == "before":
        cos, sin = (tensor.float() for tensor in positions)
        return unrotate(keys.float(), cos, sin).to(keys.dtype)
    if scheme.key_rotation == "none":
        return keys
    return hadamard.multiply(keys, hadamard.hadamard_blocks(keys.shape[-1]))


def _quantized(keys: Tensor, cache_quantizer: CacheQuantizer, positions: tuple[Tensor, Tensor]) -> Tensor:
    scheme = cache_quantizer.scheme
    dense = TensorStore(scheme, True, cache_quantizer.center).append(as_quantized(keys, scheme, positions)).late
    if scheme.rope == "before":
        cos, sin = (tensor.float() for tensor in positions)
        return rotate(dense.float(), cos, sin).to(keys.dtype)
    if scheme.key_rotation == "none":
        return dense
    # At run time queries are rotated instead, which equals rotating keys back.
    return hadamard.multiply_transposed(dense, hadamard.hadamard_blocks(keys.shape[-1]))

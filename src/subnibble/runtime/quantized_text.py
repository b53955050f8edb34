"""What attention sees of a text's keys and values once they are coded, for passes that keep no cache.

Of schemes with a window, as the text's last token sees them. Gradients pass as if nothing were coded.
"""

from __future__ import annotations

from torch import Tensor

from subnibble.runtime.kv_cache import Coding, TensorStore
from subnibble.runtime.rotary import rotate, unrotate
from subnibble.runtime.straight_through import straight_through
from subnibble.tensor import hadamard
from subnibble.tensor.cache_scheme import CacheScheme


def quantized_keys(keys: Tensor, coding: Coding, positions: tuple[Tensor, Tensor]) -> Tensor:
    """Keys (b, heads, t, width), positions put on, not turned. positions: cosines and sines, (1 or b, t, turned)."""
    return straight_through(keys, _quantized(keys.detach(), coding, positions))


def quantized_values(values: Tensor, coding: Coding) -> Tensor:
    """Values (b, heads, t, width)."""
    return straight_through(values, TensorStore(coding.scheme, of_keys=False).append(values.detach()).late)


def as_quantized(keys: Tensor, scheme: CacheScheme, positions: tuple[Tensor, Tensor]) -> Tensor:
    """Keys in the basis in which they are quantized: without positions, or rotated. Arguments: see `quantized_keys`."""
    if scheme.rope == "before":
        cos, sin = (part.float() for part in positions)
        return unrotate(keys.float(), cos, sin).to(keys.dtype)
    if scheme.key_rotation == "none":
        return keys
    return hadamard.multiply(keys, hadamard.hadamard_blocks(keys.shape[-1]))


def _quantized(keys: Tensor, coding: Coding, positions: tuple[Tensor, Tensor]) -> Tensor:
    scheme = coding.scheme
    seen = TensorStore(scheme, True, coding.center).append(as_quantized(keys, scheme, positions)).late
    if scheme.rope == "before":
        cos, sin = (part.float() for part in positions)
        return rotate(seen.float(), cos, sin).to(keys.dtype)
    if scheme.key_rotation == "none":
        return seen
    # Queries are turned alike at run time, which is as if keys were turned back.
    return hadamard.multiply_transposed(seen, hadamard.hadamard_blocks(keys.shape[-1]))

"""What attention sees of a text's keys and values once they are coded, for passes that keep no cache.

Of schemes with a window, as the text's last token sees them. Gradients pass as if nothing were coded.
"""

from __future__ import annotations

from torch import Tensor

from subnibble.cache_scheme import CacheScheme
from subnibble.runtime import hadamard
from subnibble.runtime.kv_cache import TensorStore
from subnibble.runtime.rotary import rotate, unrotate
from subnibble.runtime.straight_through import straight_through


def coded_keys(keys: Tensor, scheme: CacheScheme, positions: tuple[Tensor, Tensor]) -> Tensor:
    """Keys (b, heads, t, width), positions put on, not turned. positions: cosines and sines, (1 or b, t, turned)."""
    return straight_through(keys, _coded(keys.detach(), scheme, positions))


def coded_values(values: Tensor, scheme: CacheScheme) -> Tensor:
    """Values (b, heads, t, width)."""
    return straight_through(values, TensorStore(scheme, of_keys=False).append(values.detach()).late)


def _coded(keys: Tensor, scheme: CacheScheme, positions: tuple[Tensor, Tensor]) -> Tensor:
    store = TensorStore(scheme, of_keys=True)
    if scheme.rope == "before":
        cos, sin = (part.float() for part in positions)
        plain = unrotate(keys.float(), cos, sin).to(keys.dtype)
        return rotate(store.append(plain).late.float(), cos, sin).to(keys.dtype)
    if scheme.key_rotation == "none":
        return store.append(keys).late
    blocks = hadamard.hadamard_blocks(keys.shape[-1])
    # Queries are turned alike at run time, which is as if keys were turned back.
    return hadamard.multiply_transposed(store.append(hadamard.multiply(keys, blocks)).late, blocks)

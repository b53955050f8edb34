"""Move the column scales of a rounded linear into the layer before it, so that the stored model needs no extra term.

A reader (linear that reads the site) rounded as `V diag(c)` stores V, and the site's channels are multiplied by c where
they are written. A norm's gain (and bias) is multiplied by c directly. In a packed writer (linear before the site) all
scales of row j are multiplied by c_j. Its codes and zero-points do not change, whatever the grid, so the only
difference from `V diag(c)` is the rounding of those scales to their stored type.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from subnibble.arch.site import Heads, Site
from subnibble.tensor.packed import PackedTensor
from subnibble.tensor.scheme import E8M0

# Largest error allowed, relative to a group's largest weight: well above the rounding error of normal float16 and
# bfloat16 scales, below that of subnormal scales that lost most of their digits.
_TOLERANCE = 2.0**-7


def can_absorb(site: Site, heads: Heads, together: Iterable[str], packed: dict[str, PackedTensor], c: Tensor) -> bool:
    """Whether the layer before a site can absorb column scales.

    together: names of the readers that share the column scales.
    packed: the block's linears packed so far, by name.
    c: (k,), the column scales.

    False if the site has other readers, if it may not be scaled, if several query heads share a key-value head's
    channels, if a writer's scales are e8m0, or if they would lose precision: storing may change a weight by at most
    1/128 of the largest in its group.
    """
    if set(together) != set(site.readers) or not has_source(site, heads):
        return False
    return all(_in_range(packed[name], c) for name in site.writers if name in packed)


def has_source(site: Site, heads: Heads) -> bool:
    """Whether the layer before the site can be scaled at all: it is linear, and heads do not share its channels."""
    return "scale" in site.edits and not (site.per_head and heads.repeats > 1)


def absorb_(site: Site, c: Tensor, packed: dict[str, PackedTensor], dense: dict[str, Tensor]) -> None:
    """Multiply the site's channels by `c`, replacing the scaled entries of `packed` and `dense`.

    c: (k,), column scales.
    packed: the block's packed linears, by name.
    dense: all parameters by name (`<module>.weight`, `.bias`), float32.
    """
    names = [site.norm] if site.norm is not None else []
    for name in (*names, *site.writers):
        if name in packed:
            packed[name] = _scaled(packed[name], c)
        else:
            weight = dense[f"{name}.weight"]
            dense[f"{name}.weight"] = weight * (c if weight.dim() == 1 else c.unsqueeze(1))
        if f"{name}.bias" in dense:
            dense[f"{name}.bias"] = dense[f"{name}.bias"] * c


def _scaled(tensor: PackedTensor, c: Tensor) -> PackedTensor:
    """Multiply all scales of row j by c_j, in their stored type."""
    ranges = [replace(old, scales=(old.scales.float() * c.unsqueeze(1)).to(old.scales.dtype)) for old in tensor.ranges]
    return PackedTensor(tuple(ranges))


def _in_range(tensor: PackedTensor, c: Tensor) -> bool:
    """Whether scales multiplied by `c` keep their precision in their stored type."""
    scaled = _scaled(tensor, c)
    for old, new in zip(tensor.ranges, scaled.ranges, strict=True):
        if old.scheme.scale_type == E8M0:
            # Powers of two times c are no powers of two.
            return False
        target, stored = old.dequantize() * c.unsqueeze(1), new.dequantize()
        for start, stop in old.scheme.group_bounds(old.num_columns):
            max_abs = target[:, start:stop].abs().amax(1)
            error = (stored[:, start:stop] - target[:, start:stop]).abs().amax(1)
            if not bool((error <= _TOLERANCE * max_abs).all()):
                return False
    return True

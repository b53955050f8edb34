"""Hand the column scales of a rounded linear to whatever writes its inputs: the stored model has no extra term.

A reader rounded as `V diag(c)` keeps V; its site's channels are multiplied by c at the source. A norm's gain (and bias)
takes them as they are. Of a packed writer every scale of row j is multiplied by c_j: codes and zero-points do not
change, whatever the grid, so the only difference to `V diag(c)` is the rounding of those scales to their stored type.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from subnibble.arch.site import Heads, Site
from subnibble.tensor.packed import PackedTensor
from subnibble.tensor.scheme import E8M0

# Of a group's largest weight: well above the rounding of normal float16 and bfloat16 scales, below that of subnormal
# ones that lost most of their digits.
_TOLERANCE = 2.0**-7


def can_absorb(site: Site, heads: Heads, together: Iterable[str], packed: dict[str, PackedTensor], c: Tensor) -> bool:
    """Whether the site's source can take column scales `c` (k,) that its readers `together` share.

    packed: what of the block is packed so far, by name. No, if another reader would see them too, if the site may not
    be scaled, if query heads share the channels that write theirs, or if a writer's scales are bare exponents or would
    leave their type: a group of weights may change by 1/128 of its largest in being stored.
    """
    if set(together) != set(site.readers) or not has_source(site, heads):
        return False
    return all(_in_range(packed[name], c) for name in site.writers if name in packed)


def has_source(site: Site, heads: Heads) -> bool:
    """Whether the site has a source that can take column scales, whatever they are."""
    return "scale" in site.edits and not (site.per_head and heads.repeats > 1)


def absorb_(site: Site, c: Tensor, packed: dict[str, PackedTensor], dense: dict[str, Tensor]) -> None:
    """Multiply the site's channels by `c` (k,): what is scaled takes its place in `packed` and `dense`.

    packed: the block's packed linears by name. dense: every parameter by name (`<module>.weight`, `.bias`), float32.
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
    parts = [
        replace(part, scales=(part.scales.float() * c.unsqueeze(1)).to(part.scales.dtype)) for part in tensor.ranges
    ]
    return PackedTensor(tuple(parts))


def _in_range(tensor: PackedTensor, c: Tensor) -> bool:
    merged = _scaled(tensor, c)
    for part, new in zip(tensor.ranges, merged.ranges, strict=True):
        if part.scheme.scale_type == E8M0:
            # Powers of two take no factor.
            return False
        target, found = part.dequantize() * c.unsqueeze(1), new.dequantize()
        for start, stop in part.scheme.group_bounds(part.columns):
            largest = target[:, start:stop].abs().amax(1)
            error = (found[:, start:stop] - target[:, start:stop]).abs().amax(1)
            if not bool((error <= _TOLERANCE * largest).all()):
                return False
    return True

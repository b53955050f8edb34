"""A prefix's keys and values, and the centre of keys, as the stored block would make them: edits of heads that come
after they were computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from subnibble.arch.site import Site
from subnibble.calibrate.prefix import States, half_states
from subnibble.model.skeleton import Block


def stored_states(
    states: States, block: Block, absorbed: Iterable[tuple[Site, Tensor]], moved: Mapping[str, Tensor]
) -> States:
    """Keys and values (heads, tokens, width) float16.

    absorbed: column scales (channels,) that sites' writers take. moved: name of a linear -> (rows,), where its rows
    come from.
    """
    # (tokens, heads * width) each, as k_proj and v_proj write them.
    keys, values = (part.transpose(0, 1).flatten(1) for part in states)
    for site in block.arch.sites:
        if not site.per_head:
            continue
        for other, c in absorbed:
            values = values * c if other == site else values
        keys, values = _moved(keys, site.keys, moved), _moved(values, site.writers, moved)
    heads = states[0].shape[0]
    first, second = (part.unflatten(1, (heads, -1)).transpose(0, 1) for part in (keys, values))
    return half_states((first, second), block.path)


def stored_center(center: Tensor, block: Block, moved: Mapping[str, Tensor]) -> Tensor:
    """What keys are coded less, (heads, width) as it is: heads of keys move whole, in whatever basis they are."""
    flat = center.flatten().unsqueeze(0)
    for site in block.arch.sites:
        flat = _moved(flat, site.keys, moved) if site.per_head else flat
    return flat.view(center.shape).contiguous()


def _moved(rows: Tensor, names: Iterable[str], moved: Mapping[str, Tensor]) -> Tensor:
    for name in names:
        rows = rows[:, moved[name]] if name in moved else rows
    return rows

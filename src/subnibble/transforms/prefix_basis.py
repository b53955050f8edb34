"""Apply to a prompt prefix's keys and values, and to the key mean, the edits of heads made after they were computed.

The result is what the stored block would compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from subnibble.arch.site import Site
from subnibble.calibrate.prefix import States, half_states
from subnibble.model.skeleton import Block


def stored_states(
    states: States, block: Block, absorbed: Iterable[tuple[Site, Tensor]], row_orders: Mapping[str, Tensor]
) -> States:
    """Keys and values of the prefix after the edits: (heads, tokens, width) float16 each.

    states: keys and values before the edits.
    absorbed: (site, column scales (channels,)) that the linears before the site absorbed.
    row_orders: old index of each row, (rows,), by name of the reordered linear.
    """
    # (tokens, heads * width) each, as k_proj and v_proj write them.
    keys, values = (state.transpose(0, 1).flatten(1) for state in states)
    for site in block.arch.sites:
        if not site.per_head:
            continue
        for other, c in absorbed:
            values = values * c if other == site else values
        keys, values = _reordered(keys, site.keys, row_orders), _reordered(values, site.writers, row_orders)
    heads = states[0].shape[0]
    keys, values = (state.unflatten(1, (heads, -1)).transpose(0, 1) for state in (keys, values))
    return half_states((keys, values), block.path)


def stored_center(center: Tensor, block: Block, row_orders: Mapping[str, Tensor]) -> Tensor:
    """The key mean, which the cache subtracts before it quantizes keys, after the edits: (heads, width).

    center: (heads, width) before the edits. Only whole key heads move, so the basis inside a head does not matter.
    row_orders: as in `stored_states`.
    """
    flat = center.flatten().unsqueeze(0)
    for site in block.arch.sites:
        flat = _reordered(flat, site.keys, row_orders) if site.per_head else flat
    return flat.view(center.shape).contiguous()


def _reordered(rows: Tensor, names: Iterable[str], row_orders: Mapping[str, Tensor]) -> Tensor:
    """Reorder the last dimension like the rows of the linears `names`, if they were reordered."""
    for name in names:
        rows = rows[:, row_orders[name]] if name in row_orders else rows
    return rows

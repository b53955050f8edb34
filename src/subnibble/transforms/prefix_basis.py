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
    states: States, block: Block, absorbed: Iterable[tuple[Site, Tensor]], moved: Mapping[str, Tensor]
) -> States:
    """Keys and values of the prefix after the edits: (heads, tokens, width) float16 each.

    states: keys and values before the edits.
    absorbed: (site, column scales (channels,)) that the linears before the site absorbed.
    moved: old index of each row, (rows,), by name of the reordered linear.
    """
    # (tokens, heads * width) each, as k_proj and v_proj write them.
    keys, values = (state.transpose(0, 1).flatten(1) for state in states)
    for site in block.arch.sites:
        if not site.per_head:
            continue
        for other, c in absorbed:
            values = values * c if other == site else values
        keys, values = _moved(keys, site.keys, moved), _moved(values, site.writers, moved)
    heads = states[0].shape[0]
    keys, values = (state.unflatten(1, (heads, -1)).transpose(0, 1) for state in (keys, values))
    return half_states((keys, values), block.path)


def stored_center(center: Tensor, block: Block, moved: Mapping[str, Tensor]) -> Tensor:
    """The key mean, which the cache subtracts before it quantizes keys, after the edits: (heads, width).

    center: (heads, width) before the edits. Only whole key heads move, so the basis inside a head does not matter.
    moved: as in `stored_states`.
    """
    flat = center.flatten().unsqueeze(0)
    for site in block.arch.sites:
        flat = _moved(flat, site.keys, moved) if site.per_head else flat
    return flat.view(center.shape).contiguous()


def _moved(rows: Tensor, names: Iterable[str], moved: Mapping[str, Tensor]) -> Tensor:
    """Reorder the last dimension like the rows of the linears `names`, if they were reordered."""
    for name in names:
        rows = rows[:, moved[name]] if name in moved else rows
    return rows

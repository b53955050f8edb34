"""Order the input channels of linears by saliency: the most salient first (SERQ, arXiv 2603.08185, section 4.3), or
last (Atom, arXiv 2310.19102).

Score of a channel, on the site's tensor before any scaling:

    size    its largest magnitude over the calibration tokens; with SERQ's flattening, the scale itself (eq. 4)
    energy  the sum of its squares, H_jj (Atom)

The MLP's hidden channels are reordered offline, in the rows of their writers. Two ways for the other sites:

    gather   the inputs fed by a norm and the attention output: linears gather their channels when they quantize them
    offline  The residual stream has one order (`residual_order.py`). In the attention output, whole heads move, and
             channels inside their head, alike in all query heads that share a key-value head. So the first channels are
             all channels of one or two heads, salient or not.

`offline_rows` tells which orders can be applied offline.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.arch.site import Heads, Site
from subnibble.calibrate.stream import SiteStatistics
from subnibble.errors import BadRecipe
from subnibble.model.skeleton import Block

SCORES = ("size", "energy")
DIRECTIONS = ("falling", "rising")
PERMUTATIONS = ("gather", "offline")


@dataclass(frozen=True)
class Saliency:
    """Chooses the channel order of each site.

    score: "size" or "energy"; see the module.
    permutation: "gather" or "offline"; see the module.
    direction: "falling" puts the most salient channel first, "rising" last; "rising" needs permutation "gather".
    """

    score: str = "size"
    permutation: str = "gather"
    direction: str = "falling"

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise BadRecipe(f"direction is {self.direction!r}; choose one of {', '.join(DIRECTIONS)}")
        if self.direction == "rising" and self.permutation != "gather":
            raise BadRecipe(f'rising scores need permutation = "gather"; permutation is {self.permutation!r}')
        if self.score not in SCORES:
            raise BadRecipe(f"saliency is {self.score!r}; choose one of {', '.join(SCORES)}")
        if self.permutation not in PERMUTATIONS:
            raise BadRecipe(f"permutation is {self.permutation!r}; choose one of {', '.join(PERMUTATIONS)}")

    def __call__(self, block: Block, site: Site, statistics: SiteStatistics) -> Tensor | None:
        """Channel order of a site: (channels,) int64, channel order[i] comes i-th.

        None if the site's channels follow the order of the residual stream.
        """
        if self.permutation == "offline" and site.norm is not None:
            return None
        scores = statistics.max_abs[site.name]
        if self.score == "energy":
            scores = statistics.grams[site.name].diagonal()
        if site.per_head and self.permutation == "offline":
            return _by_heads(scores, block.heads)
        return torch.sort(scores, descending=self.direction == "falling", stable=True).indices

    def gathers(self, site: Site, mixed: bool) -> bool:
        """Whether the site's readers gather their channels at run time.

        Known without the order itself; ignores the rare order that happens to keep heads intact.
        mixed: whether an online transform mixes the channels after they are ordered; then no order can be applied
            offline.
        """
        if site.norm is not None:
            return self.permutation == "gather"
        return mixed or "permute" not in site.edits or (site.per_head and self.permutation == "gather")


def _by_heads(scores: Tensor, heads: Heads) -> Tensor:
    """Channel order by key-value head, then query head, then channel, each most salient first.

    scores: (query * width,). The largest score of the query heads that share a key-value head counts for its channels.
    """
    grouped = scores.view(heads.key_value, heads.repeats, heads.width)
    shared = grouped.amax(1)
    inside, query = _falling(shared), _falling(grouped.amax(2))
    first = torch.arange(heads.key_value, device=scores.device)[:, None] * heads.repeats
    channels = (first + query).unsqueeze(2) * heads.width + inside.unsqueeze(1)
    return channels[_falling(shared.amax(1))].flatten()


def _falling(scores: Tensor) -> Tensor:
    """Indices that sort the last dimension in descending order."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices


def offline_rows(site: Site, order: Tensor, heads: Heads) -> dict[str, Tensor] | None:
    """Row orders of the linears before the site that put its channels in `order`; None if there are none.

    order: (channels,), old channel order[i] comes i-th.
    Returns the old index of each row, (rows,), by name of the linear. Biases move with rows.
    """
    if "permute" not in site.edits:
        return None
    if not site.per_head:
        return dict.fromkeys((*site.writers, *site.followers), order)
    old = order.view(heads.key_value, heads.repeats, heads.width)
    shared = old[:, :1, :1] // (heads.repeats * heads.width)
    query, inside = old[:, :, :1] // heads.width, old[:, :1] % heads.width
    keeps_heads = torch.equal(query * heads.width + inside, old) and bool((query // heads.repeats == shared).all())
    if not keeps_heads:
        return None
    positions = torch.arange(heads.width, device=order.device)
    rows = dict.fromkeys(site.writers, (shared * heads.width + inside).flatten())
    rows |= dict.fromkeys(site.queries, (query * heads.width + positions).flatten())
    return rows | dict.fromkeys(site.keys, (shared * heads.width + positions).flatten())

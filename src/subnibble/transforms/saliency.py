"""The order in which a linear meets its input channels: the most salient first (SERQ, arXiv 2603.08185, section 4.3),
or last (Atom, arXiv 2310.19102).

Scores of a channel, of the site's tensor before anything was scaled:

    size   its largest magnitude over the calibration tokens; with SERQ's flattening that is the scale itself (eq. 4)
    energy the sum of its squares, H_jj; Atom's

Orders of the MLP's hidden channels are carried out offline, in the rows of their writers. Of others there are two ways:

    gather   behind a norm and behind attention, linears gather their channels as they quantize them
    offline  the residual stream has one order (`residual_order.py`); channels of attention's output are moved inside
             their head only, alike in all heads that share a key-value head, and heads as wholes: the first channels
             are then all those of one or two heads, salient or not

`offline_rows` says which orders can be carried out offline.
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
    """Gives each site's channel order. score, permutation: see the module. direction: of the scores; "rising" goes with
    gathers alone.
    """

    score: str = "size"
    permutation: str = "gather"
    direction: str = "falling"

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise BadRecipe(f"direction is {self.direction!r}; choose one of {', '.join(DIRECTIONS)}")
        if self.direction == "rising" and self.permutation != "gather":
            raise BadRecipe('rising scores go with permutation = "gather"')
        if self.score not in SCORES:
            raise BadRecipe(f"saliency is {self.score!r}; choose one of {', '.join(SCORES)}")
        if self.permutation not in PERMUTATIONS:
            raise BadRecipe(f"permutation is {self.permutation!r}; choose one of {', '.join(PERMUTATIONS)}")

    def __call__(self, block: Block, site: Site, found: SiteStatistics) -> Tensor | None:
        """(channels,) int64: which channel comes at each place; None where the residual stream has its own order."""
        if self.permutation == "offline" and site.norm is not None:
            return None
        scores = found.largest[site.name]
        if self.score == "energy":
            scores = found.grams[site.name].diagonal()
        if site.per_head and self.permutation == "offline":
            return _by_heads(scores, block.heads)
        return torch.sort(scores, descending=self.direction == "falling", stable=True).indices

    def gathers(self, site: Site, mixed: bool) -> bool:
        """Whether the site's readers gather their channels, known before the order is: one that happens to keep heads
        whole aside. mixed: whether an online transform follows, behind which no order is offline.
        """
        if site.norm is not None:
            return self.permutation == "gather"
        return mixed or "permute" not in site.edits or (site.per_head and self.permutation == "gather")


def _by_heads(scores: Tensor, heads: Heads) -> Tensor:
    """Key-value heads, in them query heads, in them channels, each most salient first; scores: (query * width,)."""
    grouped = scores.view(heads.key_value, heads.repeats, heads.width)
    shared = grouped.amax(1)
    inside, query = _falling(shared), _falling(grouped.amax(2))
    first = torch.arange(heads.key_value, device=scores.device)[:, None] * heads.repeats
    channels = (first + query).unsqueeze(2) * heads.width + inside.unsqueeze(1)
    return channels[_falling(shared.amax(1))].flatten()


def _falling(scores: Tensor) -> Tensor:
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices


def offline_rows(site: Site, order: Tensor, heads: Heads) -> dict[str, Tensor] | None:
    """Which rows the linears before the site must have for its channels to come in `order`; None if none will do.

    order: (channels,). Result: name of each linear -> (rows,), where its rows come from. Biases move with rows.
    """
    if "permute" not in site.edits:
        return None
    if not site.per_head:
        return dict.fromkeys((*site.writers, *site.followers), order)
    old = order.view(heads.key_value, heads.repeats, heads.width)
    shared = old[:, :1, :1] // (heads.repeats * heads.width)
    query, inside = old[:, :, :1] // heads.width, old[:, :1] % heads.width
    moves = torch.equal(query * heads.width + inside, old) and bool((query // heads.repeats == shared).all())
    if not moves:
        return None
    places = torch.arange(heads.width, device=order.device)
    rows = dict.fromkeys(site.writers, (shared * heads.width + inside).flatten())
    rows |= dict.fromkeys(site.queries, (query * heads.width + places).flatten())
    return rows | dict.fromkeys(site.keys, (shared * heads.width + places).flatten())

"""Reorder a site's channels in its writers, followers and readers, or the whole residual stream: the function stays."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from subnibble.arch.site import Heads, Residual, Site
from subnibble.errors import BadRecipe
from subnibble.model.skeleton import Block


def permute_site_(block: Block, site: Site, order: Tensor) -> None:
    """Reorder in place: new channel i is old channel order[i].

    order: (channels,) permutation; if `site.per_head`, (key_value, width), one permutation a key-value head, which
    moves channels inside that head.
    """
    if "permute" not in site.edits:
        raise BadRecipe(f"site {site.name} of {block.path} may not be permuted: its writers fix the channel order")
    rows = _inside_heads(order, 1, block.heads) if site.per_head else order
    columns = _inside_heads(order, block.heads.repeats, block.heads) if site.per_head else order
    with torch.no_grad():
        for name in (*site.writers, *site.followers):
            _permute_rows_(block.linear(name), rows)
        for name in site.readers:
            _permute_columns_(block.linear(name), columns)


def permute_residual_(block: Block, residual: Residual, order: Tensor) -> None:
    """Reorder in place the residual channels of one block; embedding, final norm and head must follow suit."""
    with torch.no_grad():
        for norm in residual.norms:
            gain = block.gain(norm)
            gain.copy_(gain[order])
        for name in residual.readers:
            _permute_columns_(block.linear(name), order)
        for name in residual.writers:
            _permute_rows_(block.linear(name), order)


def _permute_rows_(linear: nn.Linear, order: Tensor) -> None:
    linear.weight.copy_(linear.weight[order])
    if linear.bias is not None:
        linear.bias.copy_(linear.bias[order])


def _permute_columns_(linear: nn.Linear, order: Tensor) -> None:
    linear.weight.copy_(linear.weight[:, order])


def _inside_heads(order: Tensor, repeats: int, heads: Heads) -> Tensor:
    """Permutation of all channels from one permutation a key-value head (key_value, width)."""
    per_head = order.repeat_interleave(repeats, dim=0)
    start = torch.arange(per_head.shape[0], device=order.device).unsqueeze(1) * heads.width
    return (per_head + start).reshape(-1)

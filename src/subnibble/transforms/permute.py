"""Reorder the channels of a site or of the residual stream, in all layers that use them; the function is unchanged."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from subnibble.arch.site import Heads, Residual, Site
from subnibble.errors import BadRecipe
from subnibble.model.skeleton import Block


def permute_site_(block: Block, site: Site, order: Tensor) -> None:
    """Reorder the channels of a site, in place: new channel i is old channel order[i].

    order: a permutation (channels,). If `site.per_head`: (key_value, width), one permutation of the channels inside
        each key-value head.
    Raises `BadRecipe` if the site may not be permuted.
    """
    if "permute" not in site.edits:
        raise BadRecipe(
            f"site {site.name} of {block.path} may not be permuted: its writers fix the channel order; "
            "leave the order unchanged"
        )
    writer_order = _inside_heads(order, 1, block.heads) if site.per_head else order
    reader_order = _inside_heads(order, block.heads.repeats, block.heads) if site.per_head else order
    with torch.no_grad():
        for name in (*site.writers, *site.followers):
            _permute_rows_(block.linear(name), writer_order)
        for name in site.readers:
            _permute_columns_(block.linear(name), reader_order)


def permute_residual_(block: Block, residual: Residual, order: Tensor) -> None:
    """Reorder the residual channels of one block, in place. The caller reorders embedding, final norm and head alike.

    residual: norms, readers and writers of the residual stream.
    order: a permutation (channels,).
    """
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
    """Permutation of all channels from `order` (key_value, width): one per key-value head, repeated `repeats` times."""
    per_head = order.repeat_interleave(repeats, dim=0)
    start = torch.arange(per_head.shape[0], device=order.device).unsqueeze(1) * heads.width
    return (per_head + start).reshape(-1)

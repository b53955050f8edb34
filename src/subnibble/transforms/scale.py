"""Divide a site's channels by positive factors and multiply its readers' columns by them; the function is unchanged."""

from __future__ import annotations

import torch
from torch import Tensor

from subnibble.arch.site import Site
from subnibble.errors import BadRecipe
from subnibble.model.skeleton import Block


def scale_site_(block: Block, site: Site, factors: Tensor) -> None:
    """Divide the channels of a site by `factors`, in place.

    factors: positive, (channels,), or (key_value * width,) if `site.per_head`.
    Raises `BadRecipe` if the site may not be scaled.
    """
    if "scale" not in site.edits:
        raise BadRecipe(
            f"site {site.name} of {block.path} may not be scaled: its writers are not linear in it; leave it unscaled"
        )
    with torch.no_grad():
        if site.norm is not None:
            block.gain(site.norm).div_(factors)
        for name in site.writers:
            writer = block.linear(name)
            writer.weight.div_(factors.unsqueeze(1))
            if writer.bias is not None:
                writer.bias.div_(factors)
        wide = repeat_over_heads(factors, block) if site.per_head else factors
        for name in site.readers:
            block.linear(name).weight.mul_(wide)


def repeat_over_heads(factors: Tensor, block: Block) -> Tensor:
    """Expand (key_value * width,) to (query * width,): every query head gets the factors of its key-value head."""
    heads = block.heads
    return factors.view(heads.key_value, heads.width).repeat_interleave(heads.repeats, dim=0).reshape(-1)

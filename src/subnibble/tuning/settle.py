"""Apply what a tuned block has learned to the block itself, before its weights are rounded on the learned ranges."""

from __future__ import annotations

import torch

from subnibble.model.skeleton import Block
from subnibble.tuning.block import TunedBlock


def settle_(tuned: TunedBlock, block: Block) -> None:
    """Apply what was learned to the float32 `block`: fold smoothing factors, merge slacks and low-rank terms.

    Afterwards `tuned` has the same weights as `block`, keeps its learned ranges and has no smoothing factors; the
    prefix of its cache holds the keys and values of the settled block.
    """
    with torch.no_grad():
        tuned.cache.settle_()
        _merge_(tuned, block)
        for site in block.arch.sites:
            entrance = tuned.sites[site.name]
            if entrance.smoothing is not None:
                entrance.smoothing.fold_(block, site)
                entrance.smoothing = None
    tensors = dict(tuned.module.named_parameters()) | dict(tuned.module.named_buffers())
    for name, parameter in block.module.named_parameters():
        tensors[name].data.copy_(parameter.data)


def _merge_(tuned: TunedBlock, block: Block) -> None:
    """Merge slacks and low-rank terms into the weights of `block`; `tuned` has no low-rank terms afterwards."""
    for site in block.arch.sites:
        smoothing = tuned.sites[site.name].smoothing
        factors = torch.ones(()) if smoothing is None else smoothing.wide()
        for name in site.readers:
            weight, linear = block.linear(name).weight, tuned.linears[name]
            if smoothing is not None:
                weight.mul_(linear.factors(smoothing) / factors)
            if linear.low_rank is not None:
                # The term was learned on the scaled weight; `fold_` multiplies by the factors afterwards.
                weight.add_(linear.low_rank.product() / factors.to(weight.device))
                linear.low_rank = None

"""Initial smoothing factors of a tuned block: max |x|^alpha / max |w|^(1 - alpha), shifted to a mean logarithm of 0."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from subnibble.arch.site import Site
from subnibble.calibrate.stats import AbsMax
from subnibble.model.skeleton import Block
from subnibble.model.transformers_api.blocks import BlockCall
from subnibble.tuning.block import TunedBlock
from subnibble.tuning.smoothing import Smoothing

# Exponent of max |x| in the initial smoothing factors: OmniQuant's alpha.
_ALPHA = 0.5


def max_abs_inputs(
    tuned: TunedBlock, block: Block, hidden: Tensor, call: BlockCall, ordinary: Tensor
) -> dict[str, Tensor]:
    """Site name -> max |x| of each channel, (channels,), over the ordinary tokens.

    block: names the sites.
    hidden: (b, t, d) float32.
    call: the block's call arguments for t tokens.
    ordinary: (b, t) bool, the tokens to include.
    """
    statistics: dict[str, AbsMax] = {}

    def note(name: str, x: Tensor) -> None:
        statistics.setdefault(name, AbsMax(x.shape[-1], x.device)).update(x.detach()[ordinary])

    handles = [
        tuned.linears[site.readers[0]].register_forward_pre_hook(lambda _, args, name=site.name: note(name, args[0]))
        for site in block.arch.sites
    ]
    with torch.no_grad():
        tuned(hidden, call)
    for handle in handles:
        handle.remove()
    return {name: statistic.value for name, statistic in statistics.items()}


def smooth_(tuned: TunedBlock, block: Block, outliers: int, abs_max: Mapping[str, Tensor]) -> None:
    """Give initial smoothing factors to every site that may be scaled.

    block: the float32 block that `tuned` was made of.
    outliers: number of last channels of each input, in its channel order, that have 8 bits and need no factors.
    abs_max: site name -> max |x| of each input channel, (channels,).
    """
    for site in block.arch.sites:
        if "scale" not in site.edits or site.name in tuned.tuning.unsmoothed or tuned.tuning.smoothing == "none":
            continue
        entrance = tuned.sites[site.name]
        unscaled = _outlier_channels(entrance.basis.order, outliers)
        start = _start(block, site, abs_max[site.name])
        heads = block.heads if site.per_head else None
        entrance.smoothing = Smoothing(start, unscaled, heads, tuned.tuning.smoothing == "soft")


def start_at_one_(tuned: TunedBlock) -> None:
    """Set all smoothing factors to 1."""
    for entrance in tuned.sites.values():
        if entrance.smoothing is not None:
            entrance.smoothing.start_at_one_()


def _outlier_channels(order: Tensor | None, outliers: int) -> Tensor | None:
    """Mask (channels,) of the last `outliers` channels of an order; None if there are none."""
    if order is None or not outliers:
        return None
    mask = torch.zeros_like(order, dtype=torch.bool)
    mask[order[-outliers:]] = True
    return mask


def _start(block: Block, site: Site, input_max: Tensor) -> Tensor:
    """Logarithms of a site's initial factors max |x|^alpha / max |w|^(1 - alpha), shifted to mean 0."""
    weight_max = torch.stack([block.linear(name).weight.detach().abs().amax(0) for name in site.readers]).amax(0)
    heads = block.heads
    if site.per_head:
        input_max, weight_max = (
            maxima.view(heads.key_value, heads.repeats, heads.width).amax(1).flatten()
            for maxima in (input_max, weight_max)
        )
    nonzero = (input_max > 0) & (weight_max > 0)
    tiny = torch.finfo(weight_max.dtype).tiny
    logs = _ALPHA * input_max.clamp(min=tiny).log() - (1 - _ALPHA) * weight_max.clamp(min=tiny).log()
    logs = torch.where(nonzero, logs, logs[nonzero].mean() if bool(nonzero.any()) else 0.0)
    centred: Tensor = logs - logs.mean()
    return centred

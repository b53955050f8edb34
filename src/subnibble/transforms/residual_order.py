"""One channel order for the whole residual stream (SERQ, arXiv 2603.08185, stage 3), carried out offline.

Every norm, reader and writer of the stream, the embedding and the head see the channels in the same order, so that
nothing is gathered at run time; sites that would like different orders share one. Channels are ranked by the mean over
all sites behind norms of log(a_j / median a), a_j being the largest magnitude of channel j there in the full-precision
model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.calibrate.stats import AbsMax, value_over
from subnibble.calibrate.stream import BlockStream
from subnibble.model.skeleton import Block
from subnibble.transforms.permute import permute_residual_

# Of the median: a channel that is silent somewhere must not decide alone.
_SMALLEST = 1e-3


@dataclass(frozen=True)
class ResidualOrder:
    """See `ResidualEdit`. order: (channels,) int64, old channel order[i] becomes channel i."""

    order: Tensor

    def embedding(self, weight: Tensor) -> Tensor:
        """See `ResidualEdit`."""
        return weight[:, self.order]

    def edit_block_(self, block: Block) -> None:
        """See `ResidualEdit`."""
        permute_residual_(block, block.arch.residual, self.order)

    def final_gain(self, gain: Tensor) -> Tensor:
        """See `ResidualEdit`."""
        return gain[self.order]

    def head(self, weight: Tensor, gain: Tensor) -> Tensor:
        """See `ResidualEdit`."""
        return weight[:, self.order]

    def head_mix(self, gain: Tensor) -> tuple[Tensor, ...]:
        """See `ResidualEdit`."""
        return ()


def residual_order(blocks: Iterable[tuple[Block, BlockStream]]) -> ResidualOrder:
    """Rank the residual channels. blocks: of the full-precision model, as `full_precision_blocks` gives them."""
    scores: list[Tensor] = []
    for block, stream in blocks:
        for site in block.arch.sites:
            if site.norm is not None:
                gain = block.gain(site.norm)
                largest = value_over(AbsMax(gain.shape[0], gain.device), zip(stream.at(site), strict=True))
                scores.append(_relative(largest))
    return ResidualOrder(torch.sort(torch.stack(scores).mean(0), descending=True, stable=True).indices)


def _relative(sizes: Tensor) -> Tensor:
    middle = sizes.median().clamp(min=torch.finfo(sizes.dtype).tiny)
    return (sizes / middle).clamp(min=_SMALLEST).log()

"""One channel order for the whole residual stream (SERQ, arXiv 2603.08185, stage 3), applied offline.

All norms, readers and writers of the stream, the embedding and the head are reordered alike, so that no linear gathers
channels at run time. The price is one order for all sites. Channels are sorted by the mean of log(a_j / median a) over
all sites that a norm writes, with a_j the largest magnitude of channel j there in the full-precision model.
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

# Lower bound of a_j / median a: one site where a channel is silent must not decide its place.
_SMALLEST = 1e-3


@dataclass(frozen=True)
class ResidualOrder:
    """A `ResidualEdit` that reorders the residual channels.

    order: (channels,) int64, old channel order[i] becomes channel i.
    """

    order: Tensor

    def embedding(self, weight: Tensor) -> Tensor:
        """The embedding's table (n, d), columns reordered."""
        return weight[:, self.order]

    def edit_block_(self, block: Block) -> None:
        """Reorder the residual channels of a block, in place."""
        permute_residual_(block, block.arch.residual, self.order)

    def final_gain(self, gain: Tensor) -> Tensor:
        """The final norm's gain (d,), reordered."""
        return gain[self.order]

    def head(self, weight: Tensor, gain: Tensor) -> Tensor:
        """The head's table (n, d), columns reordered; `gain` is not used."""
        return weight[:, self.order]

    def head_input(self, gain: Tensor) -> tuple[Tensor, ...]:
        """Empty: a tied head needs no extra product."""
        return ()


def residual_order(blocks: Iterable[tuple[Block, BlockStream]]) -> ResidualOrder:
    """Order the residual channels, most salient first.

    blocks: blocks of the full-precision model with their inputs, as `full_precision_blocks` gives them.
    """
    scores: list[Tensor] = []
    for block, stream in blocks:
        for site in block.arch.sites:
            if site.norm is not None:
                gain = block.gain(site.norm)
                max_abs = value_over(AbsMax(gain.shape[0], gain.device), zip(stream.at(site), strict=True))
                scores.append(_relative(max_abs))
    return ResidualOrder(torch.sort(torch.stack(scores).mean(0), descending=True, stable=True).indices)


def _relative(max_abs: Tensor) -> Tensor:
    """log(a_j / median a) for maxima a (channels,)."""
    median = max_abs.median().clamp(min=torch.finfo(max_abs.dtype).tiny)
    return (max_abs / median).clamp(min=_SMALLEST).log()

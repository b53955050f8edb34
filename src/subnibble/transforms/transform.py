"""The base class of transforms: edits of a block, in float32, that leave its function unchanged."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from subnibble.calibrate.stream import SiteStatistics
from subnibble.model.skeleton import Block


class Transform:
    """An edit of a block before any of its linears is rounded."""

    def __call__(self, block: Block, statistics: SiteStatistics) -> Mapping[str, Tensor]:
        """Edit `block` in place.

        statistics: statistics of the block's sites before the edit.
        Returns the factors (channels,) by which the channels of sites were divided, by site name.
        """
        raise NotImplementedError

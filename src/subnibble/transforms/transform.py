"""What every transform is: an edit of a block, in float32, that keeps its function."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from subnibble.calibrate.stream import SiteStatistics
from subnibble.model.skeleton import Block


class Transform:
    """Edits a block before anything of it is rounded."""

    def __call__(self, block: Block, found: SiteStatistics) -> Mapping[str, Tensor]:
        """Edit `block` in place; give the factors (channels,) by which sites were divided, by name.

        found: statistics of its sites before.
        """
        raise NotImplementedError

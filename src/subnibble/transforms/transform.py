"""What every transform is: an edit of a block, in float32, that keeps its function."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from subnibble.calibrate.stream import SiteStatistics
from subnibble.model.site import Site
from subnibble.model.skeleton import Block
from subnibble.scheme import Scheme


class Transform:
    """Edits a block before anything of it is rounded."""

    def check(self, site: Site, scheme: Scheme, where: str) -> None:
        """Raise `BadRecipe` if it does not fit the linear `where`, a reader of the site coded by `scheme`."""

    def __call__(self, block: Block, found: SiteStatistics) -> Mapping[str, Tensor]:
        """Edit `block` in place; give the factors (channels,) by which sites were divided, by name.

        found: statistics of its sites before.
        """
        raise NotImplementedError

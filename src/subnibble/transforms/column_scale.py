"""D2Quant's column scales (arXiv 2602.02546) as a transform, for methods whose codes are made by something else.

Before anything is rounded, the dual-scale quantizer is fitted to each group of a down-projection; its inputs are
multiplied by the column scales it finds, folded into the up-projection, and its columns divided by them. What rounds
the weight afterwards meets columns of more equal size, and so does a second weight. The price are inputs of less equal
size, where these are quantized, too. Groups are those of the natural channel order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from subnibble.calibrate.stream import SiteStatistics
from subnibble.model.site import Role, Site
from subnibble.model.skeleton import Block
from subnibble.rounding.dual_scale import DualScale
from subnibble.scheme import Scheme
from subnibble.transforms.scale import scale_site_
from subnibble.transforms.transform import Transform

_SITE = Role.MLP_HIDDEN


@dataclass(frozen=True)
class ColumnScales(Transform):
    """fitter: of the scales."""

    fitter: DualScale = field(default_factory=DualScale)

    def check(self, site: Site, scheme: Scheme, where: str) -> None:
        """See `Transform`."""
        if site.name == _SITE:
            self.fitter.check(scheme, where)

    def __call__(self, block: Block, found: SiteStatistics) -> Mapping[str, Tensor]:
        """See `Transform`."""
        made = {}
        for site in block.arch.sites:
            schemes = {found.schemes[name] for name in site.readers}
            if site.name != _SITE or "scale" not in site.edits or None in schemes or len(schemes) != 1:
                continue
            (scheme,) = schemes
            assert scheme is not None
            weight = torch.cat([block.linear(name).weight.detach() for name in site.readers])
            fitted = [
                self.fitter.fit(weight[:, start:stop], scheme, None, index).columns
                for index, (start, stop) in enumerate(scheme.group_bounds(weight.shape[1]))
            ]
            columns = torch.cat([part for part in fitted if part is not None])
            made[site.name] = 1 / columns
            scale_site_(block, site, made[site.name])
        return made

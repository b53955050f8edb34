"""AWQ (Lin et al., arXiv 2306.00978): scale channels up before rounding where activations are large.

For each site, with a_j the mean magnitude of channel j of its tensor, factors

    s_j = a_j^alpha,  normalised by sqrt(max s min s),    alpha = 0, 1/20, ..., 19/20

multiply the readers' columns and divide what writes the channels; the alpha with the least output error of the rounded
readers, sum over readers of ||(Q(W s) s⁻¹ - W) X||², stays. Differences from the released program: the error is that
of the site's own linears (by their Gram matrix), not of the module behind them; under grouped-query attention, which
it skips, heads that share a key-value head get the mean of their channels; sites that may not be scaled, or none of
whose readers is quantized, stay as they are; for sign grids the search rounds to uniform ones. Rounding follows, clips
weighted by the inputs' second moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subnibble.arch.site import Site
from subnibble.calibrate.stream import SiteStatistics
from subnibble.errors import NumericalFailure
from subnibble.model.skeleton import Block
from subnibble.rounding import grid
from subnibble.rounding.error import output_energy
from subnibble.transforms.scale import repeat_over_heads, scale_site_
from subnibble.transforms.transform import Transform

_STEPS = 20
# Of a factor before they are normalised, as in the released program: a silent channel must not blow up the others.
_SMALLEST = 1e-4


@dataclass(frozen=True)
class ActivationAwareScale(Transform):
    """steps: how many alphas are tried, from 0 on."""

    steps: int = _STEPS

    def __call__(self, block: Block, found: SiteStatistics) -> Mapping[str, Tensor]:
        """See `Transform`."""
        made = {}
        for site in block.arch.sites:
            if "scale" in site.edits and any(found.schemes[name] is not None for name in site.readers):
                factors = self._factors(block, site, found)
                scale_site_(block, site, factors)
                made[site.name] = repeat_over_heads(factors, block) if site.per_head else factors
        return made

    def _factors(self, block: Block, site: Site, found: SiteStatistics) -> Tensor:
        sizes = found.mean_sizes[site.name].clamp(min=1e-8)
        if not bool(torch.isfinite(sizes).all() and torch.isfinite(found.grams[site.name]).all()):
            raise NumericalFailure(
                f"{block.path} {site.name}: activations are not finite; compute in bfloat16 or float32 (--dtype)"
            )
        if site.per_head:
            heads = block.heads
            sizes = sizes.view(heads.key_value, heads.repeats, heads.width).mean(1).flatten()
        best, least = torch.ones_like(sizes), torch.inf
        for step in range(self.steps):
            factors = sizes.pow(step / self.steps).clamp(min=_SMALLEST)
            factors = factors / (factors.max() * factors.min()).sqrt()
            loss = _loss(block, site, factors, found)
            if loss < least:
                best, least = factors, loss
        return best


def _loss(block: Block, site: Site, factors: Tensor, found: SiteStatistics) -> float:
    """Squared output error of the site's readers, rounded to nearest after scaling by `factors`."""
    wide = repeat_over_heads(factors, block) if site.per_head else factors
    gram, total = found.grams[site.name], 0.0
    for name in site.readers:
        scheme = found.schemes[name]
        if scheme is not None:
            # The fits of sign bases would take many times as long.
            scheme = replace(scheme, grid="uniform", zero_point="integer") if scheme.grid == "sign" else scheme
            weight = block.linear(name).weight
            rounded = grid.nearest(weight * wide, scheme)
            total += sum(output_energy(rounded / wide - weight, gram, [weight.shape[0]]))
    return total

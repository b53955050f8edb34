"""AWQ (Lin et al., arXiv 2306.00978): scale channels up before rounding where activations are large.

For each site, with a_j the mean magnitude of channel j of its tensor, factors

    s_j = a_j^alpha,  normalised by sqrt(max s min s),    alpha = 0, 1/20, ..., 19/20

multiply the readers' columns and divide the channels where they are written. The alpha with the least output error of
the rounded readers is used: the sum over readers of ||(Q(W s) s⁻¹ - W) X||². Rounding itself comes later, with a clip
search weighted by the inputs' second moments. Differences from the released program:

- The error is that of the site's readers (from their Gram matrix), not of the whole module that they belong to.
- Under grouped-query attention, which the program skips, heads that share a key-value head use the mean of their a_j.
- Sites that may not be scaled, and sites without a quantized reader, do not change.
- For sign grids the search rounds to uniform grids.
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
# Lower bound of a factor before normalisation, as in the released program: a silent channel must not blow up others.
_SMALLEST = 1e-4


@dataclass(frozen=True)
class ActivationAwareScale(Transform):
    """AWQ's scaling of each site.

    steps: number of alphas to try: 0, 1/steps, ..., (steps - 1)/steps.
    """

    steps: int = _STEPS

    def __call__(self, block: Block, statistics: SiteStatistics) -> Mapping[str, Tensor]:
        """Scale the sites of `block` in place and return the divisors (channels,) by site name; see `Transform`."""
        divisors = {}
        for site in block.arch.sites:
            if "scale" in site.edits and any(statistics.schemes[name] is not None for name in site.readers):
                factors = self._factors(block, site, statistics)
                scale_site_(block, site, factors)
                divisors[site.name] = repeat_over_heads(factors, block) if site.per_head else factors
        return divisors

    def _factors(self, block: Block, site: Site, statistics: SiteStatistics) -> Tensor:
        """The factors of a site with the least loss: (channels,), or (key_value * width,) if the site is per head."""
        mean_abs = statistics.mean_abs[site.name].clamp(min=1e-8)
        if not bool(torch.isfinite(mean_abs).all() and torch.isfinite(statistics.grams[site.name]).all()):
            raise NumericalFailure(
                f"{block.path} {site.name}: activations are not finite; compute in bfloat16 or float32 (--dtype)"
            )
        if site.per_head:
            heads = block.heads
            mean_abs = mean_abs.view(heads.key_value, heads.repeats, heads.width).mean(1).flatten()
        best, least = torch.ones_like(mean_abs), torch.inf
        for step in range(self.steps):
            factors = mean_abs.pow(step / self.steps).clamp(min=_SMALLEST)
            factors = factors / (factors.max() * factors.min()).sqrt()
            loss = _loss(block, site, factors, statistics)
            if loss < least:
                best, least = factors, loss
        return best


def _loss(block: Block, site: Site, factors: Tensor, statistics: SiteStatistics) -> float:
    """Squared output error of the site's readers, rounded to nearest after scaling by `factors`."""
    channel_factors = repeat_over_heads(factors, block) if site.per_head else factors
    gram, total = statistics.grams[site.name], 0.0
    for name in site.readers:
        scheme = statistics.schemes[name]
        if scheme is not None:
            # Fitting sign bases would take many times as long.
            scheme = replace(scheme, grid="uniform", zero_point="integer") if scheme.grid == "sign" else scheme
            weight = block.linear(name).weight
            rounded = grid.nearest(weight * channel_factors, scheme)
            total += sum(output_energy(rounded / channel_factors - weight, gram, [weight.shape[0]]))
    return total

"""Static activation flattening: divide a site's channels by fixed factors, folded into the layer before it.

    s_j = a_j^alpha / w_j^beta

a_j is the largest magnitude of channel j of the site's tensor over the calibration tokens, w_j that of column j of the
readers' weights.

    SERQ (arXiv 2603.08185, section 4.1)   alpha 1, beta 0: the largest calibration value of every channel becomes 1,
                                           and the outliers move into the weights
    SmoothQuant (arXiv 2211.10438, eq. 4)  alpha 0.5, beta 0.5, on sites that a norm writes
    `SearchedFlatten`                      for each site, of alpha 0, 0.1, ..., 1 with beta 0 or 1 - alpha, the pair
                                           with the least output error of the quantized readers

Special cases: a channel that is 0 throughout calibration keeps its scale. If w_j = 0, the smallest nonzero w replaces
it. Under grouped-query attention, query heads that share a key-value head use the larger of their values. Sites that
may not be scaled do not change (factor 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.arch.site import Site
from subnibble.calibrate.stream import SiteStatistics
from subnibble.errors import BadRecipe
from subnibble.model.skeleton import Block
from subnibble.transforms.scale import repeat_over_heads, scale_site_
from subnibble.transforms.transform import Transform

# Lower bound of a factor relative to its site's largest: a nearly silent channel must not blow up its writers' weights.
_SMALLEST = 1e-4
_ALPHAS = tuple(step / 10 for step in range(11))
# Output error of one reader with weight and input quantized. Arguments: its name, scaled weight (m, k) and scaled
# tokens (t, k), channels in descending order of their largest magnitude before scaling.
Loss = Callable[[str, Tensor, Tensor], float]


@dataclass(frozen=True)
class Flatten(Transform):
    """Flatten every site that may be scaled, with the same powers.

    alpha: power of the activation magnitude, from 0 to 1.
    beta: power of the weight magnitude, from 0 to 1.
    """

    alpha: float = 1.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not 0 <= value <= 1:
                raise BadRecipe(f"{name} of the flattening is {value!r}; give a number from 0 to 1")

    def __call__(self, block: Block, statistics: SiteStatistics) -> Mapping[str, Tensor]:
        """Scale the sites of `block` in place and return the factors (channels,) by site name; see `Transform`."""
        return _flatten(block, statistics, lambda site: (self.alpha, self.beta))


@dataclass(frozen=True)
class NormFlatten(Flatten):
    """`Flatten` only the sites that a norm writes, as in SmoothQuant."""

    def __call__(self, block: Block, statistics: SiteStatistics) -> Mapping[str, Tensor]:
        """Scale sites in place and return the factors (channels,) by site name; see `Transform`."""
        return _flatten(
            block, statistics, lambda site: (self.alpha, self.beta) if site.norm is not None else (0.0, 0.0)
        )


@dataclass(frozen=True)
class SearchedFlatten(Transform):
    """Flatten each site with the powers that have the least loss there.

    loss: maps the block's statistics to the loss of one reader, see `Loss`.
    """

    loss: Callable[[SiteStatistics], Loss]

    def __call__(self, block: Block, statistics: SiteStatistics) -> Mapping[str, Tensor]:
        """Search the powers, scale sites in place, return the factors (channels,) by site name; see `Transform`."""
        return _flatten(block, statistics, lambda site: self._powers(block, site, statistics, self.loss(statistics)))

    def _powers(self, block: Block, site: Site, statistics: SiteStatistics, loss: Loss) -> tuple[float, float]:
        """The (alpha, beta) of a site with the least loss, summed over its quantized readers."""
        pairs = [(alpha, beta) for alpha in _ALPHAS for beta in {0.0, 1 - alpha}]
        order = torch.sort(statistics.max_abs[site.name], descending=True, stable=True).indices
        tokens = statistics.samples[site.name][:, order]

        def error(pair: tuple[float, float]) -> float:
            _, channel_factors = factors(block, site, statistics, *pair)
            readers = (name for name in site.readers if statistics.schemes[name] is not None)
            weights = ((name, (block.linear(name).weight * channel_factors)[:, order]) for name in readers)
            return sum(loss(name, weight, tokens / channel_factors[order]) for name, weight in weights)

        return min(sorted(pairs, reverse=True), key=error)


def factors(block: Block, site: Site, statistics: SiteStatistics, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """The factors s of one site, twice: for its writers and for its channels.

    statistics: of the block before the edit.
    alpha, beta: powers of the activation and of the weight magnitudes.
    Returns (channels,), or (key_value * width,) if the site is per head, for the writers; (channels,) for the channels.
    """
    max_abs = statistics.max_abs[site.name]
    max_weight = torch.stack([block.linear(name).weight.abs().amax(0) for name in site.readers]).amax(0)
    if site.per_head:
        max_abs, max_weight = (_over_heads(values, block) for values in (max_abs, max_weight))
    alive, nonzero = max_abs > 0, max_weight > 0
    least = max_weight[nonzero].min() if bool(nonzero.any()) else torch.ones((), device=max_weight.device)
    raw = max_abs.pow(alpha) / torch.where(nonzero, max_weight, least).pow(beta)
    top = float(raw[alive].max()) if bool(alive.any()) else 1.0
    s = torch.where(alive, raw.clamp(min=_SMALLEST * top), 1.0)
    return s, repeat_over_heads(s, block) if site.per_head else s


def _over_heads(values: Tensor, block: Block) -> Tensor:
    """Reduce (query * width,) to (key_value * width,) by the maximum over query heads that share a key-value head."""
    heads = block.heads
    return values.view(heads.key_value, heads.repeats, heads.width).amax(1).flatten()


def _flatten(
    block: Block, statistics: SiteStatistics, powers: Callable[[Site], tuple[float, float]]
) -> Mapping[str, Tensor]:
    """Scale every site that has a quantized reader. powers: gives (alpha, beta) of a site; (0, 0) leaves it out."""
    divisors = {}
    for site in block.arch.sites:
        if "scale" in site.edits and any(statistics.schemes[name] is not None for name in site.readers):
            alpha, beta = powers(site)
            if (alpha, beta) != (0.0, 0.0):
                writer_factors, divisors[site.name] = factors(block, site, statistics, alpha, beta)
                scale_site_(block, site, writer_factors)
    return divisors

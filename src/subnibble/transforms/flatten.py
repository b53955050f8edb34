"""Static activation flattening: divide a site's channels by fixed factors, folded into what writes them.

    s_j = a_j^alpha / w_j^beta

with a_j the largest magnitude of channel j of the site's tensor over the calibration tokens and w_j that of the
readers' column j. SERQ (arXiv 2603.08185, section 4.1) has alpha 1, beta 0: every channel's largest calibration value
becomes 1 and the outliers move into the weights. SmoothQuant (arXiv 2211.10438, eq. 4) has alpha 0.5, beta 0.5, on the
sites behind norms. `SearchedFlatten` takes, for each site, the pair with the least output error of the quantized
readers. A channel that is silent in calibration keeps its scale; one that no reader takes, w_j = 0, counts as the one
that they take least. Under grouped-query attention the query heads that share a key-value head take the larger of their
values. Sites that may not be scaled stay as they are; they have the factor 1.
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

# Of the largest factor of a site: a nearly silent channel must not blow up what writes it.
_SMALLEST = 1e-4
_ALPHAS = tuple(step / 10 for step in range(11))
# Output error of a site's reader with weight and input quantized: of its name, weight (m, k) and tokens (t, k) as
# scaled, channels in falling order of their largest magnitude.
Loss = Callable[[str, Tensor, Tensor], float]


@dataclass(frozen=True)
class Flatten(Transform):
    """Edit with the same powers everywhere."""

    alpha: float = 1.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not 0 <= value <= 1:
                raise BadRecipe(f"{name} of the flattening is {value!r}; give a number from 0 to 1")

    def __call__(self, block: Block, found: SiteStatistics) -> Mapping[str, Tensor]:
        """See `Transform`."""
        return _flatten(block, found, lambda site: (self.alpha, self.beta))


@dataclass(frozen=True)
class NormFlatten(Flatten):
    """The same, on sites behind norms alone, as SmoothQuant has it."""

    def __call__(self, block: Block, found: SiteStatistics) -> Mapping[str, Tensor]:
        """See `Transform`."""
        return _flatten(block, found, lambda site: (self.alpha, self.beta) if site.norm is not None else (0.0, 0.0))


@dataclass(frozen=True)
class SearchedFlatten(Transform):
    """Edit with powers of each site's own. loss: what is to be small."""

    loss: Callable[[SiteStatistics], Loss]

    def __call__(self, block: Block, found: SiteStatistics) -> Mapping[str, Tensor]:
        """See `Transform`."""
        return _flatten(block, found, lambda site: self._powers(block, site, found, self.loss(found)))

    def _powers(self, block: Block, site: Site, found: SiteStatistics, loss: Loss) -> tuple[float, float]:
        pairs = [(alpha, beta) for alpha in _ALPHAS for beta in {0.0, 1 - alpha}]
        order = torch.sort(found.largest[site.name], descending=True, stable=True).indices
        tokens = found.samples[site.name][:, order]

        def error(pair: tuple[float, float]) -> float:
            _, wide = factors(block, site, found, *pair)
            readers = (name for name in site.readers if found.schemes[name] is not None)
            weights = ((name, (block.linear(name).weight * wide)[:, order]) for name in readers)
            return sum(loss(name, weight, tokens / wide[order]) for name, weight in weights)

        return min(sorted(pairs, reverse=True), key=error)


def factors(block: Block, site: Site, found: SiteStatistics, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """The factors of a site's writers, (channels,) or (key_value * width,), and of its channels, (channels,)."""
    sizes = found.largest[site.name]
    columns = torch.stack([block.linear(name).weight.abs().amax(0) for name in site.readers]).amax(0)
    if site.per_head:
        sizes, columns = (_over_heads(values, block) for values in (sizes, columns))
    alive, taken = sizes > 0, columns > 0
    least = columns[taken].min() if bool(taken.any()) else torch.ones((), device=columns.device)
    raw = sizes.pow(alpha) / torch.where(taken, columns, least).pow(beta)
    largest = float(raw[alive].max()) if bool(alive.any()) else 1.0
    s = torch.where(alive, raw.clamp(min=_SMALLEST * largest), 1.0)
    return s, repeat_over_heads(s, block) if site.per_head else s


def _over_heads(values: Tensor, block: Block) -> Tensor:
    """(query * width,) to (key_value * width,): the largest of the query heads that share a key-value head."""
    heads = block.heads
    return values.view(heads.key_value, heads.repeats, heads.width).amax(1).flatten()


def _flatten(
    block: Block, found: SiteStatistics, powers: Callable[[Site], tuple[float, float]]
) -> Mapping[str, Tensor]:
    made = {}
    for site in block.arch.sites:
        if "scale" in site.edits and any(found.schemes[name] is not None for name in site.readers):
            alpha, beta = powers(site)
            if (alpha, beta) != (0.0, 0.0):
                narrow, made[site.name] = factors(block, site, found, alpha, beta)
                scale_site_(block, site, narrow)
    return made

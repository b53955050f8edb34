"""Soft-constrained smoothing: inputs are divided by learned factors, weights multiplied by factors that may differ.

    X' = X exp(-a),   W' = W exp(a + d),   penalty λ mean(d²)

d = 0 is OmniQuant's learned equivalent transformation without shifts (arXiv 2308.13137, section 3.3), which keeps the
function; a penalised d lets weights and inputs part a little. exp(-a) is folded into what writes the site's tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from subnibble.arch.site import Heads, Site
from subnibble.model.skeleton import Block
from subnibble.transforms.scale import scale_site_

_SMALLEST, _LARGEST, _LARGEST_SLACK = 1e-2, 1e2, 0.5


class Smoothing(nn.Module):
    """Factors of one site's channels.

    start: a at first, (channels,); (key_value * width,) where query heads share a key-value head. kept: (channels,)
    bool, channels that stay as they are (where heads share factors, that have no slack), or None. heads: of attention's
    output, whose factors act on values before they are cached; None for another site. soft: whether d is learned.
    """

    _free: Tensor

    def __init__(self, start: Tensor, kept: Tensor | None, heads: Heads | None, soft: bool) -> None:
        super().__init__()
        self.log_factors = nn.Parameter(start.clone())
        self._heads = heads
        wide = self._over_heads(start)
        self.slack = nn.Parameter(torch.zeros_like(wide)) if soft else None
        self.register_buffer("_free", torch.ones_like(wide) if kept is None else (~kept).to(wide.dtype))

    def start_at_one_(self) -> None:
        """Let all factors start at 1."""
        with torch.no_grad():
            self.log_factors.zero_()

    def inputs(self, x: Tensor) -> Tensor:
        """The site's tokens (t, channels) as readers meet them."""
        return x if self._heads is not None else x / self.wide()

    def values(self, values: Tensor) -> Tensor:
        """Attention's values (..., key_value, t, width) as they are cached."""
        if self._heads is None:
            return values
        return values / self.narrow().view(self._heads.key_value, 1, self._heads.width)

    def fold_(self, block: Block, site: Site) -> None:
        """Divide what writes the site of a float32 block by the factors, and multiply its readers; the block keeps its
        function.
        """
        scale_site_(block, site, self.narrow())

    def narrow(self) -> Tensor:
        """Factors (channels,) by which writers are divided; as many as `start`."""
        return self._bounded(self.log_factors if self._heads is not None else self.log_factors * self._free).exp()

    def wide(self) -> Tensor:
        """Factors (channels,) by which inputs are divided."""
        return self._over_heads(self.narrow())

    def of_weights(self) -> Tensor:
        """Factors (channels,) by which readers' columns are multiplied."""
        if self.slack is None:
            return self.wide()
        return self.wide() * (self.slack.clamp(-_LARGEST_SLACK, _LARGEST_SLACK) * self._free).exp()

    def _over_heads(self, factors: Tensor) -> Tensor:
        heads = self._heads
        if heads is None:
            return factors
        return factors.view(heads.key_value, heads.width).repeat_interleave(heads.repeats, dim=0).reshape(-1)

    def _bounded(self, logs: Tensor) -> Tensor:
        low, high = (torch.tensor(bound).log().item() for bound in (_SMALLEST, _LARGEST))
        return logs.clamp(low, high)

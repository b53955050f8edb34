"""Soft-constrained smoothing: divide inputs by learned factors, multiply weights by factors that may differ slightly.

    X' = X exp(-a),   W' = W exp(a + d),   penalty λ mean(d²)

d = 0 is OmniQuant's learned equivalent transformation without shifts (arXiv 2308.13137, section 3.3), which keeps the
function; the penalty on d allows a small mismatch between weight and input factors. exp(-a) is folded into the modules
that write the site's tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from subnibble.arch.site import Heads, Site
from subnibble.model.skeleton import Block
from subnibble.transforms.scale import scale_site_

_SMALLEST, _LARGEST, _LARGEST_SLACK = 1e-2, 1e2, 0.5


class Smoothing(nn.Module):
    """Learned smoothing factors of one site's channels.

    start: initial a, (channels,); at the attention output (key_value * width,), one per channel of the values.
    unscaled: (channels,) bool, channels without a factor, or None. If heads share factors, it only removes the slack.
    heads: given for the attention output, whose factors are applied to values before they are cached; None elsewhere.
    soft: whether d is learned.
    """

    _free: Tensor

    def __init__(self, start: Tensor, unscaled: Tensor | None, heads: Heads | None, soft: bool) -> None:
        super().__init__()
        self.log_factors = nn.Parameter(start.clone())
        self._heads = heads
        wide = self._over_heads(start)
        self.slack = nn.Parameter(torch.zeros_like(wide)) if soft else None
        self.register_buffer("_free", torch.ones_like(wide) if unscaled is None else (~unscaled).to(wide.dtype))

    def start_at_one_(self) -> None:
        """Set all factors to 1."""
        with torch.no_grad():
            self.log_factors.zero_()

    def inputs(self, x: Tensor) -> Tensor:
        """Tokens (t, channels) divided by the factors; unchanged at the attention output, whose values were divided."""
        return x if self._heads is not None else x / self.wide()

    def values(self, values: Tensor) -> Tensor:
        """Attention values (..., key_value, t, width) divided by the factors, as they are cached."""
        if self._heads is None:
            return values
        return values / self.narrow().view(self._heads.key_value, 1, self._heads.width)

    def fold_(self, block: Block, site: Site) -> None:
        """Divide the writers of `site` in a float32 block by the factors and multiply its readers' columns by them.

        The block computes the same function afterwards.
        """
        scale_site_(block, site, self.narrow())

    def narrow(self) -> Tensor:
        """Factors that writers are divided by; the shape of `start`."""
        return self._bounded(self.log_factors if self._heads is not None else self.log_factors * self._free).exp()

    def wide(self) -> Tensor:
        """Factors (channels,) that inputs are divided by."""
        return self._over_heads(self.narrow())

    def of_weights(self) -> Tensor:
        """Factors (channels,) that the columns of the readers' weights are multiplied by."""
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

"""A learned rotation of each key-value head's values, which attention hands on and the output projection undoes.

    V' = V R,   O' = O Rᵀ for each query head,   R = exp(S - Sᵀ)

Attention takes weighted means of values, which R goes through, so the function stays whatever the orthogonal R; what
changes is what the cache codes, and what the output projection's input and weight look like when they are quantized. It
is the rotation within heads that SpinQuant (arXiv 2405.16406) learns, there over the whole model, here block by block
like all else. S = 0 at first: it begins as what the base turns values by.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from subnibble.model.site import Heads, Site
from subnibble.model.skeleton import Block


class HeadRotation(nn.Module):
    """See the module. One R (width, width) for each key-value head."""

    def __init__(self, heads: Heads, device: torch.device) -> None:
        super().__init__()
        self._heads = heads
        self.skew = nn.Parameter(torch.zeros(heads.key_value, heads.width, heads.width, device=device))

    def matrices(self) -> Tensor:
        """R of each head, (key_value, width, width)."""
        found: Tensor = torch.linalg.matrix_exp(self.skew - self.skew.mT)
        return found

    def values(self, values: Tensor) -> Tensor:
        """Values (..., key_value, t, width), turned: float32."""
        return values.float() @ self.matrices()

    def columns(self, weight: Tensor) -> Tensor:
        """A reader's weight (m, query * width) on turned inputs."""
        return _by_head(weight, self.matrices(), self._heads)

    def natural(self, weight: Tensor) -> Tensor:
        """The same undone, for a weight that was made for turned inputs."""
        return _by_head(weight, self.matrices().mT, self._heads)

    def rows(self, matrix: Tensor) -> Tensor:
        """What writes values, (key_value * width, n), so that they come out turned."""
        heads = self._heads
        split = matrix.view(heads.key_value, heads.width, -1)
        return (self.matrices().mT.to(split.dtype) @ split).flatten(0, 1)

    def edit_block_(self, block: Block, site: Site) -> None:
        """Turn the values of a float32 block in place. site: attention's output."""
        with torch.no_grad():
            for name in site.writers:
                linear = block.linear(name)
                linear.weight.copy_(self.rows(linear.weight))
                if linear.bias is not None:
                    linear.bias.copy_(self.rows(linear.bias.unsqueeze(1))[:, 0])
            for name in site.readers:
                weight = block.linear(name).weight
                weight.copy_(self.columns(weight))


def _by_head(weight: Tensor, matrices: Tensor, heads: Heads) -> Tensor:
    split = weight.view(-1, heads.key_value, heads.repeats, heads.width)
    return torch.einsum("mkrw,kwv->mkrv", split, matrices.to(weight.dtype)).reshape(weight.shape)

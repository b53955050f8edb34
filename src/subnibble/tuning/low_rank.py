"""Stabilized low-rank error compensation: D = B A / sqrt(r) learned beside a frozen weight.

The scale 1 / sqrt(r) keeps the step that B and A make together independent of the rank (rsLoRA, arXiv 2312.03732), and
B starts at 0, so that training starts from the weight as it is. "merge" adds D to the weight before it is rounded,
which costs nothing; "side" keeps it as a branch `up · Q(down · x)` on the quantized input, coded at 8 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from subnibble.runtime import activations
from subnibble.runtime.straight_through import straight_through
from subnibble.scheme import ActivationScheme


class Compensation(nn.Module):
    """Factors of one linear's weight (m, k): down (r, k), up (m, r)."""

    def __init__(self, rows: int, columns: int, rank: int, generator: torch.Generator, device: torch.device) -> None:
        super().__init__()
        rank = min(rank, rows, columns)
        drawn = torch.randn(rank, columns, generator=generator) / columns**0.5
        self.down = nn.Parameter(drawn.to(device))
        self.up = nn.Parameter(torch.zeros(rows, rank, device=device))
        self._scale = rank**-0.5

    def product(self) -> Tensor:
        """D (m, k)."""
        found: Tensor = self._scale * self.up @ self.down
        return found

    def branch(self, x: Tensor, scheme: ActivationScheme | None) -> Tensor:
        """What the branch adds (..., m). x: (..., k) as the linear meets it. scheme: of the value between."""
        inner = nn.functional.linear(x, self.down)
        if scheme is not None:
            seen = activations.quantize_values(inner.detach().flatten(0, -2), scheme.without_outliers)
            seen = seen.view(inner.shape)
            inner = straight_through(inner, seen)
        return nn.functional.linear(inner, self._scale * self.up)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Down and up, the scale in up."""
        return self.down.detach(), (self._scale * self.up).detach()

    def set_(self, down: Tensor, up: Tensor) -> None:
        """Take over factors, the scale in up."""
        with torch.no_grad():
            self.down.copy_(down)
            self.up.copy_(up / self._scale)

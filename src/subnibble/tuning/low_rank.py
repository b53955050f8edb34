"""Stabilized low-rank error compensation: a learned D = B A / sqrt(r) that is added to a frozen weight.

The scale 1 / sqrt(r) makes the size of an update independent of the rank (rsLoRA, arXiv 2312.03732). B starts at 0, so
that training starts from the unchanged weight. D is merged into the weight before rounding and costs nothing at run
time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Compensation(nn.Module):
    """Low-rank factors of one weight (m, k): down, A (r, k), and up, B (m, r).

    rows, columns: m and k.
    rank: r; reduced to min(m, k) if larger.
    generator: draws the initial A.
    """

    def __init__(self, rows: int, columns: int, rank: int, generator: torch.Generator, device: torch.device) -> None:
        super().__init__()
        rank = min(rank, rows, columns)
        initial = torch.randn(rank, columns, generator=generator) / columns**0.5
        self.down = nn.Parameter(initial.to(device))
        self.up = nn.Parameter(torch.zeros(rows, rank, device=device))
        self._scale = rank**-0.5

    def product(self) -> Tensor:
        """Return D, (m, k)."""
        product: Tensor = self._scale * self.up @ self.down
        return product

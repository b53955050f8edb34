"""Stabilized low-rank error compensation: D = B A / sqrt(r) learned beside a frozen weight.

The scale 1 / sqrt(r) keeps the step that B and A make together independent of the rank (rsLoRA, arXiv 2312.03732), and
B starts at 0, so that training starts from the weight as it is. D is added to the weight before it is rounded, which
costs nothing when the model runs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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

"""Coordinate descent on codes: what GPTQ's single pass leaves, later passes take.

With H = X Xᵀ (damped) and E = W - Q, the best value of column j when all others stay is

    t_j = q_j + (E H)_j / H_jj,      q_j <- nearest level of t_j

which never raises tr(E H Eᵀ) (QuantEase, Behdin et al., arXiv 2309.01885; CDQuant, arXiv 2406.17542). A sweep visits
every column once and costs about as much as GPTQ's loop; grids stay as GPTQ fitted them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from subnibble.rounding.levels import Fitted


@dataclass(frozen=True)
class Home:
    """Where a column's codes live: its group's index and grid, and its place among the group's columns."""

    index: int
    fitted: Fitted
    place: int


def sweep_(
    error: Tensor,
    codes: Tensor,
    h: Tensor,
    homes: Sequence[Home],
    blocks: Sequence[tuple[int, int]],
) -> None:
    """One sweep over all columns, in place. Columns are rows here, in the order of their visit.

    error: (k, m), target minus rounded. codes: (k, m). h: (k, k) damped. homes: of each column. blocks:
    start and stop of columns whose gradients are kept up to date together.
    """
    for start, stop in blocks:
        gradient = h[start:stop] @ error
        for j in range(start, stop):
            fitted, place = homes[j].fitted, homes[j].place
            old = fitted.decode(codes[j].unsqueeze(1), place)[:, 0]
            target = old + gradient[j - start] / h[j, j]
            new = fitted.encode(target.unsqueeze(1), place)
            moved = fitted.decode(new, place)[:, 0] - old
            codes[j] = new[:, 0]
            error[j] -= moved
            gradient.addr_(h[start:stop, j], moved, alpha=-1)

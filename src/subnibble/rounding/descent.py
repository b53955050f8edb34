"""Coordinate descent on codes: reduce the output error that remains after GPTQ's single pass.

With H = X Xᵀ (damped) and E = W - Q, the best value of column j with all other columns fixed is

    t_j = q_j + (E H)_j / H_jj,      q_j <- nearest level of t_j

which never raises tr(E H Eᵀ) (QuantEase, Behdin et al., arXiv 2309.01885; CDQuant, arXiv 2406.17542). A sweep visits
every column once and costs about as much as GPTQ's loop. The grids that GPTQ fitted do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from subnibble.rounding.levels import Fitted


@dataclass(frozen=True)
class ColumnGrid:
    """The grid of one column.

    group: index of the column's group.
    fitted: the group's grid.
    position: the column's position in its group, in visiting order.
    """

    group: int
    fitted: Fitted
    position: int


def sweep_(
    error: Tensor,
    codes: Tensor,
    h: Tensor,
    grids: Sequence[ColumnGrid],
    blocks: Sequence[tuple[int, int]],
) -> None:
    """Improve `error` and `codes` in place by one sweep over all columns.

    All arguments are in visiting order, and columns of the weight are rows here.
    error: (k, m), target minus dequantized weight.
    codes: (k, m).
    h: (k, k), damped.
    grids: one per column.
    blocks: (start, stop) of the columns whose gradients are updated together.
    """
    for start, stop in blocks:
        gradient = h[start:stop] @ error
        for j in range(start, stop):
            fitted, position = grids[j].fitted, grids[j].position
            old = fitted.decode(codes[j].unsqueeze(1), position)[:, 0]
            target = old + gradient[j - start] / h[j, j]
            new = fitted.encode(target.unsqueeze(1), position)
            change = fitted.decode(new, position)[:, 0] - old
            codes[j] = new[:, 0]
            error[j] -= change
            gradient.addr_(h[start:stop, j], change, alpha=-1)

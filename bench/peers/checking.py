"""Whether a product is right: every element against the product of what the codes stand for, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from peers.product import FLOAT32, Tolerance

# Standard deviations of a sum of rounding errors that no element may exceed: 10^9 elements stay within 6.5.
DEVIATIONS = 7.0
# Tokens of each end that are checked: a kernel's full blocks, and its remainder.
CHECKED = 16


def wrong(x: Tensor, dense: Tensor, y: Tensor, tolerance: Tolerance) -> str | None:
    """Say what is wrong with y = x denseᵀ, None if nothing.

    x: (t, k). dense: (n, k) float32. y: (t, n).

    Rounding is taken as independent and uniform, so the bound of an element is some standard deviations of its error:
    for inputs of 8 bits the square root of `sum (step^2 / 12) w^2`, for inputs or weights that are rounded to a shorter
    type that of `sum (eps x w)^2`. Float32 sums add `2 eps sqrt(k) (|x| @ |w|)`.
    """
    if y.shape != (x.shape[0], dense.shape[0]):
        return f"shape {tuple(y.shape)}"
    rows = sorted({*range(min(CHECKED, len(x))), *range(max(0, len(x) - CHECKED), len(x))})
    x, y, w = x[rows].double(), y[rows].double(), dense.double()
    exact = x @ w.T
    variance = (tolerance.weight**2 + tolerance.inputs**2) * (x.square() @ w.square().T)
    if tolerance.block is not None:
        variance += _steps(x, w, w.shape[1] if tolerance.block == -1 else tolerance.block)
    bound = DEVIATIONS * variance.sqrt() + 2 * tolerance.output * exact.abs()
    bound += 4 * FLOAT32 * w.shape[1] ** 0.5 * (x.abs() @ w.abs().T)
    error = (y - exact).abs()
    if bool((error <= bound).all()):
        return None
    worst = (error / bound).nan_to_num(float("inf")).max()
    return f"the worst element is {float(worst):.3g} times its bound off"


def _steps(x: Tensor, w: Tensor, block: int) -> Tensor:
    """Variance of an element if inputs are rounded to 8 bits in blocks: `sum step^2 / 12 w^2`, (t, n)."""
    short = -x.shape[1] % block
    x, w = torch.nn.functional.pad(x, (0, short)), torch.nn.functional.pad(w, (0, short))
    steps = x.view(x.shape[0], -1, block).abs().amax(-1) / 127
    return (steps.square() / 12) @ w.square().view(w.shape[0], -1, block).sum(-1).T

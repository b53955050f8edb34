"""Rounding to nearest, with grids fitted to the weights or to their columns' shares of the output error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from subnibble.rounding import grid
from subnibble.rounding.dual_scale import RowScale
from subnibble.rounding.levels import Fitter
from subnibble.rounding.rtn import RTN
from subnibble.tensor.packed import PackedRange
from subnibble.tensor.scheme import Scheme

CLIP = grid.Clip("mse")
SCHEMES = [Scheme(3, 16), Scheme(2, 19, "real"), Scheme(4, -1, "none"), Scheme(2, 16, "none", grid="sign")]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)


def weights(columns: int = 47) -> Tensor:
    """Signed, with outliers, a constant row and a zero group."""
    w = torch.randn(9, columns, generator=torch.Generator().manual_seed(0)) * 0.1
    w[0, 3], w[4, 40] = 1.7, -2.3
    w[1] = 0.37
    w[2, 16:32] = 0
    return w


def gram(columns: int = 47) -> Tensor:
    """Of inputs some of whose channels are much larger than others, one of them silent."""
    x = torch.randn(200, columns, generator=torch.Generator().manual_seed(1))
    x *= torch.rand(columns, generator=torch.Generator().manual_seed(2)) * 9 + 0.05
    x[:, 5] = 0
    return x.T @ x


def by_groups(w: Tensor, scheme: Scheme, fitter: Fitter, probs: Tensor | None, shift: int = 0) -> Tensor:
    """Every group fitted by itself, dense. shift: by how many groups the columns' shares are misplaced."""
    parts, bounds = [], scheme.group_bounds(w.shape[1])
    for index, (start, stop) in enumerate(bounds):
        first = bounds[(index + shift) % len(bounds)][0]
        share = None if probs is None else probs.roll(start - first)[start:stop]
        fitted = fitter.fit(w[:, start:stop], scheme, share, index)
        parts.append(fitted.decode(fitted.encode(w[:, start:stop])))
    return torch.cat(parts, 1)


def rounded(rounder: RTN, scheme: Scheme) -> Tensor:
    return PackedRange.pack(rounder(weights(), gram(), scheme, "w").quantized, scheme).dequantize()


@every_scheme
@pytest.mark.parametrize("fitter", [CLIP, RowScale()], ids=["clip", "refit"])
def test_weighted_fits_take_each_columns_own_share_of_the_gram(fitter: Fitter, scheme: Scheme) -> None:
    w, probs = weights(), gram().diagonal()
    result = rounded(RTN(fitter, "hessian"), scheme)
    assert torch.equal(result, by_groups(w, scheme, fitter, probs))
    assert not torch.equal(result, by_groups(w, scheme, fitter, None))
    if len(scheme.group_bounds(w.shape[1])) > 1:
        assert not torch.equal(result, by_groups(w, scheme, fitter, probs, shift=1))
    assert not torch.equal(result, by_groups(w, scheme, fitter, gram().abs().mean(1)))


@every_scheme
def test_unweighted_fits_do_not_look_at_the_gram(scheme: Scheme) -> None:
    assert not RTN(CLIP).needs_gram
    assert torch.equal(rounded(RTN(CLIP), scheme), by_groups(weights(), scheme, CLIP, None))


@every_scheme
def test_weighted_fits_lower_the_weighted_error(scheme: Scheme) -> None:
    def error(rounder: RTN) -> float:
        return float(((rounded(rounder, scheme) - weights()).square() * gram().diagonal()).sum())

    assert error(RTN(CLIP, "hessian")) < error(RTN(CLIP))


def test_weighted_rounding_without_a_gram_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs the Gram matrix of w's inputs"):
        RTN(CLIP, "hessian")(weights(), None, SCHEMES[0], "w")

"""Statistics: all that is learned from calibration windows while they stream through, as accumulators.

`update` with a batch, `merge` another one of the same kind (from another process), read `value`. The law, which
`tests/test_statistics.py` holds every one of them to: however windows are split into parts and batches, parts updated
on their own and merged have the value of one pass over all. Statistics that take windows in order (`KeyMean`,
`MassivePlaces`, `TrainingWindows`) are merged in the order of the windows, all others in any order.

Here are those of a site's tensor; the others lie beside what they serve.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Protocol, Self, TypeVar, TypeVarTuple

import torch
from torch import Tensor

# Rows of a Gram matrix that are summed at once: narrower panels save more and multiply less efficiently.
_PANEL = 256
# Sums of products of millions of numbers between these stay inside float32.
_LEAST, _MOST = 2.0**-50, 2.0**50


Batch = TypeVarTuple("Batch")
Value_co = TypeVar("Value_co", covariant=True)


class Statistic(Protocol[*Batch, Value_co]):
    """Accumulates over batches."""

    def update(self, *batch: *Batch) -> None:
        """Add a batch. Of one tensor: (tokens, channels)."""

    def merge(self, other: Self) -> None:
        """Add everything that `other` has seen, and leave `other` as it is."""

    @property
    def value(self) -> Value_co:
        """The statistic over all that was seen."""


def value_over(statistic: Statistic[*Batch, Value_co], batches: Iterable[tuple[*Batch]]) -> Value_co:
    """The value once `statistic` has seen all batches."""
    for batch in batches:
        statistic.update(*batch)
    return statistic.value


def product_dtype(x: Tensor) -> torch.dtype:
    """The type that holds sums of products of these numbers: float32, or float64 for the very large or small."""
    largest = max(abs(float(end)) for end in x.aminmax()) if x.numel() else 0.0
    return torch.float32 if largest == 0 or _LEAST < largest < _MOST else torch.float64


class Gram:
    """Sum of x xᵀ: (channels, channels), exactly symmetric, accumulated in `dtype` or better: see `product_dtype`.

    Panels of rows are summed up to the diagonal alone, which takes little more than half the multiplications.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self._sum = torch.zeros(channels, channels, dtype=dtype, device=device)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """See `Statistic`; one matrix product a panel."""
        self._sum = self._sum.to(torch.promote_types(self._sum.dtype, product_dtype(x)))
        wide = x.to(self._sum.dtype)
        for start, stop in self._panels():
            self._sum[start:stop, :stop].addmm_(wide[:, start:stop].T, wide[:, :stop])
        self.tokens += x.shape[0]

    def merge(self, other: Gram) -> None:
        """See `Statistic`."""
        self._sum = self._sum + other._sum.to(self._sum.device)
        self.tokens += other.tokens

    @property
    def value(self) -> Tensor:
        """See `Statistic`: (channels, channels)."""
        for start, stop in self._panels():
            corner = self._sum[start:stop, start:stop]
            corner.copy_(corner.tril() + corner.tril(-1).T)
            self._sum[:start, start:stop] = self._sum[start:stop, :start].T
        return self._sum

    def _panels(self) -> Iterator[tuple[int, int]]:
        channels = self._sum.shape[0]
        return ((start, min(start + _PANEL, channels)) for start in range(0, channels, _PANEL))


class Drift:
    """Sum of (x~ - x) xᵀ: rows are the difference, columns what is fed now: (channels, channels), typed as `Gram`."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(channels, channels, dtype=torch.float32, device=device)

    def update(self, x: Tensor, target: Tensor) -> None:
        """Add tokens. x: (tokens, channels), as fed now; target: x~, the same tokens' in the full-precision model."""
        dtype = torch.promote_types(self._sum.dtype, product_dtype(x))
        dtype = torch.promote_types(dtype, product_dtype(target))
        self._sum, now = self._sum.to(dtype), x.to(dtype)
        self._sum.addmm_((target.to(dtype) - now).T, now)

    def merge(self, other: Drift) -> None:
        """See `Statistic`."""
        self._sum = self._sum + other._sum.to(self._sum.device)

    @property
    def value(self) -> Tensor:
        """See `Statistic`: (channels, channels)."""
        return self._sum


class AbsMax:
    """Largest magnitude of each channel: (channels,)."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self._max = torch.zeros(channels, dtype=torch.float32, device=device)

    def update(self, x: Tensor) -> None:
        """See `Statistic`."""
        if x.shape[0]:
            torch.maximum(self._max, x.abs().amax(0).float(), out=self._max)

    def merge(self, other: AbsMax) -> None:
        """See `Statistic`."""
        torch.maximum(self._max, other._max.to(self._max.device), out=self._max)

    @property
    def value(self) -> Tensor:
        """See `Statistic`: (channels,)."""
        return self._max


class Mean:
    """Mean of each channel: (channels,), summed in float64."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """See `Statistic`."""
        self._sum += x.sum(0, dtype=torch.float64)
        self.tokens += x.shape[0]

    def merge(self, other: Mean) -> None:
        """See `Statistic`."""
        self._sum += other._sum.to(self._sum.device)
        self.tokens += other.tokens

    @property
    def value(self) -> Tensor:
        """See `Statistic`: (channels,) float32, zeros before any token."""
        return (self._sum / max(self.tokens, 1)).float()


class AbsMean(Mean):
    """Mean magnitude of each channel: (channels,), summed in float64."""

    def update(self, x: Tensor) -> None:
        """See `Statistic`."""
        super().update(x.abs())


class Sample:
    """Every so-many-th token: (tokens, channels) float32, in the order of the text.

    every: 1 takes all. first: the number, in the whole text, of the first token that comes; tokens are counted over the
    whole text, so that batches and parts take the same ones.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu", every: int = 1, first: int = 0) -> None:
        self._every, self._next = every, first
        # By the number of the first token of the batch that they come from.
        self._taken = {first: torch.empty(0, channels, device=device)}
        self._device = device

    def update(self, x: Tensor) -> None:
        """See `Statistic`."""
        # A copy, lest a view keep all of x.
        self._taken[self._next] = x[-self._next % self._every :: self._every].to(torch.float32, copy=True)
        self._next += x.shape[0]

    def merge(self, other: Sample) -> None:
        """See `Statistic`."""
        for first, taken in other._taken.items():
            if taken.shape[0]:
                self._taken[first] = taken.to(self._device)
        self._next = max(self._next, other._next)

    @property
    def value(self) -> Tensor:
        """See `Statistic`: (tokens, channels)."""
        return torch.cat([self._taken[first] for first in sorted(self._taken)])


class WeightedMean:
    """Mean of numbers, of batches with so many parts each, say losses; rounded once, so that no order matters."""

    def __init__(self) -> None:
        self._products: list[float] = []
        self._weight = 0

    def update(self, number: float, weight: int) -> None:
        """Add the mean over `weight` parts."""
        self._products.append(number * weight)
        self._weight += weight

    def merge(self, other: WeightedMean) -> None:
        """See `Statistic`."""
        self._products += other._products
        self._weight += other._weight

    @property
    def value(self) -> float:
        """See `Statistic`; 0 of nothing."""
        return math.fsum(self._products) / max(self._weight, 1)

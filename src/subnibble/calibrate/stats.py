"""Statistics: accumulators of what is measured on calibration windows.

A statistic is updated with batches (`update`), merged with another one of its kind, for example from another process
(`merge`), and read (`value`). Law, tested for every class by `tests/test_statistics.py`: however the windows are split
into parts and batches, updating each part separately and merging gives the value of one pass over all windows.
`KeyMean`, `MassivePlaces` and `TrainingWindows` must be merged in the order of the windows; all others in any order.

This file has the statistics of a site's activations; the others are in the files that use them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Protocol, Self, TypeVar, TypeVarTuple

import torch
from torch import Tensor

# Rows of a Gram matrix per matrix product. Narrower panels skip more of the upper triangle, but multiply more slowly.
_PANEL = 256
# If the largest magnitude lies between these, sums of millions of products stay inside the range of float32.
_LEAST, _MOST = 2.0**-50, 2.0**50


Batch = TypeVarTuple("Batch")
Value_co = TypeVar("Value_co", covariant=True)


class Statistic(Protocol[*Batch, Value_co]):
    """An accumulator over batches. `Batch`: what `update` takes; `Value_co`: what `value` returns."""

    def update(self, *batch: *Batch) -> None:
        """Add a batch. A statistic of one tensor takes it as (tokens, channels)."""

    def merge(self, other: Self) -> None:
        """Add all batches that were added to `other`, which stays unchanged."""

    @property
    def value(self) -> Value_co:
        """The statistic over all batches so far."""


def value_over(statistic: Statistic[*Batch, Value_co], batches: Iterable[tuple[*Batch]]) -> Value_co:
    """Update `statistic` with all batches and return its value."""
    for batch in batches:
        statistic.update(*batch)
    return statistic.value


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype for sums of products of the numbers in `x`: float32, or float64 if the largest is huge or tiny."""
    max_abs = max(abs(float(end)) for end in x.aminmax()) if x.numel() else 0.0
    return torch.float32 if max_abs == 0 or _LEAST < max_abs < _MOST else torch.float64


class Gram:
    """Gram matrix, the sum of x xᵀ over tokens: (channels, channels), exactly symmetric.

    dtype: dtype of the sum; becomes float64 at the first batch that needs it (`product_dtype`).

    Only the lower triangle is summed, in panels of rows, with little more than half of the multiplications.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self._sum = torch.zeros(channels, channels, dtype=dtype, device=device)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Add a batch x, (tokens, channels)."""
        self._sum = self._sum.to(torch.promote_types(self._sum.dtype, product_dtype(x)))
        wide = x.to(self._sum.dtype)
        for start, stop in self._panels():
            self._sum[start:stop, :stop].addmm_(wide[:, start:stop].T, wide[:, :stop])
        self.tokens += x.shape[0]

    def merge(self, other: Gram) -> None:
        """Add all batches of `other`."""
        self._sum = self._sum + other._sum.to(self._sum.device)
        self.tokens += other.tokens

    @property
    def value(self) -> Tensor:
        """The Gram matrix, (channels, channels)."""
        for start, stop in self._panels():
            corner = self._sum[start:stop, start:stop]
            corner.copy_(corner.tril() + corner.tril(-1).T)
            self._sum[:start, start:stop] = self._sum[start:stop, :start].T
        return self._sum

    def _panels(self) -> Iterator[tuple[int, int]]:
        channels = self._sum.shape[0]
        return ((start, min(start + _PANEL, channels)) for start in range(0, channels, _PANEL))


class Drift:
    """Sum of (x~ - x) xᵀ over tokens: (channels, channels), float32, or float64 as in `Gram`.

    x~ is the input in the full-precision model, x that in the quantized model. Rows belong to x~ - x, columns to x.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(channels, channels, dtype=torch.float32, device=device)

    def update(self, x: Tensor, target: Tensor) -> None:
        """Add tokens.

        x: inputs in the quantized model, (tokens, channels).
        target: x~, inputs of the same tokens in the full-precision model, (tokens, channels).
        """
        dtype = torch.promote_types(self._sum.dtype, product_dtype(x))
        dtype = torch.promote_types(dtype, product_dtype(target))
        self._sum, wide = self._sum.to(dtype), x.to(dtype)
        self._sum.addmm_((target.to(dtype) - wide).T, wide)

    def merge(self, other: Drift) -> None:
        """Add all batches of `other`."""
        self._sum = self._sum + other._sum.to(self._sum.device)

    @property
    def value(self) -> Tensor:
        """The sum, (channels, channels)."""
        return self._sum


class AbsMax:
    """Largest magnitude of each channel: (channels,)."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self._max = torch.zeros(channels, dtype=torch.float32, device=device)

    def update(self, x: Tensor) -> None:
        """Add a batch x, (tokens, channels)."""
        if x.shape[0]:
            torch.maximum(self._max, x.abs().amax(0).float(), out=self._max)

    def merge(self, other: AbsMax) -> None:
        """Add all batches of `other`."""
        torch.maximum(self._max, other._max.to(self._max.device), out=self._max)

    @property
    def value(self) -> Tensor:
        """Largest magnitudes, (channels,) float32."""
        return self._max


class Mean:
    """Mean of each channel: (channels,), summed in float64."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Add a batch x, (tokens, channels)."""
        self._sum += x.sum(0, dtype=torch.float64)
        self.tokens += x.shape[0]

    def merge(self, other: Mean) -> None:
        """Add all batches of `other`."""
        self._sum += other._sum.to(self._sum.device)
        self.tokens += other.tokens

    @property
    def value(self) -> Tensor:
        """(channels,) float32; zeros if there were no tokens."""
        return (self._sum / max(self.tokens, 1)).float()


class AbsMean(Mean):
    """Mean magnitude of each channel: (channels,), summed in float64."""

    def update(self, x: Tensor) -> None:
        """Add a batch x, (tokens, channels)."""
        super().update(x.abs())


class Sample:
    """A sample of the tokens: every n-th one, (tokens, channels) float32, in the order of the text.

    every: n; 1 keeps all tokens.
    first: index, in the whole text, of the first token that will be added. Indices count over the whole text, so that
        the sample does not depend on batches and parts.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu", every: int = 1, first: int = 0) -> None:
        self._every, self._next = every, first
        # Index of a batch's first token -> the tokens that were sampled from this batch.
        self._sampled = {first: torch.empty(0, channels, device=device)}
        self._device = device

    def update(self, x: Tensor) -> None:
        """Add a batch x, (tokens, channels)."""
        # A copy, because a view would keep all of x in memory.
        self._sampled[self._next] = x[-self._next % self._every :: self._every].to(torch.float32, copy=True)
        self._next += x.shape[0]

    def merge(self, other: Sample) -> None:
        """Add all batches of `other`."""
        for first, tokens in other._sampled.items():
            if tokens.shape[0]:
                self._sampled[first] = tokens.to(self._device)
        self._next = max(self._next, other._next)

    @property
    def value(self) -> Tensor:
        """The sampled tokens, (tokens, channels) float32."""
        return torch.cat([self._sampled[first] for first in sorted(self._sampled)])


class WeightedMean:
    """Weighted mean of numbers, such as mean losses of batches; the sum is rounded once, so order does not matter."""

    def __init__(self) -> None:
        self._products: list[float] = []
        self._weight = 0

    def update(self, number: float, weight: int) -> None:
        """Add a number that is itself the mean over `weight` items."""
        self._products.append(number * weight)
        self._weight += weight

    def merge(self, other: WeightedMean) -> None:
        """Add all batches of `other`."""
        self._products += other._products
        self._weight += other._weight

    @property
    def value(self) -> float:
        """The weighted mean; 0 if nothing was added."""
        return math.fsum(self._products) / max(self._weight, 1)

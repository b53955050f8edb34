"""Statistics of a site's tensor, gathered while activations stream through.

Each is an accumulator: `update` with tokens, `merge` another one of its kind (from another process), read `value`.
The order of updates and merges changes a value by rounding alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, Self

import torch
from torch import Tensor

# Rows of a Gram matrix that are summed at once: narrower panels save more and multiply less efficiently.
_PANEL = 256
# Sums of products of millions of numbers between these stay inside float32.
_LEAST, _MOST = 2.0**-50, 2.0**50


class Statistic(Protocol):
    """Accumulates over tokens."""

    def update(self, x: Tensor) -> None:
        """Add tokens. x: (tokens, channels)."""

    def merge(self, other: Self) -> None:
        """Add everything that `other` has seen."""

    @property
    def value(self) -> Tensor:
        """The statistic over all tokens seen."""


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
        self.tokens = 0

    def update(self, x: Tensor, wanted: Tensor) -> None:
        """Add tokens. x: (tokens, channels), as fed now; wanted: x~, the same tokens' in the full-precision model."""
        dtype = torch.promote_types(self._sum.dtype, product_dtype(x))
        dtype = torch.promote_types(dtype, product_dtype(wanted))
        self._sum, now = self._sum.to(dtype), x.to(dtype)
        self._sum.addmm_((wanted.to(dtype) - now).T, now)
        self.tokens += x.shape[0]

    def merge(self, other: Drift) -> None:
        """See `Statistic`."""
        self._sum = self._sum + other._sum.to(self._sum.device)
        self.tokens += other.tokens

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

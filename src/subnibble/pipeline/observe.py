"""What is seen of a site's tensor before its readers are rounded: statistics, as each reader will see it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from subnibble.calibrate.stats import AbsMean, Drift, Gram
from subnibble.report.clock import Clock
from subnibble.runtime import site_input
from subnibble.runtime.precision import narrowed
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.linear import SiteInput
from subnibble.transforms.input_basis import InputBasis

# How an input is quantized: the scheme, and the number of salient channels quantized twice.
Quantization = tuple[ActivationScheme, int]
# How calibration sees an input; None if it is not quantized.
View = Quantization | None


def quantized_tokens(x: Tensor, view: Quantization, basis: InputBasis) -> Tensor:
    """What an input (..., k) stands for once it is quantized, exactly: (t, k) float32, in its own basis.

    bfloat16 would round 8-bit numbers times their scales by up to half of their step. The remainder of salient channels
    counts as if it met both their weights, of which it meets the coarse one.
    """
    scheme, repeated = view
    own = SiteInput(None, basis.order, basis.blocks, scheme, repeated)
    return basis.natural(site_input.apply(x, own).values())


def quantized_input(x: Tensor, view: Quantization, basis: InputBasis) -> Tensor:
    """The same in x's type and shape, for a block that runs in that type."""
    return narrowed(quantized_tokens(x, view, basis), x.dtype).view(x.shape)


@dataclass(frozen=True)
class Observed:
    """Statistics of a site's tensor, each None if it is not needed; see `Rounder`. sizes: (k,), mean magnitudes."""

    gram: Tensor | None = None
    drift: Tensor | None = None
    sizes: Tensor | None = None

    def seen_in(self, basis: InputBasis) -> Observed:
        """The same in another basis of the input."""
        gram, drift = (None if matrix is None else basis.both(matrix) for matrix in (self.gram, self.drift))
        return Observed(gram, drift, None if self.sizes is None else basis.columns(self.sizes.unsqueeze(0))[0])


@dataclass(frozen=True)
class Watch:
    """Gathers what `Observed` holds, of k channels: a `Statistic`. drift, sizes: None where it is not needed."""

    gram: Gram
    drift: Drift | None
    sizes: AbsMean | None

    @classmethod
    def of(cls, channels: int, device: torch.device, drift: bool, sizes: bool) -> Self:
        """One that has seen nothing."""
        return cls(
            Gram(channels, device),
            Drift(channels, device) if drift else None,
            AbsMean(channels, device) if sizes else None,
        )

    def update(self, seen: Tensor, target: Tensor | None) -> None:
        """Add tokens (t, k), and the same in the full-precision model."""
        self.gram.update(seen)
        if self.sizes is not None:
            self.sizes.update(seen)
        if self.drift is not None and target is not None:
            self.drift.update(seen, target)

    def merge(self, other: Watch) -> None:
        """See `Statistic`. other: one that needs the same."""
        self.gram.merge(other.gram)
        if self.sizes is not None and other.sizes is not None:
            self.sizes.merge(other.sizes)
        if self.drift is not None and other.drift is not None:
            self.drift.merge(other.drift)

    @property
    def value(self) -> Observed:
        """The statistics over all tokens seen."""
        drift, sizes = (None if part is None else part.value for part in (self.drift, self.sizes))
        return Observed(self.gram.value, drift, sizes)


def observe(
    tensors: Iterable[tuple[Tensor, Tensor | None]],
    views: Collection[View],
    basis: InputBasis,
    watch: Callable[[], Watch],
    clock: Clock,
) -> dict[View, Observed]:
    """Statistics of a site's tensor in each view, in one passage.

    tensors: batches (t, k) as the quantized block has them, and as the full-precision one has, or None. basis: in which
    readers meet it. watch: makes one that has seen nothing.
    """
    watches = {view: watch() for view in views}
    with clock.step("forward"):
        for x, target in tensors:
            with clock.step("gram"):
                for view, own in watches.items():
                    own.update(x if view is None else quantized_tokens(x, view, basis), target)
    return {view: own.value for view, own in watches.items()}

"""Gather statistics of a site's tensor before its readers are rounded, in the form in which each reader gets it."""

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

# How an input is quantized: (activation scheme, number of salient channels quantized twice).
Quantization = tuple[ActivationScheme, int]
# How calibration quantizes an input, or None if calibration sees it unquantized.
View = Quantization | None


def quantized_tokens(x: Tensor, view: Quantization, basis: InputBasis) -> Tensor:
    """Quantize and dequantize an input (..., k), as (tokens, k) float32.

    view: how the input is quantized.
    basis: channel order and Hadamard transform before the quantization; the result is transformed back.

    The result is float32, because bfloat16 would round an 8-bit code times its scale by up to half a quantization step.
    The second quantization of the salient channels is added in full, as if both of their weights multiplied it. The
    running model multiplies it only by their second weight.
    """
    scheme, requantized = view
    site = SiteInput(None, basis.order, basis.blocks, scheme, requantized)
    return basis.natural(site_input.apply(x, site).values())


def quantized_input(x: Tensor, view: Quantization, basis: InputBasis) -> Tensor:
    """Quantize and dequantize an input as `quantized_tokens` does, in the shape and dtype of x."""
    return narrowed(quantized_tokens(x, view, basis), x.dtype).view(x.shape)


@dataclass(frozen=True)
class Observed:
    """Statistics of a site's tensor of k channels, each None if no step needs it.

    gram: (k, k), sum of x xᵀ over tokens.
    drift: (k, k), sum of (x~ - x) xᵀ, with x~ the same token in the full-precision model.
    mean_abs: (k,), mean magnitude of each channel.
    """

    gram: Tensor | None = None
    drift: Tensor | None = None
    mean_abs: Tensor | None = None

    def in_basis(self, basis: InputBasis) -> Observed:
        """The statistics of the input transformed into `basis`."""
        gram, drift = (None if matrix is None else basis.both_to_basis(matrix) for matrix in (self.gram, self.drift))
        return Observed(gram, drift, None if self.mean_abs is None else basis.to_basis(self.mean_abs.unsqueeze(0))[0])


@dataclass(frozen=True)
class Watch:
    """Accumulates the statistics of `Observed` over k channels; a `Statistic`.

    gram: accumulator of the Gram matrix.
    drift, mean_abs: accumulators of the drift and of the mean magnitudes, None if not needed.
    """

    gram: Gram
    drift: Drift | None
    mean_abs: AbsMean | None

    @classmethod
    def of(cls, channels: int, device: torch.device, drift: bool, mean_abs: bool) -> Self:
        """Build empty accumulators. channels: k. drift, sizes: whether to gather these, too."""
        return cls(
            Gram(channels, device),
            Drift(channels, device) if drift else None,
            AbsMean(channels, device) if mean_abs else None,
        )

    def update(self, x: Tensor, target: Tensor | None) -> None:
        """Add tokens.

        x: (t, k), in the quantized model.
        target: (t, k), the same tokens in the full-precision model, or None.
        """
        self.gram.update(x)
        if self.mean_abs is not None:
            self.mean_abs.update(x)
        if self.drift is not None and target is not None:
            self.drift.update(x, target)

    def merge(self, other: Watch) -> None:
        """Add all tokens of `other`, which must gather the same statistics; see `Statistic`."""
        self.gram.merge(other.gram)
        if self.mean_abs is not None and other.mean_abs is not None:
            self.mean_abs.merge(other.mean_abs)
        if self.drift is not None and other.drift is not None:
            self.drift.merge(other.drift)

    @property
    def value(self) -> Observed:
        """The statistics over all tokens so far."""
        drift, mean_abs = (None if statistic is None else statistic.value for statistic in (self.drift, self.mean_abs))
        return Observed(self.gram.value, drift, mean_abs)


def observe(
    tensors: Iterable[tuple[Tensor, Tensor | None]],
    views: Collection[View],
    basis: InputBasis,
    watch: Callable[[], Watch],
    clock: Clock,
) -> dict[View, Observed]:
    """Gather the statistics of a site's tensor for each view, in one pass over the tokens.

    tensors: batches (t, k) of the quantized model, each with the same tokens of the full-precision model, or None.
    views: how the readers' inputs are quantized.
    basis: channel order and Hadamard transform of the readers' inputs.
    watch: builds empty accumulators.
    """
    watches = {view: watch() for view in views}
    with clock.step("forward"):
        for x, target in tensors:
            with clock.step("gram"):
                for view, statistics in watches.items():
                    statistics.update(x if view is None else quantized_tokens(x, view, basis), target)
    return {view: statistics.value for view, statistics in watches.items()}

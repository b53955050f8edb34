"""A linear of a tuned block as it will run quantized, and the input that the readers of a site share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from subnibble.calibrate.prefix import States
from subnibble.corrections.correction import Correction
from subnibble.rounding import grid
from subnibble.rounding.levels import Fitted
from subnibble.runtime import activations, site_input
from subnibble.runtime.kv_cache import CacheQuantizer
from subnibble.runtime.straight_through import straight_through
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.linear import SiteInput
from subnibble.tensor.scheme import Scheme
from subnibble.transforms.input_basis import InputBasis
from subnibble.tuning.clipping import Clipping
from subnibble.tuning.input_clip import bound_, can_clip, clipped, with_share
from subnibble.tuning.low_rank import Compensation
from subnibble.tuning.smoothing import Smoothing
from subnibble.tuning.tuning import Tuning


@dataclass(frozen=True)
class BlockContext:
    """Everything around a block's learned parameters that tuning does not change.

    schemes: linear name -> weight scheme, None if the weight is not quantized.
    activations: linear name -> activation scheme, None if the input is not quantized.
    bases: site name -> input basis (channel order and online transform).
    cache_quantizer: how keys and values are quantized, None for 16 bits.
    prefix: keys and values of the prompt prefix in this block, or None.
    correction: the linears' terms besides the main quantized matrix.
    clip: how the initial weight ranges are chosen.
    dtype: compute dtype of matrix products.
    """

    schemes: Mapping[str, Scheme | None]
    activations: Mapping[str, ActivationScheme | None]
    bases: Mapping[str, InputBasis]
    cache_quantizer: CacheQuantizer | None
    prefix: States | None
    correction: Correction
    clip: grid.Clip
    dtype: torch.dtype


class TunedInput:
    """The input of a site as its readers share it: smoothing, basis, and the quantized input for each scheme.

    basis: channel order and online transform of the site.
    dtype: compute dtype of the result.
    requantized: number of first channels that are quantized twice, see `SiteInput`.
    smoothing (attribute): the site's smoothing, or None.
    clip (attribute): scalar, relative change of the activation clip, or None if it is not learned.
    """

    def __init__(self, basis: InputBasis, dtype: torch.dtype, requantized: int = 0) -> None:
        self.basis, self._dtype = basis, dtype
        self._site = SiteInput(gather=basis.order, blocks=basis.blocks, requantized=requantized)
        self.smoothing: Smoothing | None = None
        self.clip: nn.Parameter | None = None
        self._schemes: list[ActivationScheme] = []
        self._x: Tensor | None = None
        self._entered: dict[ActivationScheme | None, Tensor] = {}

    def learn_clip(self, schemes: set[ActivationScheme | None], device: torch.device) -> None:
        """Make the activation clip learnable if one of the readers' `schemes` has a clip."""
        self._schemes = [scheme for scheme in schemes if scheme is not None and can_clip(scheme)]
        if self._schemes:
            self.clip = nn.Parameter(torch.zeros((), device=device))

    def learned(self, scheme: ActivationScheme | None) -> ActivationScheme | None:
        """A reader's activation scheme with the learned clip; None if its input is not quantized."""
        if scheme is None or self.clip is None or not can_clip(scheme):
            return scheme
        return with_share(scheme, self.clip.detach())

    def bound_(self) -> None:
        """Clamp the learned clip to its valid range."""
        if self.clip is not None:
            for scheme in self._schemes:
                bound_(self.clip, scheme)

    def forget(self) -> None:
        """Drop the cached input."""
        self._x, self._entered = None, {}

    def enter(self, x: Tensor, scheme: ActivationScheme | None) -> Tensor:
        """Smooth, transform and quantize x (..., k); returns (..., k), or (..., k + repeated) if it is quantized.

        The last `requantized` columns are the remainder of the channels that are quantized twice. All readers pass the
        same tensor, and it is quantized once per scheme.
        """
        if self._x is not x:
            self._x, self._entered = x, {}
        if scheme not in self._entered:
            tokens = x.flatten(0, -2).float()
            if self.smoothing is not None:
                tokens = self.smoothing.inputs(tokens)
            tokens = site_input.enter(tokens, self._site)
            if scheme is not None:
                tokens = self._quantized(tokens, scheme)
            self._entered[scheme] = tokens.to(self._dtype).view(*x.shape[:-1], -1)
        return self._entered[scheme]

    def _quantized(self, x: Tensor, scheme: ActivationScheme) -> Tensor:
        """Quantize and dequantize tokens (t, k), append the quantized remainder: (t, k + repeated)."""
        # The values equal those of `site_input.apply` (tested); here gradients also reach the tokens and the clip.
        values, requantized = self._once(x, scheme), self._site.requantized
        if not requantized:
            return values
        remainder = x[:, :requantized] - values[:, :requantized]
        return torch.cat([values, self._once(remainder, scheme)], 1)

    def _once(self, x: Tensor, scheme: ActivationScheme) -> Tensor:
        if self.clip is not None and can_clip(scheme):
            return clipped(x, self.clip, scheme)
        return straight_through(x, activations.quantize_values(x.detach(), scheme))


class TunedLinear(nn.Module):
    """A linear of a tuned block as it will run quantized.

    linear: the float32 linear, (m, k).
    entrance: the site's input, shared with the other readers.
    context: schemes, bases and corrections of the block.
    name: the linear's name in the block.
    tuning: what is learned.
    generator: draws the initial low-rank factors.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        entrance: TunedInput,
        context: BlockContext,
        name: str,
        tuning: Tuning,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().clone())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self._entrance, self._context = (entrance,), context
        self._scheme, self._activation = context.schemes[name], context.activations[name]
        # The second weight also multiplies the remainder of these first channels (see `SiteInput`).
        self._repeated = 0 if None in (self._scheme, self._activation) else context.correction.requantized
        self.fixed: Tensor | None = None
        self.clipping: Clipping | None = None
        self.low_rank: Compensation | None = None
        if self._scheme is None:
            return
        main, _ = self._split(entrance.basis.to_basis(linear.weight.detach()))
        self.clipping = Clipping(main, self._scheme, context.clip)
        if tuning.low_rank != "none":
            rows, columns = linear.weight.shape
            device = linear.weight.device
            self.low_rank = Compensation(rows, columns, tuning.rank, generator, device)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., k) to (..., m), in the compute dtype."""
        entered = self._entrance[0].enter(x, self._activation)[..., : self.weight.shape[1] + self._repeated]
        dtype = self._context.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.linear(entered, self._rounded().to(dtype), bias)

    @property
    def activation(self) -> ActivationScheme | None:
        """Activation scheme with the learned clip; None if the input is not quantized."""
        return self._entrance[0].learned(self._activation)

    def fitted(self) -> list[Fitted]:
        """The learned grid of each group."""
        assert self.clipping is not None
        with torch.no_grad():
            main, _ = self._split(self._exact())
            return self.clipping.fitted(main)

    def factors(self, smoothing: Smoothing) -> Tensor:
        """Smoothing factors (k,) of the weight's columns; without slack if the weight is not quantized."""
        return smoothing.wide() if self._scheme is None else smoothing.of_weights()

    def fix_(self, weight: Tensor, salient_weight: Tensor | None = None) -> None:
        """Use a given weight, which was rounded elsewhere, instead of the learned one.

        weight: (m, k), dequantized, in the input basis.
        salient_weight: (m, r), the part of it that the salient columns' second weight holds, or None.
        """
        self.fixed = weight if salient_weight is None else self._with_salient(weight, salient_weight)

    def _exact(self) -> Tensor:
        """The weight (m, k) before rounding: smoothed, with its low-rank term, in the input basis."""
        weight, smoothing = self.weight, self._entrance[0].smoothing
        if smoothing is not None:
            weight = weight * self.factors(smoothing)
        if self.low_rank is not None:
            weight = weight + self.low_rank.product()
        return self._entrance[0].basis.to_basis(weight)

    def _rounded(self) -> Tensor:
        """The weight that `enter`'s result is multiplied by: (m, k), or (m, k + repeated) with the second weight."""
        if self.fixed is not None:
            return self.fixed
        weight = self._exact()
        if self.clipping is None or self._scheme is None:
            return weight
        on_grids, salient_weight = self._split(weight)
        main: Tensor = self.clipping(on_grids)
        if salient_weight is not None:
            return self._with_salient(main + salient_weight, salient_weight)
        outliers = self._context.correction.outlier_weight(weight.detach(), self._scheme)
        if outliers is None:
            return main
        return torch.cat([main, straight_through(weight[:, main.shape[1] :], outliers)], 1)

    def _with_salient(self, weight: Tensor, salient_weight: Tensor) -> Tensor:
        """Append to a weight (m, k) the second weight's columns of the channels that are quantized twice.

        salient_weight: (m, r or more), the salient columns' second weight. Returns (m, k + repeated).
        """
        return torch.cat([weight, salient_weight[:, : self._repeated]], 1) if self._repeated else weight

    def _split(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split a weight (m, k) into the part on learned grids and the salient columns' second weight.

        The second weight has no gradient and is padded with zeros to (m, k); None without salient columns. Without
        them, outlier columns are left out of the first part.
        """
        correction, columns = self._context.correction, weight.shape[1]
        salient = None if self._scheme is None else correction.salient_weight(weight.detach(), self._scheme)
        if salient is None:
            return weight[:, : columns - correction.outliers], None
        salient_weight = nn.functional.pad(salient, (0, columns - salient.shape[1]))
        return weight - salient_weight, salient_weight

"""A linear of a tuned block as it will run, and what the readers of a site share of its input."""

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
from subnibble.runtime.kv_cache import Coding
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
class Frame:
    """What a block is tuned within. schemes, activations: of its linears, None for not at all. bases: of its sites.

    coding: of keys and values, None for 16 bits. prefix: its states in this block, or None. correction: what linears
    have besides the codes of one grid. clip: how ranges of weights are chosen where nothing is learned yet.
    dtype: that products are computed in.
    """

    schemes: Mapping[str, Scheme | None]
    activations: Mapping[str, ActivationScheme | None]
    bases: Mapping[str, InputBasis]
    coding: Coding | None
    prefix: States | None
    correction: Correction
    clip: grid.Clip
    dtype: torch.dtype


class TunedInput:
    """What readers of a site share: factors, basis, and the input as each activation scheme leaves it.

    smoothing: its factors, None without. clip: by what share of it the inputs' clip is moved, None where it stays.
    repeated: see `SiteInput`.
    """

    def __init__(self, basis: InputBasis, dtype: torch.dtype, repeated: int = 0) -> None:
        self.basis, self._dtype = basis, dtype
        self._site = SiteInput(gather=basis.order, blocks=basis.blocks, repeated=repeated)
        self.smoothing: Smoothing | None = None
        self.clip: nn.Parameter | None = None
        self._schemes: list[ActivationScheme] = []
        self._x: Tensor | None = None
        self._entered: dict[ActivationScheme | None, Tensor] = {}

    def learn_clip(self, schemes: set[ActivationScheme | None], device: torch.device) -> None:
        """Let the clip of inputs be learned, where one of the readers' schemes has one."""
        self._schemes = [scheme for scheme in schemes if scheme is not None and can_clip(scheme)]
        if self._schemes:
            self.clip = nn.Parameter(torch.zeros((), device=device))

    def learned(self, scheme: ActivationScheme | None) -> ActivationScheme | None:
        """A reader's scheme with the clip as learned."""
        if scheme is None or self.clip is None or not can_clip(scheme):
            return scheme
        return with_share(scheme, self.clip.detach())

    def bound_(self) -> None:
        """Bring the clip back into its range."""
        if self.clip is not None:
            for scheme in self._schemes:
                bound_(self.clip, scheme)

    def forget(self) -> None:
        """Forget the last input."""
        self._x, self._entered = None, {}

    def enter(self, x: Tensor, scheme: ActivationScheme | None) -> Tensor:
        """X (..., k) as a reader multiplies it, repeated channels' remainder behind, if it is quantized.

        All readers hand over the same tensor; it is quantized once.
        """
        if self._x is not x:
            self._x, self._entered = x, {}
        if scheme not in self._entered:
            own = x.flatten(0, -2).float()
            if self.smoothing is not None:
                own = self.smoothing.inputs(own)
            own = site_input.enter(own, self._site)
            if scheme is not None:
                own = self._quantized(own, scheme)
            self._entered[scheme] = own.to(self._dtype).view(*x.shape[:-1], -1)
        return self._entered[scheme]

    def _quantized(self, x: Tensor, scheme: ActivationScheme) -> Tensor:
        """What tokens (t, k) become: (t, k + repeated)."""
        # The numbers are those of `site_input.apply`, as a test says. Here gradients reach the tokens and the clip.
        values, repeated = self._once(x, scheme), self._site.repeated
        if not repeated:
            return values
        remainder = x[:, :repeated] - values[:, :repeated]
        return torch.cat([values, self._once(remainder, scheme)], 1)

    def _once(self, x: Tensor, scheme: ActivationScheme) -> Tensor:
        if self.clip is not None and can_clip(scheme):
            return clipped(x, self.clip, scheme)
        return straight_through(x, activations.quantize_values(x.detach(), scheme))


class TunedLinear(nn.Module):
    """A linear as it will run."""

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        entrance: TunedInput,
        frame: Frame,
        name: str,
        tuning: Tuning,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().clone())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self._entrance, self._frame = (entrance,), frame
        self._scheme, self._activation = frame.schemes[name], frame.activations[name]
        # Of which the remainder meets the second weight, as it runs (see `SiteInput`).
        self._repeated = 0 if None in (self._scheme, self._activation) else frame.correction.repeated
        self.fixed: Tensor | None = None
        self.clipping: Clipping | None = None
        self.low_rank: Compensation | None = None
        if self._scheme is None:
            return
        main, _ = self._split(entrance.basis.columns(linear.weight.detach()))
        self.clipping = Clipping(main, self._scheme, frame.clip)
        if tuning.low_rank != "none":
            rows, columns = linear.weight.shape
            device = linear.weight.device
            self.low_rank = Compensation(rows, columns, tuning.rank, generator, device)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., k) to (..., m)."""
        entered = self._entrance[0].enter(x, self._activation)[..., : self.weight.shape[1] + self._repeated]
        dtype = self._frame.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.linear(entered, self._rounded().to(dtype), bias)

    def fitted(self) -> list[Fitted]:
        """The learned grids of its groups."""
        assert self.clipping is not None
        with torch.no_grad():
            main, _ = self._split(self._exact())
            return self.clipping.fitted(main)

    def factors(self, smoothing: Smoothing) -> Tensor:
        """By which columns are multiplied; a linear that is not quantized keeps the function."""
        return smoothing.wide() if self._scheme is None else smoothing.of_weights()

    def _exact(self) -> Tensor:
        """The weight before it is rounded, in its basis."""
        weight, smoothing = self.weight, self._entrance[0].smoothing
        if smoothing is not None:
            weight = weight * self.factors(smoothing)
        if self.low_rank is not None:
            weight = weight + self.low_rank.product()
        return self._entrance[0].basis.columns(weight)

    def _rounded(self) -> Tensor:
        """The weight as inputs meet it, (m, k), and the second weight of those that are repeated."""
        if self.fixed is not None:
            return self.fixed
        weight = self._exact()
        if self.clipping is None or self._scheme is None:
            return weight
        left, second = self._split(weight)
        main: Tensor = self.clipping(left)
        if second is not None:
            return self.with_second(main + second, second)
        last = self._frame.correction.last(weight.detach(), self._scheme)
        if last is None:
            return main
        return torch.cat([main, straight_through(weight[:, main.shape[1] :], last)], 1)

    def with_second(self, weight: Tensor, second: Tensor) -> Tensor:
        """A weight (m, k), and behind it the second weight, (m, r or more), of the inputs that are repeated."""
        return torch.cat([weight, second[:, : self._repeated]], 1) if self._repeated else weight

    def _split(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """What learned ranges hold of a weight (m, k), and the salient columns' second weight, of no gradient and with
        zeros behind: (m, k), or None without.
        """
        correction, columns = self._frame.correction, weight.shape[1]
        coarse = None if self._scheme is None else correction.second(weight.detach(), self._scheme)
        if coarse is None:
            return weight[:, : columns - correction.outliers], None
        second = nn.functional.pad(coarse, (0, columns - coarse.shape[1]))
        return weight - second, second

"""The base class of corrections: terms of a linear that compensate for rounding error, beside the main weight's codes.

`Correction` itself adds nothing; each subclass has its own file and overrides what it changes. With its input x in the
order of `transforms/input_basis.py`, a linear W (m, k) becomes

    main x  +  second x_first  +  last x_last  +  up (down x)

A correction adds one of: a second weight for the first (salient) channels; separate codes for the last (outlier)
channels; low-rank factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from subnibble.checkpoint.module_specs import PackedLinearSpec
from subnibble.errors import NumericalFailure
from subnibble.rounding.rounder import Rounder, Rounding
from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.packed import PackedRange, PackedTensor
from subnibble.tensor.scheme import Scheme

# The packed factors of a low-rank branch, down (r, k) and up (m, r).
Branch = tuple[PackedTensor, PackedTensor]
# A rounded weight: the rounder's result, the packed weight, and the second weight of the first columns, if any.
Rounded = tuple[Rounding, PackedTensor, PackedRange | None]


@dataclass(frozen=True)
class RoundMain:
    """Rounds the main matrix of a linear: what a correction does not handle itself.

    rounder: does the rounding.
    scheme, where, drift: as in `Rounder.__call__`.
    """

    rounder: Rounder
    scheme: Scheme
    where: str
    drift: Tensor | None = None

    @property
    def needs_gram(self) -> bool:
        """Whether the rounder needs the Gram matrix of the inputs."""
        return self.rounder.needs_gram

    def __call__(self, weight: Tensor, gram: Tensor | None) -> Rounding:
        """Round a main matrix.

        weight: (m, j) float32.
        gram: (j, j), the Gram matrix of its inputs, or None if not needed.
        Raises `NumericalFailure` that names the linears, even if the rounder's error does not.
        """
        try:
            return self.rounder(weight, gram, self.scheme, self.where, self.drift)
        except NumericalFailure as error:
            if str(error).startswith(self.where):
                raise
            raise NumericalFailure(f"{self.where}: {error}") from error


@dataclass(frozen=True)
class Correction:
    """Additional terms of a linear besides its codes; this base class adds none.

    needs_data: whether it needs calibration text.
    needs_mean_abs: whether it needs the mean magnitudes of the inputs on that text.
    """

    needs_data: ClassVar[bool] = False
    needs_mean_abs: ClassVar[bool] = False

    @property
    def salient(self) -> int:
        """Number of first columns that get a second weight."""
        return 0

    @property
    def outliers(self) -> int:
        """Number of last columns that get separate codes."""
        return 0

    @property
    def requantized(self) -> int:
        """Number of first channels whose inputs are quantized twice; see `SiteInput`."""
        return 0

    def check(self, columns: int, scheme: Scheme, where: str) -> None:
        """Raise `BadRecipe` if it does not fit a linear.

        columns: number of inputs of the linear.
        scheme: of the main weight.
        where: the linear, for the message.
        """

    def check_tuned(self) -> None:
        """Raise `BadRecipe` if it cannot be combined with tuning of blocks."""

    def schemes(self, weight: Scheme) -> tuple[Scheme, ...]:
        """The schemes of the weights it adds. weight: scheme of the main weight."""
        return ()

    def inputs(self, scheme: ActivationScheme) -> ActivationScheme:
        """The activation scheme of a linear with this correction. scheme: the same without the correction."""
        return scheme

    def planned(self, spec: PackedLinearSpec, weight: Scheme) -> PackedLinearSpec:
        """Add the weights of this correction to the spec of a linear, from shapes alone.

        spec: the linear without the correction.
        weight: scheme of the main weight.
        """
        return spec

    def round(self, weight: Tensor, gram: Tensor | None, scheme: Scheme, round_main: RoundMain) -> Rounded:
        """Round a weight, and the parts of it that the correction handles.

        weight: (m, k) float32.
        gram: (k, k), sum of x xᵀ over its inputs, or None without calibration.
        scheme: of the main weight.
        round_main: rounds the main weight.
        """
        rounding = round_main(weight, gram)
        return rounding, PackedTensor((PackedRange.pack(rounding.quantized, scheme),)), None

    def branches(
        self, errors: Sequence[Tensor], gram: Tensor | None, mean_abs: Tensor | None, scheme: Scheme
    ) -> list[Branch | None]:
        """Packed low-rank factors of the rounding error, for each of the linears that read one input, or None.

        errors: weight minus dequantized weight of each linear, (m, k).
        gram: (k, k), sum of x xᵀ over the input, or None if not known.
        mean_abs: (k,), mean |x|, or None if not known.
        scheme: of the main weight.
        """
        return [None] * len(errors)

    def salient_weight(self, weight: Tensor, scheme: Scheme) -> Tensor | None:
        """The second weight (m, salient) of `weight` (m, k), dequantized; None if there is none."""
        return None

    def outlier_weight(self, weight: Tensor, scheme: Scheme) -> Tensor | None:
        """The last columns of `weight` (m, k), rounded separately and dequantized: (m, outliers), or None."""
        return None


NOTHING = Correction()

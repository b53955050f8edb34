"""What makes up for rounding error besides codes: the words in which the pipeline asks a correction.

`Correction` is the one that does nothing; each other one overrides what it does differently, in a file of its own. A
linear W (m, k) whose input x has been put in the order of `transforms/input_basis.py` becomes

    main x  +  second x_first  +  last x_last  +  up (down x)

of which a correction may have the second weight of the first (salient) channels, codes of their own for the last
(outlier) channels, or low-rank factors.
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
# How a weight was rounded, packed, and the second weight of its first columns.
Rounded = tuple[Rounding, PackedTensor, PackedRange | None]


@dataclass(frozen=True)
class RoundMain:
    """Rounds what a correction leaves to the codes. scheme, where, drift: see `Rounder`."""

    rounder: Rounder
    scheme: Scheme
    where: str
    drift: Tensor | None = None

    @property
    def needs_gram(self) -> bool:
        """See `Rounder`."""
        return self.rounder.needs_gram

    def __call__(self, weight: Tensor, gram: Tensor | None) -> Rounding:
        """Round a main matrix (m, j), whose inputs have the Gram matrix `gram` (j, j).

        A failure that does not name its linears gets their names.
        """
        try:
            return self.rounder(weight, gram, self.scheme, self.where, self.drift)
        except NumericalFailure as error:
            if str(error).startswith(self.where):
                raise
            raise NumericalFailure(f"{self.where}: {error}") from error


@dataclass(frozen=True)
class Correction:
    """needs_data, needs_sizes: whether it needs calibration text, and of it the mean magnitudes of inputs."""

    needs_data: ClassVar[bool] = False
    needs_sizes: ClassVar[bool] = False

    @property
    def salient(self) -> int:
        """First columns that get a second weight."""
        return 0

    @property
    def outliers(self) -> int:
        """Last columns that get codes of their own."""
        return 0

    @property
    def repeated(self) -> int:
        """First channels whose inputs are quantized twice; see `SiteInput`."""
        return 0

    def check(self, columns: int, scheme: Scheme, where: str) -> None:
        """Raise `BadRecipe` if it does not fit the linear `where` of `columns` inputs."""

    def check_tuned(self) -> None:
        """Raise `BadRecipe` if blocks cannot be tuned with it."""

    def schemes(self, weight: Scheme) -> tuple[Scheme, ...]:
        """How what it adds is coded, beside a weight coded by `weight`."""
        return ()

    def inputs(self, scheme: ActivationScheme) -> ActivationScheme:
        """How inputs are coded that would be coded by `scheme`."""
        return scheme

    def planned(self, spec: PackedLinearSpec, weight: Scheme) -> PackedLinearSpec:
        """The spec of a linear with what it adds, known from shapes alone. weight: codes all that `spec` has so far."""
        return spec

    def round(self, weight: Tensor, gram: Tensor | None, scheme: Scheme, round_main: RoundMain) -> Rounded:
        """Round a weight (m, k) float32. gram: (k, k), sum of x xᵀ over its inputs, None without calibration."""
        rounding = round_main(weight, gram)
        return rounding, PackedTensor((PackedRange.pack(rounding.quantized, scheme),)), None

    def branches(
        self, errors: Sequence[Tensor], gram: Tensor | None, sizes: Tensor | None, scheme: Scheme
    ) -> list[Branch | None]:
        """Low-rank factors for what rounding left of each linear that reads one input, (m, k); None for none.

        gram: (k, k), sum of x xᵀ. sizes: (k,), mean |x|.
        """
        return [None] * len(errors)

    def second(self, weight: Tensor, scheme: Scheme) -> Tensor | None:
        """The second weight (m, salient) that a weight (m, k) gets before the rest of it is rounded; None for none."""
        return None

    def last(self, weight: Tensor, scheme: Scheme) -> Tensor | None:
        """What the last columns of a weight (m, k) become on their own, (m, outliers); None for none."""
        return None


NOTHING = Correction()

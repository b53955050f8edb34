"""A linear of a packed model as two values: the steps on its input, and the weight that multiplies the result.

Linears that read the same tensor share the steps; `runtime/site_input.py` applies them and `runtime/ops.py` multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.packed import PackedTensor


@dataclass(frozen=True)
class SiteInput:
    """Steps on a tensor of k channels before it is multiplied, in this order.

    column_scale: (k,), multiplies the tensor; or None.
    gather: (k,) integers: channel gather[j] becomes channel j; or None.
    blocks: block widths of a block-diagonal Hadamard transform, () for none.
    activation: how the tensor is quantized, None if it is not.
    requantized: number of first (salient) channels that are quantized twice: the error of the first quantization is
        itself quantized. 0 for none.
    """

    column_scale: Tensor | None = None
    gather: Tensor | None = None
    blocks: tuple[int, ...] = ()
    activation: ActivationScheme | None = None
    requantized: int = 0

    @property
    def moves_nothing(self) -> bool:
        """Whether there is no step before quantization."""
        return self.column_scale is None and self.gather is None and not self.blocks

    @property
    def is_plain(self) -> bool:
        """Whether there is no step at all."""
        return self.moves_nothing and self.activation is None

    def same_as(self, other: SiteInput) -> bool:
        """Whether both have the same steps, with equal values."""
        if (self.blocks, self.activation, self.requantized) != (other.blocks, other.activation, other.requantized):
            return False
        pairs = ((self.gather, other.gather), (self.column_scale, other.column_scale))
        return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


@dataclass(frozen=True)
class PackedWeight:
    """A packed weight (m, k) and its additional terms.

    main: (m, k).
    bias: (m,), or None.
    salient: (m, r), a second weight of the first r channels (SERQ's extra K columns), or None. It also multiplies the
        quantized error of channels that are quantized twice.
    low_rank: down (q, k) and up (m, q), or None: a branch `up · Q(down · x)` on the quantized input.
    """

    main: PackedTensor
    bias: Tensor | None = None
    salient: PackedTensor | None = None
    low_rank: tuple[PackedTensor, PackedTensor] | None = None

    def rows(self, index: Tensor) -> PackedWeight:
        """Select the outputs at `index` (1-D integer tensor), still packed."""
        return PackedWeight(
            self.main.rows(index),
            None if self.bias is None else self.bias[index],
            None if self.salient is None else self.salient.rows(index),
            None if self.low_rank is None else (self.low_rank[0], self.low_rank[1].rows(index)),
        )


@dataclass(frozen=True)
class Linear:
    """A complete linear of a running model: its weight, and the steps on its input."""

    weight: PackedWeight
    input: SiteInput = field(default_factory=SiteInput)

"""A linear of a packed model as two values: what happens to its input, and the weight that the input meets.

Readers of one tensor share the first; `runtime/site_input.py` applies it and `runtime/ops.py` multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from subnibble.tensor.activation_scheme import ActivationScheme
from subnibble.tensor.packed import PackedTensor


@dataclass(frozen=True)
class SiteInput:
    """What happens to a tensor of k channels before it is multiplied, in this order.

    column_scale: (k,), multiplies it, or None.
    gather: (k,) integers, channel gather[j] becomes channel j, or None.
    blocks: widths of a block-diagonal Hadamard transform, () for none.
    activation: how it is quantized, None for not at all.
    repeated: number of first (salient) channels that are quantized twice: what the first time left of them is quantized
    once more. 0 for none.
    """

    column_scale: Tensor | None = None
    gather: Tensor | None = None
    blocks: tuple[int, ...] = ()
    activation: ActivationScheme | None = None
    repeated: int = 0

    @property
    def moves_nothing(self) -> bool:
        """Whether channels stay as they are until they are quantized."""
        return self.column_scale is None and self.gather is None and not self.blocks

    @property
    def is_plain(self) -> bool:
        """Whether a tensor enters as it comes."""
        return self.moves_nothing and self.activation is None

    def same_as(self, other: SiteInput) -> bool:
        """Whether both do the same to a tensor."""
        if (self.blocks, self.activation, self.repeated) != (other.blocks, other.activation, other.repeated):
            return False
        pairs = ((self.gather, other.gather), (self.column_scale, other.column_scale))
        return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


@dataclass(frozen=True)
class PackedWeight:
    """A weight (m, k) that is stored packed.

    main: (m, k).
    bias: (m,), or None.
    salient: (m, r), a second weight of the first r channels (SERQ's extra K columns), or None. What is left of channels
    that are quantized twice meets it, too.
    low_rank: down (q, k) and up (m, q), or None: a branch `up · Q(down · x)` on the quantized input.
    """

    main: PackedTensor
    bias: Tensor | None = None
    salient: PackedTensor | None = None
    low_rank: tuple[PackedTensor, PackedTensor] | None = None

    def rows(self, index: Tensor) -> PackedWeight:
        """The outputs at `index` (1-D integer tensor), still packed."""
        return PackedWeight(
            self.main.rows(index),
            None if self.bias is None else self.bias[index],
            None if self.salient is None else self.salient.rows(index),
            None if self.low_rank is None else (self.low_rank[0], self.low_rank[1].rows(index)),
        )


@dataclass(frozen=True)
class Linear:
    """All that a running linear contains."""

    weight: PackedWeight
    input: SiteInput = field(default_factory=SiteInput)

"""How a tensor enters the linears that read it: scaled, gathered, transformed, quantized, in this order.

docs/format.md specifies it. One function carries it out, for the running model, for calibration and for distillation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.runtime import activations
from subnibble.runtime.activations import Quantized
from subnibble.runtime.precision import as_written, narrowed
from subnibble.tensor import hadamard
from subnibble.tensor.activation_scheme import ActivationScheme


@dataclass(frozen=True)
class Entered:
    """A tensor as linears multiply it.

    tokens: (t, k) in its own type where it is not quantized, else None. quantized: as whole numbers, or None.
    rest: what is left of the first channels, where they are quantized twice, or None.
    """

    tokens: Tensor | None
    quantized: Quantized | None = None
    rest: Quantized | None = None

    def values(self) -> Tensor:
        """What the numbers stand for, the rest added: (t, k) float32."""
        if self.quantized is None:
            assert self.tokens is not None
            return self.tokens.float()
        values = self.quantized.values()
        if self.rest is not None:
            values[:, : self.rest.numbers.shape[1]] += self.rest.values()
        return values


@dataclass(frozen=True)
class SiteInput:
    """What is done to a tensor of k channels before it is multiplied.

    column_scale: (k,) that multiplies it, or None. gather: (k,) integers, channel gather[j] becomes channel j, or None.
    blocks: widths of a block-diagonal Hadamard transform, () for none. activation: how it is quantized, None for not at
    all. repeated: of so many first channels, what is left is quantized once more; 0 for none.
    """

    column_scale: Tensor | None = None
    gather: Tensor | None = None
    blocks: tuple[int, ...] = ()
    activation: ActivationScheme | None = None
    repeated: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether a tensor enters as it comes."""
        return self.column_scale is None and self.gather is None and not self.blocks and self.activation is None

    def same_as(self, other: SiteInput) -> bool:
        """Whether both do the same to a tensor."""
        if (self.blocks, self.activation, self.repeated) != (other.blocks, other.activation, other.repeated):
            return False
        pairs = ((self.gather, other.gather), (self.column_scale, other.column_scale))
        return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)

    def enter(self, x: Tensor) -> Tensor:
        """The steps before quantization. x: (..., k); computed in float32 or better and rounded to x's type once."""
        if self.column_scale is None and self.gather is None and not self.blocks:
            return x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.column_scale is not None:
            wide = wide * self.column_scale.to(wide.dtype)
        if self.gather is not None:
            wide = wide[..., self.gather.long()]
        if self.blocks:
            with as_written(x.device):
                wide = hadamard.multiply(wide, self.blocks)
        return narrowed(wide, x.dtype)

    def apply(self, x: Tensor) -> Entered:
        """All steps. x: (..., k)."""
        tokens = self.enter(x).reshape(-1, x.shape[-1])
        if self.activation is None:
            return Entered(tokens)
        with as_written(x.device):
            quantized, rest = activations.quantize(tokens, self.activation), None
            if self.repeated:
                left = tokens[:, : self.repeated].float() - quantized.values()[:, : self.repeated]
                rest = activations.quantize(left, self.activation)
        return Entered(None, quantized, rest)

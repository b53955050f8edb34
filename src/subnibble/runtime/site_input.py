"""How a tensor enters the linears that read it: scaled, gathered, transformed, quantized, in this order.

docs/format.md specifies it. One function carries it out, for the running model, for calibration, tuning and
distillation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subnibble.runtime import activations
from subnibble.runtime.activations import Quantized
from subnibble.runtime.precision import as_written, narrowed
from subnibble.tensor import hadamard
from subnibble.tensor.linear import SiteInput


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


def enter(x: Tensor, site: SiteInput) -> Tensor:
    """The steps before quantization. x: (..., k); computed in float32 or better and rounded to x's type once."""
    if site.moves_nothing:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if site.column_scale is not None:
        wide = wide * site.column_scale.to(wide.dtype)
    if site.gather is not None:
        wide = wide[..., site.gather.long()]
    if site.blocks:
        with as_written(x.device):
            wide = hadamard.multiply(wide, site.blocks)
    return narrowed(wide, x.dtype)


def apply(x: Tensor, site: SiteInput) -> Entered:
    """All steps. x: (..., k)."""
    tokens = enter(x, site).reshape(-1, x.shape[-1])
    if site.activation is None:
        return Entered(tokens)
    with as_written(x.device):
        quantized, rest = activations.quantize(tokens, site.activation), None
        if site.repeated:
            left = tokens[:, : site.repeated].float() - quantized.values()[:, : site.repeated]
            rest = activations.quantize(left, site.activation)
    return Entered(None, quantized, rest)

"""Prepare a tensor for the linears that read it: scale, gather, transform, quantize, in this order.

docs/format.md specifies the steps. The running model, calibration, tuning and distillation all use these functions.
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
class PreparedInput:
    """A tensor in the form that linears multiply: after all steps of a `SiteInput`.

    tokens: (t, k) in the input's dtype if it is not quantized, else None.
    quantized: (t, k) as whole numbers, or None.
    rest: if the first channels are quantized twice, the quantization error of the first time, quantized; else None.
    """

    tokens: Tensor | None
    quantized: Quantized | None = None
    rest: Quantized | None = None

    def values(self) -> Tensor:
        """Dequantize, `rest` included: (t, k) float32."""
        if self.quantized is None:
            assert self.tokens is not None
            return self.tokens.float()
        values = self.quantized.values()
        if self.rest is not None:
            values[:, : self.rest.numbers.shape[1]] += self.rest.values()
        return values


def enter(x: Tensor, site: SiteInput) -> Tensor:
    """Apply the steps before quantization. x: (..., k); computed in float32 or better and rounded to x's dtype once."""
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


def apply(x: Tensor, site: SiteInput) -> PreparedInput:
    """Apply all steps, quantization included. x: (..., k)."""
    tokens = enter(x, site).reshape(-1, x.shape[-1])
    if site.activation is None:
        return PreparedInput(tokens)
    with as_written(x.device):
        quantized, rest = activations.quantize(tokens, site.activation), None
        if site.requantized:
            error = tokens[:, : site.requantized].float() - quantized.values()[:, : site.requantized]
            rest = activations.quantize(error, site.activation)
    return PreparedInput(None, quantized, rest)

"""Our own packed linears, as `runtime.ops.linear` multiplies them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peers.product import Calls, Method, Tolerance, Weight

if TYPE_CHECKING:
    from subnibble.tensor.activation_scheme import ActivationScheme

GROUP = 128
BITS = (2, 3, 4, 8)
# Bits of inputs that are not quantized: float32 and bfloat16. Kernels make them fixed point of as many bits.
FLOAT32, BFLOAT16 = 24, 16


def methods(inputs: int = FLOAT32, isa: str | None = None) -> list[Method]:
    """Weights of groups of 128 (the last one ragged) with integer zero-points.

    inputs: bits of an input: 24 for float32, 16 for bfloat16; 8 or 4 for symmetric numbers in the same groups.
    isa: the instruction set, if not the fastest one; its name becomes part of the methods' names.
    """
    end = f"a{inputs}" + ("" if isa is None else f" {isa}")
    return [Method(f"subnibble w{bits}{end}", bits, _maker(bits, inputs, isa)) for bits in BITS]


@dataclass
class _Linears(Calls):
    """Linears whose inputs are quantized: their product is that of the dequantized tokens."""

    activation: ActivationScheme | None = None
    narrow: torch.dtype | None = None

    def inputs(self, x: Tensor) -> Tensor:
        """Quantize and dequantize tokens, as the reference does."""
        from subnibble.runtime.activations import quantize_values

        exact = x if self.narrow is None else x.to(self.narrow).float()
        return exact if self.activation is None else quantize_values(exact, self.activation)


def _maker(bits: int, inputs: int, isa: str | None) -> Callable[[Tensor, Callable[[float], int]], Weight]:
    def make(weight: Tensor, copies: Callable[[float], int]) -> Weight:
        from subnibble.kernels import native
        from subnibble.rounding.grid import Clip, quantized
        from subnibble.runtime import ops
        from subnibble.tensor.activation_scheme import ActivationScheme
        from subnibble.tensor.linear import Linear, PackedWeight, SiteInput
        from subnibble.tensor.packed import PackedRange, PackedTensor
        from subnibble.tensor.scheme import Scheme

        scheme = Scheme(bits, GROUP)
        packed = PackedTensor((PackedRange.pack(quantized(weight, scheme, Clip("minmax")), scheme),))
        read = sum(8 * tensor.nbytes for tensor in packed.state().values()) / weight.numel()
        activation = None if inputs in (FLOAT32, BFLOAT16) else ActivationScheme(inputs, GROUP, "none")
        narrow = torch.bfloat16 if inputs == BFLOAT16 else None
        tolerance = Tolerance() if narrow is None else Tolerance(inputs=2.0**-9, output=2.0**-9)

        def copied() -> Linear:
            state = {name: tensor.clone() for name, tensor in packed.state().items()}
            return Linear(PackedWeight(PackedTensor.from_state(state, packed.layout)), SiteInput(activation=activation))

        def product(x: Tensor, linear: Linear) -> Tensor:
            if isa is None:
                return ops.linear(x, linear)
            with native.chosen(isa):
                return ops.linear(x, linear)

        ones: list[object] = [copied() for _ in range(copies(read))]
        prepare = (lambda x: x) if narrow is None else (lambda x: x.to(narrow))
        return _Linears(packed.dequantize(), read, tolerance, ones, product, prepare, activation, narrow)

    return make
